"""RandAugment (Cubuk et al., 2020): n of fourteen operations an image, of one magnitude."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from drep_jax.data.augment.random_bits import RANDAUGMENT, WORDS, words

STRONGEST = 30
"""The magnitude at the end of the scale."""

ROTATION = 30.0  # degrees at the strongest
SHEAR = 0.3
SHIFT = 150 / 331  # of the side, as published for sides of 331 pixels
ENHANCE = 0.9
BITS = 4  # that posterizing takes away at most

Operation = Callable[[Image.Image, float], Image.Image]
"""(image, strength in [−1, 1]) ↦ image; the sign is the direction of an operation that has two."""


def randaugment(images: np.ndarray, *, seed: int, first_position: int, count: int, magnitude: float) -> np.ndarray:
    """Applies `count` random operations to every image.

    Args:
      images: uint8 (B, H, W, 3), at consecutive positions.
      seed: of the augmentation.
      first_position: the position of the first image.
      count: operations an image.
      magnitude: from 0 to 30; the direction of an operation that has two is drawn.

    Returns:
      uint8 (B, H, W, 3).
    """
    raw = words(seed, RANDAUGMENT, first_position, len(images), count).reshape(len(images), count, WORDS)
    which = (raw[:, :, 0] % len(OPERATIONS)).astype(int)
    strength = np.where(raw[:, :, 1] % 2, -1.0, 1.0) * (magnitude / STRONGEST)
    operations = tuple(OPERATIONS.values())
    out = np.empty_like(images)
    for place, array in enumerate(images):
        image = Image.fromarray(array)
        for number, signed in zip(which[place], strength[place], strict=True):
            image = operations[number](image, float(signed))
        out[place] = image
    return out


def _identity(image: Image.Image, strength: float) -> Image.Image:
    del strength
    return image


def _autocontrast(image: Image.Image, strength: float) -> Image.Image:
    del strength
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, strength: float) -> Image.Image:
    del strength
    return ImageOps.equalize(image)


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(BITS * abs(strength)))


def _solarize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(image, round(256 * (1 - abs(strength))))


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    return image.rotate(ROTATION * strength, Image.Resampling.BILINEAR)


def _shear_x(image: Image.Image, strength: float) -> Image.Image:
    slope = SHEAR * strength  # about the middle row, so that as much leaves on either side
    return _affine(image, (1, slope, -slope * image.height / 2, 0, 1, 0))


def _shear_y(image: Image.Image, strength: float) -> Image.Image:
    slope = SHEAR * strength
    return _affine(image, (1, 0, 0, slope, 1, -slope * image.width / 2))


def _translate_x(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, (1, 0, round(SHIFT * image.width * strength), 0, 1, 0))


def _translate_y(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, round(SHIFT * image.height * strength)))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength: kind(image).enhance(1 + ENHANCE * strength)


OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": _solarize,
    "posterize": _posterize,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""By name; runs are only resumed exactly as long as their order stays."""
