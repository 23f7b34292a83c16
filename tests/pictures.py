"""Pictures for the tests of corruptions."""

import numpy as np
from scipy import ndimage


def textured(count=4, size=(32, 32), channels=3, seed=0):
    """Smooth blobs with some grain: every corruption must show on them."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.normal(size=(count, *size, channels)), (0, 2, 2, 0)) * 400
    return np.clip(127 + blobs + 10 * rng.normal(size=blobs.shape), 0, 255).astype(np.uint8)
