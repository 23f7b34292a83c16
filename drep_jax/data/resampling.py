"""Resampling: Pillow's filters for images, nearest for label maps, bilinear for predictions."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Part = tuple[slice, slice]
"""Rows and columns, each from a start to a stop within the image."""

Resample = Callable[..., np.ndarray]
"""(array (H, W, …), (height, width), part = all) ↦ that part of the array (height, width, …)."""

WHOLE = 1 << 22
"""Pixels of a resized image up to which it is computed whole, of which the part is cut out."""

MANY = 16
"""How many times the pixels of the part it may have beyond that."""


def bicubic(image: np.ndarray, size: tuple[int, int], part: Part | None = None) -> np.ndarray:
    """Resizes with Pillow's bicubic filter, antialiased where the image shrinks.

    Args:
      image: uint8 (H, W) or (H, W, 3).
      size: (height, width) in pixels.
      part: what is needed of the result; None for all.

    Returns:
      uint8 (height, width) or (height, width, 3), or the part of it; `image` itself where it has
      that size.
    """
    return _with_pillow(image, size, part, Image.Resampling.BICUBIC, 2)


def antialiased_bilinear(image: np.ndarray, size: tuple[int, int], part: Part | None = None) -> np.ndarray:
    """Resizes as `bicubic` does, with Pillow's bilinear filter."""
    return _with_pillow(image, size, part, Image.Resampling.BILINEAR, 1)


def plain_bilinear(image: np.ndarray, size: tuple[int, int], part: Part | None = None) -> np.ndarray:
    """Resizes as `bilinear` does, without antialiasing, rounded: what OpenCV's INTER_LINEAR gives, to one gray level."""
    if image.shape[:2] == tuple(size):
        return image if part is None else image[part]
    return np.rint(bilinear(image, size, part)).astype(np.uint8)


def nearest(array: np.ndarray, size: tuple[int, int], part: Part | None = None) -> np.ndarray:
    """Gives each pixel the value of the input pixel that its center falls into.

    Row i of `height` has its center at (i + ½) · H / height, so it reads row ⌊(2i + 1) · H / (2 ·
    height)⌋. The arithmetic is in integers, so the result is the same on every machine.

    Args:
      array: (H, W, …) of any dtype.
      size: (height, width) in pixels.
      part: what is needed of the result; None for all.

    Returns:
      (height, width, …) of the same dtype, or the part of it.

    >>> nearest(np.array([[1, 2, 3, 4]]), (1, 2))
    array([[2, 4]])
    """
    parts = part or (slice(None), slice(None))
    rows, columns = (
        nearest_place(np.arange(n)[shown], old, n) for n, old, shown in zip(size, array.shape[:2], parts, strict=True)
    )
    return array[rows[:, None], columns]


def nearest_place(place: np.ndarray, old: int, new: int) -> np.ndarray:
    """Returns which of the `old` pixels in a row `nearest` reads at these places of the `new` ones."""
    return (2 * place + 1) * old // (2 * new)


def bilinear(
    array: np.ndarray,
    size: tuple[int, int],
    part: Part | None = None,
    margins: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
) -> np.ndarray:
    """Interpolates between pixel centers, without antialiasing; constant beyond the outermost.

    It is what PyTorch's `interpolate(..., mode="bilinear", align_corners=False)` computes.

    Args:
      array: (H, W, …); integers become float32.
      size: (height, width) in pixels.
      part: what is needed of the result; None for all.
      margins: (above, below) and (left, right): pixels that repeat the edge of the array, around
        it, before it is resized.

    Returns:
      (height, width, …), floating point, or the part of it.
    """
    values = array if array.dtype.kind == "f" else array.astype(np.float32)
    for axis, (wanted, shown, margin) in enumerate(zip(size, part or (slice(None),) * 2, margins, strict=True)):
        inside = values.shape[axis]
        length = inside + sum(margin)
        if length == wanted and not sum(margin):
            values = values[(slice(None),) * axis + (shown,)]
            continue
        at = np.clip((np.arange(wanted)[shown] + 0.5) * length / wanted - 0.5, 0, length - 1)
        below = np.minimum(at.astype(np.int64), max(length - 2, 0))
        above = np.minimum(below + 1, length - 1)
        weight = (at - below).astype(values.dtype).reshape((-1,) + (1,) * (values.ndim - axis - 1))
        low, high = (values.take(np.clip(place - margin[0], 0, inside - 1), axis) for place in (below, above))
        values = (1 - weight) * low + weight * high
    return values


def _with_pillow(
    image: np.ndarray, size: tuple[int, int], part: Part | None, how: Image.Resampling, support: int
) -> np.ndarray:
    """Resizes with a filter that reaches `support` pixels to both sides, of the larger image."""
    part = part or (slice(0, size[0]), slice(0, size[1]))
    wanted = tuple(max(0, shown.stop - shown.start) for shown in part)
    if image.shape[:2] == tuple(size):
        return image[part]
    if not all(wanted):
        return np.zeros((*wanted, *image.shape[2:]), image.dtype)
    if size[0] * size[1] <= max(WHOLE, MANY * wanted[0] * wanted[1]):
        return np.array(Image.fromarray(image).resize((size[1], size[0]), how))[part]
    spans, reads = [], []
    for old, new, shown in zip(image.shape[:2], size, part, strict=True):
        low, high = shown.start * old / new, shown.stop * old / new
        reach = support * max(1.0, old / new) + 1
        start, stop = max(0, math.floor(low - reach)), min(old, math.ceil(high + reach))
        reads.append(slice(start, stop))
        spans.append((low - start, min(high - start, stop - start)))
    box = (spans[1][0], spans[0][0], spans[1][1], spans[0][1])
    return np.array(Image.fromarray(np.ascontiguousarray(image[tuple(reads)])).resize(wanted[::-1], how, box))


PLAIN = "plain_bilinear"

INTERPOLATIONS: dict[str, Resample] = {
    "bicubic": bicubic,
    "bilinear": antialiased_bilinear,
    "nearest": nearest,
    PLAIN: plain_bilinear,
}
"""How `Transform.image` resizes, by name."""
