"""Overlaps of detections with annotated objects: IoU, and for crowds the share of the detection inside."""

from typing import Any

import numpy as np


def box_overlaps(boxes: Any, others: Any, crowd: Any, xp: Any = np) -> Any:
    """Returns |A ∩ B| / |A ∪ B|, and |A ∩ B| / |A| where B is a crowd; 0 where nothing is shared.

    >>> one, others = np.array([[0.0, 0.0, 4.0, 4.0]]), np.array([[0.0, 0.0, 8.0, 2.0]] * 2)
    >>> box_overlaps(one, others, np.array([False, True])).round(3).tolist()
    [[0.333, 0.5]]

    Args:
      boxes: of the detections, (…, n, 4) x0, y0, x1, y1.
      others: of the annotated objects, (…, m, 4).
      crowd: which of these are crowds, bool (…, m).
      xp: `numpy` or `jax.numpy`.

    Returns:
      (…, n, m).
    """
    first, second = boxes[..., :, None, :], others[..., None, :, :]
    sides = xp.minimum(first[..., 2:], second[..., 2:]) - xp.maximum(first[..., :2], second[..., :2])
    shared = xp.maximum(sides[..., 0], 0) * xp.maximum(sides[..., 1], 0)
    area = box_areas(boxes)[..., :, None]
    union = xp.where(crowd[..., None, :], area, area + box_areas(others)[..., None, :] - shared)
    return xp.where(shared > 0, shared / xp.where(shared > 0, union, 1), 0)


def box_areas(boxes: Any) -> Any:
    """Returns width times height, (…, n)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def mask_overlaps(masks: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Returns the same for masks in one image.

    Args:
      masks: of the detections, bool (n, height, width).
      others: of the annotated objects, bool (m, height, width).
      crowd: bool (m,).

    Returns:
      float64 (n, m).
    """
    # Counts of pixels are exact in float32 up to 2²⁴; larger images are added up in parts.
    first, second = (np.reshape(part, (len(part), int(np.prod(part.shape[1:])))) for part in (masks, others))
    shared = np.zeros((len(first), len(second)))
    for start in range(0, first.shape[1], 2**22):
        part = slice(start, start + 2**22)
        shared += first[:, part].astype(np.float32) @ second[:, part].astype(np.float32).T
    area = first.sum(axis=1, dtype=np.float64)[:, None]
    union = np.where(crowd[None], area, area + second.sum(axis=1, dtype=np.float64)[None] - shared)
    return np.where(shared > 0, shared / np.where(shared > 0, union, 1), 0)
