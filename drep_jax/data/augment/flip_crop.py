"""Mirroring and moving whole images, and the boxes of random resized crops."""

import math

import numpy as np

from drep_jax.data.augment.random_bits import CROP, MOVES, WORDS, uniform, words

ATTEMPTS = 10
"""Boxes that are tried for one image before the fallback."""


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def flip_and_shift(images: np.ndarray, *, seed: int, first_position: int, flip: bool, shift: int) -> np.ndarray:
    """Mirrors and moves images at random, each as its position in the endless sequence of training images decides.

    Args:
      images: uint8 (B, H, W, C), at consecutive positions.
      seed: of the augmentation.
      first_position: the position of the first image.
      flip: mirror with probability 1/2.
      shift: the largest move in pixels, up or down and left or right; what comes in is 0.

    Returns:
      uint8 (B, H, W, C).
    """
    count, height, width, channels = images.shape
    raw = words(seed, MOVES, first_position, count)
    if flip:
        mirrored = raw[:, 0] % 2 == 1
        images = np.array(images, order="C")
        pixels = images.view(f"V{channels}")  # whole pixels are moved three times as fast as their bytes
        pixels[mirrored] = pixels[mirrored][:, :, ::-1]
    if shift:
        top, left = ((raw[:, column] % (2 * shift + 1)).astype(int) for column in (1, 2))
        padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        images = np.stack([padded[i, top[i] : top[i] + height, left[i] : left[i] + width] for i in range(count)])
    return images


def crop_numbers(seed: int, first_position: int, count: int) -> np.ndarray:
    """Returns what `crop_box` needs for `count` positions in a row: float64 (count, attempts, 4) in [0, 1)."""
    return uniform(words(seed, CROP, first_position, count, ATTEMPTS)).reshape(count, ATTEMPTS, WORDS)


def crop_box(
    numbers: np.ndarray, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Returns the box of a random resized crop: of random area and shape, anywhere in the image.

    Args:
      numbers: (attempts, 4) in [0, 1): area, shape, place down and place to the right of each attempt.
      height, width: of the image in pixels.
      scale: smallest and largest share of the image's area, drawn uniformly.
      ratio: smallest and largest width over height, drawn uniformly in its logarithm.

    Returns:
      The first attempt that fits into the image; if none does, the largest box in the middle whose shape is allowed.
    """
    low, high = (math.log(value) for value in ratio)
    for share, shape, down, right in numbers:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
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
