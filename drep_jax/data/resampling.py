"""Resampling: Pillow's filters for images, nearest for label maps, bilinear for predictions."""

from collections.abc import Callable

import numpy as np
from PIL import Image

Resample = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
"""(array (H, W, …), (height, width)) ↦ array (height, width, …)."""


def bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes with Pillow's bicubic filter, antialiased where the image shrinks.

    Args:
      image: uint8 (H, W) or (H, W, 3).
      size: (height, width) in pixels.

    Returns:
      uint8 (height, width) or (height, width, 3); `image` itself where it has that size.
    """
    return _with_pillow(image, size, Image.Resampling.BICUBIC)


def antialiased_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes as `bicubic` does, with Pillow's bilinear filter."""
    return _with_pillow(image, size, Image.Resampling.BILINEAR)


def nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Gives each pixel the value of the input pixel that its center falls into.

    Row i of `height` has its center at (i + ½) · H / height, so it reads row ⌊(2i + 1) · H / (2 ·
    height)⌋. The arithmetic is in integers, so the result is the same on every machine.

    Args:
      array: (H, W, …) of any dtype.
      size: (height, width) in pixels.

    Returns:
      (height, width, …) of the same dtype.

    >>> nearest(np.array([[1, 2, 3, 4]]), (1, 2))
    array([[2, 4]])
    """
    rows, columns = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, array.shape[:2], strict=True))
    return array[rows[:, None], columns]


def bilinear(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolates between pixel centers, without antialiasing; constant beyond the outermost.

    It is what PyTorch's `interpolate(..., mode="bilinear", align_corners=False)` computes.

    Args:
      array: (H, W, …); integers become float32.
      size: (height, width) in pixels.

    Returns:
      (height, width, …), floating point.
    """
    values = array if array.dtype.kind == "f" else array.astype(np.float32)
    for axis, wanted in enumerate(size):
        length = values.shape[axis]
        if length == wanted:
            continue
        at = np.clip((np.arange(wanted) + 0.5) * length / wanted - 0.5, 0, length - 1)
        below = np.minimum(at.astype(np.int64), max(length - 2, 0))
        above = np.minimum(below + 1, length - 1)
        weight = (at - below).astype(values.dtype).reshape((-1,) + (1,) * (values.ndim - axis - 1))
        values = (1 - weight) * values.take(below, axis) + weight * values.take(above, axis)
    return values


def _with_pillow(image: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    if image.shape[:2] == tuple(size):
        return image
    return np.array(Image.fromarray(image).resize((size[1], size[0]), how))


INTERPOLATIONS: dict[str, Resample] = {
    "bicubic": bicubic,
    "bilinear": antialiased_bilinear,
    "nearest": nearest,
}
"""How `Transform.image` resizes, by name."""
