"""The noise of a camera, measured from pairs of pictures."""
