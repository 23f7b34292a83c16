"""Photometric distortion (Liu et al., 2016, SSD): brightness, contrast, saturation and hue at random.

As mmsegmentation does it: brightness, contrast, saturation and hue in this order, each with
probability 1/2; contrast comes last instead with probability 1/2.
"""

import numpy as np

from drep_jax.data.augment.random_bits import PHOTOMETRIC, uniform, words

BRIGHTNESS = 32
"""Largest change in gray levels."""

FACTORS = (0.5, 1.5)
"""Smallest and largest factor of contrast and saturation."""

HUE = 18
"""Largest change in steps of two degrees: a whole number from -18 to 17."""

BLOCKS = 3


def photometric(images: np.ndarray, *, seed: int, first_position: int) -> np.ndarray:
    """Distorts images by their positions in the stream of training images.

    Args:
      images: uint8 (B, H, W, 3), at consecutive positions.
      seed: of the augmentation.
      first_position: the position of the first image.

    Returns:
      uint8 (B, H, W, 3). Each step clips to 0 … 255 and drops fractions; saturation and hue are one
      step, in floating point.
    """
    numbers = uniform(words(seed, PHOTOMETRIC, first_position, len(images), BLOCKS))
    return np.stack([_distorted(image, row) for image, row in zip(images, numbers, strict=True)])


def _distorted(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns one image; the numbers, in [0, 1), are coins and amounts."""
    brighter, contrast_last, contrasted, saturated, hued = numbers[:5] < 0.5
    brightness = BRIGHTNESS * (2 * numbers[5] - 1)
    contrast, saturation = (FACTORS[0] + (FACTORS[1] - FACTORS[0]) * number for number in numbers[6:8])
    hue = int(numbers[8] * 2 * HUE) - HUE
    levels = np.arange(256.0)
    if brighter:
        image = _clipped(levels + brightness)[image]
    if contrasted and not contrast_last:
        image = _clipped(levels * contrast)[image]
    if saturated or hued:
        image = _colored(image, saturation if saturated else 1.0, hue / 30 if hued else 0.0)
    if contrasted and contrast_last:
        image = _clipped(levels * contrast)[image]
    return image


def _clipped(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _colored(image: np.ndarray, saturation: float, turn: float) -> np.ndarray:
    """Returns an image with another saturation and hue; `turn` is in sixths of the circle.

    With the largest channel V and the range C of the channels, saturation C / V becomes at most 1. A
    channel is V − C · clip(min(k, 4 − k), 0, 1), k = (n + hue) mod 6, n = 5, 3, 1 of red, green, blue.
    """
    pixels = image.astype(np.float32)
    value, low = pixels.max(axis=-1), pixels.min(axis=-1)
    spread = value - low
    saturated = np.minimum(spread * np.float32(saturation), value)
    if turn == 0:
        ratio = saturated / np.maximum(spread, 1)
        return _rounded(value[..., None] - (value[..., None] - pixels) * ratio[..., None])
    red, green, blue = np.moveaxis(pixels, -1, 0)
    divisor = np.maximum(spread, 1)
    hue = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + np.float32(turn)
    out = np.empty_like(pixels)
    for channel, number in enumerate((5, 3, 1)):
        place = (hue + number) % 6
        out[..., channel] = value - saturated * np.clip(np.minimum(place, 4 - place), 0, 1)
    return _rounded(out)


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
