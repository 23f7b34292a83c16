"""Arms of a run on test images: scores, paired intervals, choices on held-out images, cost."""
