"""Random erasing (Zhong et al., 2020): a box of the image becomes noise, or one color."""

from collections.abc import Sequence

import numpy as np

from drep_jax.data.augment.flip_crop import ATTEMPTS, crop_box
from drep_jax.data.augment.random_bits import ERASE, ERASE_FILL, WORDS, noise, uniform, words

AREA = (0.02, 1 / 3)
"""Smallest and largest fraction of the image that is erased."""

RATIO = (0.3, 1 / 0.3)
"""Smallest and largest width over height of what is erased."""


def erase(
    images: np.ndarray, *, seed: int, first_position: int, probability: float, fill: Sequence[float] = ()
) -> np.ndarray:
    """Fills a box of some images with random bytes or one color, as each image's position decides.

    Args:
      images: uint8 (B, H, W, C), at consecutive positions.
      seed: of the augmentation.
      first_position: the position of the first image.
      probability: that an image loses a box.
      fill: the color, one number a channel on the scale from 0 to 1; () for random bytes.

    Returns:
      uint8 (B, H, W, C).
    """
    count, height, width, channels = images.shape
    numbers = uniform(words(seed, ERASE, first_position, count, 1 + ATTEMPTS)).reshape(count, 1 + ATTEMPTS, WORDS)
    out = images.copy()
    color = np.round(255 * np.asarray(fill)).astype(np.uint8)
    for place in np.flatnonzero(numbers[:, 0, 0] < probability):
        top, left, rows, columns = crop_box(numbers[place, 1:], height, width, AREA, RATIO)
        box = out[place, top : top + rows, left : left + columns]
        if len(color):
            box[...] = color
        else:
            box[...] = noise(seed, ERASE_FILL, first_position + int(place), box.size).reshape(rows, columns, channels)
    return out
