"""Horizontal flips, shifts and random resized crops: of pixels, and as transforms for labels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from drep_jax.data.augment.random_bits import CROP, FLIP_AND_SHIFT, WORDS, uniform, words
from drep_jax.data.geometry import Transform
from drep_jax.data.steps import Size

ATTEMPTS = 10
"""Boxes that are tried for one image before the fallback."""


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def flip_and_shift(
    images: np.ndarray, *, seed: int, first_position: int, flip: bool, shift: int, size: np.ndarray | None = None
) -> np.ndarray:
    """Flips and shifts images at random, by their positions in the stream of training images.

    Args:
      images: uint8 (B, H, W, C), at consecutive positions.
      seed: of the augmentation.
      first_position: the position of the first image.
      flip: flip horizontally with probability 1/2.
      shift: largest shift in pixels, vertical and horizontal; what comes in is 0.
      size: (B, 2), height and width of each picture at the top left of its image, which is moved
        within itself; padding stays where it is. None where nothing is padded.

    Returns:
      uint8 (B, H, W, C).
    """
    count, height, width, channels = images.shape
    flipped, down, right = _draws(seed, first_position, count, shift)
    if size is not None:
        images = images.copy()
        for image, (rows, columns), *draws in zip(images, size.tolist(), flipped, down, right, strict=True):
            picture = image[:rows, :columns]
            picture[...] = _moved(Transform((rows, columns)), *draws, flip=flip).image(picture.copy())
        return images
    if flip:
        images = np.array(images, order="C")
        pixels = images.view(f"V{channels}")  # whole pixels are copied three times as fast as their bytes
        pixels[flipped] = pixels[flipped][:, :, ::-1]
    if shift:
        top, left = shift - down, shift - right
        padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        images = np.stack([padded[i, top[i] : top[i] + height, left[i] : left[i] + width] for i in range(count)])
    return images


def flip_and_shift_transforms(
    sizes: Sequence[Size],
    pictures: Sequence[Size] | None = None,
    *,
    seed: int,
    first_position: int,
    flip: bool,
    shift: int,
) -> list[Transform]:
    """Returns what `flip_and_shift` does to each image of a batch, for its labels to follow.

    Args:
      sizes: (height, width) of each image.
      pictures: the same without padding; None where nothing is padded.
      seed, first_position, flip, shift: as for `flip_and_shift`.
    """
    transforms = []
    draws = _draws(seed, first_position, len(sizes), shift)
    for size, picture, *numbers in zip(sizes, pictures or sizes, *draws, strict=True):
        if flip or shift:
            moved = _moved(Transform(size).window(0, 0, *picture), *numbers, flip=flip)
            transforms.append(moved.window(0, 0, *size))
        else:
            transforms.append(Transform(size))
    return transforms


def _moved(transform: Transform, flipped: Any, down: Any, right: Any, *, flip: bool) -> Transform:
    """Returns a transform with the flip and the shift of one position."""
    return (transform.flip() if flip and flipped else transform).shift(int(down), int(right))


def crop_numbers(seed: int, first_position: int, count: int) -> np.ndarray:
    """Returns the numbers of `crop_box` for `count` positions, (count, attempts, 4) in [0, 1)."""
    return uniform(words(seed, CROP, first_position, count, ATTEMPTS)).reshape(count, ATTEMPTS, WORDS)


def crop_box(
    numbers: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Returns the box of a random resized crop: of random area and shape, anywhere in the image.

    Args:
      numbers: (attempts, 4) in [0, 1): area, shape, vertical and horizontal place of each attempt.
      height, width: of the image in pixels.
      scale: smallest and largest fraction of the image's area, drawn uniformly.
      ratio: smallest and largest width over height, drawn uniformly in its logarithm.

    Returns:
      The first attempt that fits into the image; if none does, the largest box in the center whose
      shape is allowed.
    """
    low, high = (math.log(value) for value in ratio)
    for fraction, shape, down, right in numbers:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * fraction)
        aspect = math.exp(low + (high - low) * shape)
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(down * (height - box_height + 1))
            left = int(right * (width - box_width + 1))
            return top, left, box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_height, box_width = min(height, round(width / aspect)), min(width, round(height * aspect))
    box_height, box_width = max(box_height, 1), max(box_width, 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def transform_of_crop(size: Size, box: Box, target: Size) -> Transform:
    """Returns a resized crop: this box of an image of that size, scaled to the target."""
    return Transform(size).crop(*box).resize(target)


def flips(seed: int, first_position: int, count: int) -> np.ndarray:
    """Returns which of `count` positions `flip_and_shift` flips, bool (count,)."""
    return _draws(seed, first_position, count, 0)[0]


def _draws(seed: int, first_position: int, count: int, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each position whether it is flipped, and its shift down and to the right."""
    raw = words(seed, FLIP_AND_SHIFT, first_position, count)
    down, right = (shift - (raw[:, column] % (2 * shift + 1)).astype(int) for column in (1, 2))
    return raw[:, 0] % 2 == 1, down, right
