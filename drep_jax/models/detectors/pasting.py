"""Masks of boxes, pasted into the image.

A pixel takes the mask's value at its center by bilinear interpolation between the centers of the
mask's cells, zero outside (mmdetection, detectron2). As that is a product of two interpolations,
one a direction, pasting is two small matrix products.
"""

from collections.abc import Iterator

import numpy as np

CHUNK_PIXELS = 2**24
"""Pixels pasted at a time."""


def interpolation(low: np.ndarray, high: np.ndarray, cells: int, pixels: int) -> np.ndarray:
    """Returns the weights of the cells of masks at the centers of pixels along one axis.

    Args:
      low, high: (n,) ends of the boxes, in pixels.
      cells: of a mask, along the axis.
      pixels: of the image, along the axis.

    Returns:
      float32 (n, pixels, cells); zero where a box has no length.
    """
    length = (high - low).astype(np.float64)
    there = length > 0
    centers = np.arange(pixels) + 0.5
    place = (centers[None] - low[:, None]) / np.where(there, length, 1)[:, None] * cells - 0.5
    weights = np.maximum(1 - np.abs(place[..., None] - np.arange(cells)), 0)
    return np.where(there[:, None, None], weights, 0).astype(np.float32)


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], *, threshold: float = 0.5) -> np.ndarray:
    """Returns masks in the image, bool (n, height, width), true where the value is at least `threshold`.

    Args:
      masks: probabilities, (n, cells, cells).
      boxes: of the original image, (n, 4) x0, y0, x1, y1.
      size: (height, width) of the original image.
      threshold: of the probability.
    """
    parts = [part >= threshold for part in pasted(masks, boxes, size)]
    return np.concatenate(parts) if parts else np.zeros((0, *size), bool)


def pasted(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields the probabilities in the image, a few masks at a time, float32 (k, height, width)."""
    masks, boxes = np.asarray(masks, np.float32), np.asarray(boxes, np.float64)
    count = max(1, CHUNK_PIXELS // max(size[0] * size[1], 1))
    for start in range(0, len(masks), count):
        part, box = masks[start : start + count], boxes[start : start + count]
        down = interpolation(box[:, 1], box[:, 3], part.shape[1], size[0])
        right = interpolation(box[:, 0], box[:, 2], part.shape[2], size[1])
        yield down @ part @ right.transpose(0, 2, 1)
