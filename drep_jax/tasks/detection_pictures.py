"""Which test images a report shows with their boxes, and what is stored of them."""

from typing import Any

import numpy as np
from PIL import Image

from drep_jax.metrics.detection.overlaps import box_overlaps
from drep_jax.metrics.overlays import SIDE, chosen
from drep_jax.metrics.pictures import small
from drep_jax.tasks.base import Exhibit

IOU = 0.5
"""From which a shown box has found an object of its class."""


def boxes_entry(task: Any, exhibit: Exhibit) -> dict[str, Any]:
    """Returns the report's `boxes`, {} if no image is to be shown.

    Images are chosen by how many more objects the second network finds, minus the boxes that are
    wrong, both among boxes whose score reaches `task.confidence`.
    """
    if not task.shown or not len(exhibit.index):
        return {}
    right = {arm: _right(exhibit.statistics[arm], task.confidence) for arm in exhibit.arms}
    before, after = (right[arm] for arm in exhibit.arms)
    images = []
    for row, why in chosen(before, after, task.shown, exhibit.seed):
        images.append({"index": int(exhibit.index[row]), "why": why, **_entry(task, exhibit, int(exhibit.index[row]))})
    classes = np.asarray(exhibit.statistics[next(iter(exhibit.arms))]["truths"]).shape[1]
    return {
        "boxes": {
            "condition": exhibit.condition,
            "arms": list(exhibit.arms),
            "classes": list(exhibit.source.class_names or tuple(map(str, range(classes)))),
            "score": task.confidence,
            "improved": int(np.sum(after > before)),
            "worsened": int(np.sum(after < before)),
            "of": len(before),
            "images": images,
        }
    }


def _right(statistics: Any, confidence: float) -> np.ndarray:
    """Returns of each image the number of objects found minus that of wrong boxes, among the confident ones."""
    sure = (np.asarray(statistics["classes"]) >= 0) & (np.asarray(statistics["scores"]) >= confidence)
    found = sure & ((np.asarray(statistics["matched"])[..., 0] & 1) > 0)
    nothing = sure & ((np.asarray(statistics["ignored"])[..., 0] & 1) > 0)
    return (found.sum(axis=1) - (sure & ~found & ~nothing).sum(axis=1)).astype(np.float64)


def _entry(task: Any, exhibit: Exhibit, index: int) -> dict[str, Any]:
    columns, outputs = exhibit.outputs(index)
    picture = np.asarray(exhibit.picture(index), np.uint8)
    height, width = picture.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    shown = Image.fromarray(picture).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    unit = np.array([width, height, width, height], np.float64)
    there = columns["objects_valid"][0] & ~columns["ignore"][0]
    truth, classes, crowd = (columns[name][0][there] for name in ("boxes", "classes", "crowd"))
    entry: dict[str, Any] = {
        "image": small(np.asarray(shown), SIDE),
        "truth": [
            {"box": (box / unit).tolist(), "class": int(label), "crowd": bool(many)}
            for box, label, many in zip(truth.astype(np.float64), classes, crowd, strict=True)
        ],
        "found": {},
    }
    hits: dict[str, np.ndarray] = {}
    for arm, output in outputs.items():
        objects = output.objects
        sure = np.asarray(objects.valid)[0] & (np.asarray(objects.scores)[0] >= task.confidence)
        boxes, scores, labels = (np.asarray(getattr(objects, name))[0][sure] for name in ("boxes", "scores", "classes"))
        owner = matches(boxes, labels, truth, classes, crowd)
        hits[arm] = np.isin(np.arange(len(truth)), owner[owner >= 0])
        entry["found"][arm] = [
            {"box": (box / unit).tolist(), "class": int(label), "score": float(score), "object": int(place)}
            for box, label, score, place in zip(boxes.astype(np.float64), labels, scores, owner, strict=True)
        ]
    first, second = (hits[arm] for arm in exhibit.arms)
    entry["gained"] = np.flatnonzero(second & ~first & ~crowd).tolist()
    entry["lost"] = np.flatnonzero(first & ~second & ~crowd).tolist()
    return entry


def matches(
    boxes: np.ndarray, labels: np.ndarray, truth: np.ndarray, classes: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    """Returns the object that each box finds, by falling score; −1 for none.

    >>> boxes = np.array([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0]])
    >>> matches(boxes, np.array([1, 1]), boxes[:1], np.array([1]), np.array([False])).tolist()
    [0, -1]

    Args:
      boxes: (k, 4), by falling score.
      labels: their classes.
      truth, classes, crowd: of the objects; a crowd may be found by several boxes.
    """
    if not len(truth):
        return np.full(len(boxes), -1)
    overlap = box_overlaps(boxes.astype(np.float64), truth.astype(np.float64), crowd)
    free, owner = np.ones(len(truth), bool), np.full(len(boxes), -1)
    for place in range(len(boxes)):
        value = np.where((free | crowd) & (classes == labels[place]), overlap[place], -1)
        best = int(value.argmax())
        if value[best] >= IOU:
            owner[place], free[best] = best, False
    return owner
