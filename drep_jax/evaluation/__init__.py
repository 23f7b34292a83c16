"""Evaluation of a run's arms on test images: scores, paired intervals, selection, cost."""
