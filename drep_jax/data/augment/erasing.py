"""Random erasing (Zhong et al., 2020): a box of the image becomes noise."""

import numpy as np

from drep_jax.data.augment.draws import ERASE, ERASE_FILL, WORDS, noise, uniform, words
from drep_jax.data.augment.moves import ATTEMPTS, crop_box

AREA = (0.02, 1 / 3)
"""Share of the image that is erased, smallest and largest."""

RATIO = (0.3, 1 / 0.3)
"""Width over height of what is erased."""


def erase(images: np.ndarray, *, seed: int, first_position: int, probability: float) -> np.ndarray:
    """Fills a box of some images with random bytes, as each image's position decides.

    Args:
      images: uint8 (B, H, W, C), at consecutive positions.
      seed: of the augmentation.
      first_position: the position of the first image.
      probability: that an image loses a box.

    Returns:
      uint8 (B, H, W, C).
    """
    count, height, width, channels = images.shape
    numbers = uniform(words(seed, ERASE, first_position, count, 1 + ATTEMPTS)).reshape(count, 1 + ATTEMPTS, WORDS)
    out = images.copy()
    for place in np.flatnonzero(numbers[:, 0, 0] < probability):
        top, left, rows, columns = crop_box(numbers[place, 1:], height, width, AREA, RATIO)
        fill = noise(seed, ERASE_FILL, first_position + int(place), rows * columns * channels)
        out[place, top : top + rows, left : left + columns] = fill.reshape(rows, columns, channels)
    return out
