"""Photometric distortion, as mmsegmentation trains with: brightness, contrast, saturation and hue.

Each of the four acts with probability 1/2, in that order, but contrast comes last for half of the
images. Values are rounded and clipped to 0 … 255 after each.
"""

import numpy as np
from PIL import Image

from drep_jax.data.augment.random_bits import PHOTOMETRIC, WORDS, uniform, words

BRIGHTNESS = 32.0  # gray levels, at most
FACTORS = (0.5, 1.5)  # of contrast and of saturation
HUE = 0.1  # of the color circle, at most: 18 of 180 degrees as OpenCV counts them
CIRCLE = 255  # steps of Pillow's hue


def distort(images: np.ndarray, *, seed: int, first_position: int) -> np.ndarray:
    """Changes the colors of every image as its position decides.

    Args:
      images: uint8 (B, H, W, 3), at consecutive positions.
      seed: of the augmentation.
      first_position: the position of the first image.

    Returns:
      uint8 (B, H, W, 3).
    """
    numbers = uniform(words(seed, PHOTOMETRIC, first_position, len(images), 3)).reshape(len(images), 3, WORDS)
    out = np.empty_like(images)
    for place, image in enumerate(images):
        (acts, sizes, (contrast_last, *_)) = numbers[place]
        brighter, stronger, colorful, turned = acts < 0.5
        levels, contrast, saturation, hue = sizes
        if brighter:
            image = _rounded(image + BRIGHTNESS * (2 * levels - 1))
        if stronger and contrast_last >= 0.5:
            image = _rounded(image * _factor(contrast))
        if colorful or turned:
            image = _recolored(image, _factor(saturation) if colorful else 1.0, HUE * (2 * hue - 1) if turned else 0.0)
        if stronger and contrast_last < 0.5:
            image = _rounded(image * _factor(contrast))
        out[place] = image
    return out


def _factor(number: float) -> float:
    low, high = FACTORS
    return low + (high - low) * number


def _rounded(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _recolored(image: np.ndarray, saturation: float, turn: float) -> np.ndarray:
    """Returns an image with another saturation and with hues turned by a part of the color circle."""
    hue, strength, value = Image.fromarray(image).convert("HSV").split()
    turned = np.mod(np.asarray(hue, np.int16) + round(CIRCLE * turn), CIRCLE).astype(np.uint8)
    stronger = _rounded(np.asarray(strength) * saturation)
    return np.asarray(Image.merge("HSV", [Image.fromarray(turned), Image.fromarray(stronger), value]).convert("RGB"))
