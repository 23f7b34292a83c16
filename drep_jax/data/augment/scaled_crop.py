"""Random scale, crop and flip of an image and its label map, as networks for maps of labels are trained.

The image is resized by a random factor with its aspect kept, a crop of the wanted size is cut out,
flipped with probability 1/2, and padded below and on the right where the image is smaller. The crop
is drawn again, up to ten times, while one class covers too much of it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from drep_jax.data.augment.random_bits import SCALE, WORDS, uniform, words
from drep_jax.data.fits import scaled_size
from drep_jax.data.geometry import IGNORED, Transform
from drep_jax.data.steps import Size

ATTEMPTS = 11
"""Crops that are drawn for one image at most; the last one is taken as it is."""

BLOCKS = -(-(1 + 2 * ATTEMPTS) // WORDS)


@dataclasses.dataclass(frozen=True)
class ScaledCrop:
    """Geometry of one training image before padding.

    Attributes:
      shown: resize, crop and flip.
      whole: the same with the padding.
    """

    shown: Transform
    whole: Transform


def scaled_crop_numbers(seed: int, first_position: int, count: int) -> np.ndarray:
    """Returns the numbers of `scaled_crop` for `count` positions, (count, 24) in [0, 1)."""
    return uniform(words(seed, SCALE, first_position, count, BLOCKS))


def scaled_crop(
    numbers: np.ndarray,
    size: Size,
    target: Size,
    *,
    scale: Sequence[float],
    base: Sequence[float],
    labels: np.ndarray | None,
    cat_max_ratio: float,
    flipped: bool,
) -> ScaledCrop:
    """Returns the geometry of one training image.

    Args:
      numbers: (24,) in [0, 1): the factor, then vertical and horizontal place of each attempt.
      size: (height, width) of the image.
      target: (height, width) of the crop.
      scale: smallest and largest factor, drawn uniformly.
      base: short and long side that the factor 1 stands for; () for the image's own size.
      labels: its label map, uint8 (height, width); None where there is none, so that the first crop
        is taken.
      cat_max_ratio: a crop in which one class has this fraction of the pixels that are not ignored,
        or which shows one class only, is drawn again; 1 for any crop.
      flipped: whether it is flipped horizontally.
    """
    factor = scale[0] + (scale[1] - scale[0]) * float(numbers[0])
    short, long = base if base else (min(size), math.inf)
    resized = Transform(size).resize(scaled_size(size, short * factor, long * factor))
    height, width = (min(side, most) for side, most in zip(resized.size_out, target, strict=True))
    free = resized.size_out[0] - height, resized.size_out[1] - width
    cropped = resized
    for down, right in numbers[1 : 1 + 2 * ATTEMPTS].reshape(ATTEMPTS, 2):
        cropped = resized.crop(int(down * (free[0] + 1)), int(right * (free[1] + 1)), height, width)
        if labels is None or cat_max_ratio >= 1 or _varied(cropped.mask(labels), cat_max_ratio):
            break
    shown = cropped.flip() if flipped else cropped
    return ScaledCrop(shown, shown.window(0, 0, *target))


def _varied(labels: np.ndarray, most: float) -> bool:
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < most * counts.sum())
