"""Average precision of masks: pasted on the host, image by image, and matched with the annotated outlines."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.metrics.detection.lists import Detected, Truths, statistics_of_lists
from drep_jax.metrics.detection.statistics import AREAS, Statistics

Paste = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]
"""(probabilities (k, s, s), boxes (k, 4), (height, width)) ↦ masks in the image, bool (k, height, width)."""


def mask_statistics(
    found: Mapping[str, np.ndarray],
    truths: Sequence[Mapping[str, Any]],
    num_classes: int,
    paste: Paste,
) -> Statistics:
    """Returns the statistics of every image, see `drep_jax.metrics.detection.statistics`.

    Args:
      found: "boxes" (n, k, 4) in pixels of the original image, "scores", "classes" (n, k), −1 where
        there is none, "masks" (n, k, s, s) of probabilities.
      truths: of each image "size", (height, width), "masks" bool (m, height, width), "boxes",
        "classes", "crowd", "ignore" and "area".
      num_classes: C.
      paste: makes masks in the image.
    """
    width = found["classes"].shape[1]
    rows = [
        _of_image({name: values[place] for name, values in found.items()}, truth, num_classes, paste, width)
        for place, truth in enumerate(truths)
    ]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _of_image(
    found: Mapping[str, np.ndarray], truth: Mapping[str, Any], num_classes: int, paste: Paste, width: int
) -> Statistics:
    there = found["classes"] >= 0
    zeros = np.zeros(int(there.sum()), int)
    boxes = found["boxes"][there]
    detected = Detected(
        zeros,
        boxes,
        found["classes"][there],
        found["scores"][there],
        list(paste(found["masks"][there], boxes, truth["size"])),
    )
    truths = Truths(
        np.zeros(len(truth["classes"]), int),
        np.asarray(truth["boxes"], np.float64).reshape(-1, 4),
        np.asarray(truth["classes"]),
        np.asarray(truth["crowd"], bool),
        np.asarray(truth["area"], np.float64),
        np.asarray(truth["ignore"], bool),
        list(truth["masks"]),
    )
    rows = statistics_of_lists(detected, truths, images=1, num_classes=num_classes)
    out: Statistics = {
        "scores": np.zeros(width, np.float32),
        "classes": np.full(width, -1, np.int32),
        "matched": np.zeros((width, len(AREAS)), np.uint16),
        "ignored": np.zeros((width, len(AREAS)), np.uint16),
    }
    for name, row in out.items():
        row[: rows[name].shape[1]] = rows[name][0]
    return {**out, "truths": rows["truths"][0]}
