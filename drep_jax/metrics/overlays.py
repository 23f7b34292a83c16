"""Label maps of test images for a report: which images are shown, and how their maps are stored."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from drep_jax.metrics.pictures import small

SIDE = 320
"""Largest length of the longer side of a picture, in pixels."""

GAINED, LOST, RANDOM = "largest gain", "largest loss", "drawn at random"


def chosen(before: np.ndarray, after: np.ndarray, count: int, seed: int) -> list[tuple[int, str]]:
    """Returns the images to show, and why: those that changed most, up and down, and some at random.

    >>> chosen(np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.5, 0.9, 0.2, 0.5]), 2, 0)
    [(1, 'largest gain'), (2, 'largest loss')]

    Args:
      before, after: (n,) pixel accuracy of each image by two networks.
      count: number of images.
      seed: of the random ones.
    """
    gain = after - before
    each = -(-count // 3)
    order = np.argsort(-gain, kind="stable")
    rows = [(int(row), GAINED) for row in order[:each] if gain[row] > 0]
    rows += [(int(row), LOST) for row in order[::-1][:each] if gain[row] < 0]
    rows = rows[:count]
    others = np.setdiff1d(np.arange(len(gain)), [row for row, _ in rows])
    drawn = np.random.default_rng(seed).permutation(others)[: count - len(rows)]
    return rows + [(int(row), RANDOM) for row in drawn]


def overlays(
    rows: Sequence[tuple[int, str]],
    scores: Mapping[str, np.ndarray],
    look: Callable[[int], tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]],
) -> list[dict[str, Any]]:
    """Returns the entries of the images of a report.

    Args:
      rows: of `chosen`.
      scores: arm ↦ (n,) pixel accuracy of each image, fractions.
      look: row ↦ image, uint8 (h, w, 3), its label map and each arm's map of answers, uint8 (H, W).

    Returns:
      "why", "accuracy" by arm, "image", a base64 JPEG, "label" and "answers" by arm, base64 PNGs of
      class numbers, all of one size.
    """
    entries = []
    for row, why in rows:
        image, labels, answers = look(row)
        size = _shrunk(labels.shape)
        entries.append(
            {
                "why": why,
                "accuracy": {arm: float(values[row]) for arm, values in scores.items()},
                "image": small(np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)), SIDE),
                "label": stored_map(labels, size),
                "answers": {arm: stored_map(each, size) for arm, each in answers.items()},
            }
        )
    return entries


def stored_map(labels: np.ndarray, size: tuple[int, int]) -> str:
    """Returns a label map, uint8 (h, w), as a base64 PNG of this size, nearest."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(labels, np.uint8)).resize(size[::-1], Image.Resampling.NEAREST).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _shrunk(size: tuple[int, ...]) -> tuple[int, int]:
    scale = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
