"""Average precision and recall as functions of (statistics of images, weights of images).

For a class, a range of area and an IoU: detections of all images by falling score, equal ones in
the order of the images; with w_i the weight of detection i's image,

    tp_i = Σ_{j ≤ i} w_j·matched_j     all_i = Σ_{j ≤ i} w_j·(1 − ignored_j)
    recall_i = tp_i / Σ_images w·truths     precision_i = tp_i / all_i
    AP = mean over r = 0, 0.01, …, 1 of max {precision_i : recall_i ≥ r}, 0 where no recall reaches r

Averaged over IoUs and over the classes that have an object. Weights of 1 give COCO's number; with
no object of any class the value is NaN, where COCO prints −1.

A weight of 2 is exactly the image twice, unless detections of the image have equal scores: copies
would interleave, which the sums above do not.

Resampled AP is biased upward, since rare classes vanish or repeat: give intervals of the difference
of two arms on the same resamples, not of AP itself.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.errors import ConfigError
from drep_jax.metrics.detection.statistics import AREAS, MOST, THRESHOLDS
from drep_jax.metrics.reducers import Metric

RECALLS = np.linspace(0.0, 1.0, 101)
CURVES = {"AP": None, "AP50": 0.5, "AP75": 0.75}
"""Metric ↦ its IoU; None for the mean of all ten."""

BLOCK_NUMBERS = 2**22
"""Detections times resamples that are worked on at once."""


def average_precision(
    statistics: Any,
    weights: np.ndarray,
    *,
    iou: float | None = None,
    area: str = "all",
    class_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Returns AP, a fraction.

    Args:
      statistics: of `drep_jax.metrics.detection.statistics`, with first axis n.
      weights: of the images, (…, n).
      iou: one of `THRESHOLDS`; None for the mean over them.
      area: a key of `AREAS`.
      class_weights: (C,) for the mean over classes; None for equal ones.

    Returns:
      (…,); NaN where no class of positive weight has an object.

    Raises:
      ConfigError: for an unknown IoU or range of area.
    """
    return _mean(of_classes(statistics, weights, iou=iou, area=area), class_weights)


def average_recall(
    statistics: Any,
    weights: np.ndarray,
    *,
    most: int = MOST,
    iou: float | None = None,
    area: str = "all",
    class_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the recall with at most `most` detections of a class in an image, as `average_precision`."""
    return _mean(of_classes(statistics, weights, iou=iou, area=area, recall=True, most=most), class_weights)


def of_classes(
    statistics: Any,
    weights: np.ndarray,
    *,
    iou: float | None = None,
    area: str = "all",
    recall: bool = False,
    most: int = MOST,
) -> np.ndarray:
    """Returns AP or recall of each class, (…, C); NaN for classes without an object.

    Args:
      statistics, weights, iou, area: as for `average_precision`.
      recall: whether recall is returned instead of AP.
      most: detections of a class in an image that count.
    """
    chosen = _chosen(iou)
    if area not in AREAS:
        raise ConfigError(f'Unknown range of area "{area}"; known: {", ".join(AREAS)}.')
    column = list(AREAS).index(area)
    weights = np.asarray(weights, np.float64)
    rows = weights.reshape(-1, weights.shape[-1])
    truths = np.asarray(statistics["truths"])[:, :, column].astype(np.float64)
    positives = rows @ truths
    image, classes, rank, places = _ordered(statistics)
    keep = rank < most
    image, classes, places = image[keep], classes[keep], (places[0][keep], places[1][keep])
    matched, ignored = (np.asarray(statistics[name])[places][:, column] for name in ("matched", "ignored"))
    bounds = np.searchsorted(classes, np.arange(truths.shape[1] + 1))
    values = np.full(positives.shape, np.nan)
    value_of = _recall if recall else _precision
    for label, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if not positives[:, label].any():
            continue
        part = slice(start, stop)
        block = max(1, BLOCK_NUMBERS // max(stop - start, 1))
        for first in range(0, len(rows), block):
            mine = rows[first : first + block]
            objects = positives[first : first + block, label]
            seen = mine[:, image[part]]
            of_block = value_of(seen, matched[part], ignored[part], np.where(objects > 0, objects, np.nan), chosen)
            values[first : first + block, label] = of_block
    return values.reshape(*weights.shape[:-1], -1)


def _chosen(iou: float | None) -> list[int]:
    if iou is None:
        return list(range(len(THRESHOLDS)))
    near = np.flatnonzero(np.isclose(THRESHOLDS, iou))
    if not len(near):
        raise ConfigError(f"AP at IoU {iou}: matches are known at {', '.join(f'{t:.2f}' for t in THRESHOLDS)}.")
    return [int(near[0])]


def _ordered(statistics: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns image, class, rank in its image and class, and place of each detection, by class and falling score."""
    all_classes, all_scores = np.asarray(statistics["classes"]), np.asarray(statistics["scores"])
    image, place = np.nonzero(all_classes >= 0)
    classes, scores = all_classes[image, place], all_scores[image, place]
    order = np.lexsort((-scores, classes, image))
    image, place, classes, scores = (values[order] for values in (image, place, classes, scores))
    unit = image.astype(np.int64) * (int(classes.max(initial=0)) + 1) + classes
    rank = np.arange(len(unit)) - np.searchsorted(unit, unit)
    order = np.lexsort((-scores, classes))
    return image[order], classes[order], rank[order], (image[order], place[order])


def _recall(
    seen: np.ndarray, matched: np.ndarray, ignored: np.ndarray, positives: np.ndarray, chosen: Sequence[int]
) -> np.ndarray:
    """Returns the recall of a class on each resample, the mean over IoUs."""
    del ignored
    hits = (matched[:, None] >> np.array(chosen)) & 1
    return (seen @ hits.astype(np.float64) / positives[:, None]).mean(axis=1)


def _precision(
    seen: np.ndarray, matched: np.ndarray, ignored: np.ndarray, positives: np.ndarray, chosen: Sequence[int]
) -> np.ndarray:
    """Returns AP of a class on each resample, the mean over IoUs.

    Only at matches can the precision be the largest from there on, so only they are looked at.

    Args:
      seen: weights of the detections, by falling score (resamples, d).
      matched, ignored: bits of the detections, uint16 (d,).
      positives: weighted numbers of objects (resamples,); NaN where there are none.
      chosen: IoUs, as indices of `THRESHOLDS`.
    """
    rows = np.arange(len(seen))[:, None]
    total = np.zeros(len(seen))
    counted = np.cumsum(seen, axis=1) if not ignored.any() else None
    for number in chosen:
        places = np.flatnonzero((matched >> number) & 1)
        if not len(places):
            continue
        kept = (ignored >> number) & 1 == 0
        every = (np.cumsum(np.where(kept, seen, 0), axis=1) if counted is None else counted)[:, places]
        hits = np.cumsum(seen[:, places], axis=1)
        precision = hits / (every + np.spacing(1))
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # How many of the 101 recalls are reached by here: whole numbers that never fall along a row.
        recall = np.nan_to_num(hits / positives[:, None])
        reached = np.searchsorted(RECALLS, recall.reshape(-1), side="right").reshape(recall.shape)
        step = len(RECALLS) + 1
        first = (
            np.searchsorted(
                (reached + step * rows).reshape(-1), (np.arange(len(RECALLS)) + step * rows).reshape(-1), side="right"
            ).reshape(len(seen), -1)
            - len(places) * rows
        )
        ended = first == len(places)
        read = np.take_along_axis(highest, np.minimum(first, len(places) - 1), axis=1)
        total += np.where(ended, 0, read).mean(axis=1)
    return np.where(np.isnan(positives), np.nan, total / len(chosen))


def _mean(values: np.ndarray, class_weights: np.ndarray | None) -> np.ndarray:
    """Returns the mean over the classes that have a value."""
    there = ~np.isnan(values)
    weights = there * (np.ones(values.shape[-1]) if class_weights is None else np.asarray(class_weights, np.float64))
    total = weights.sum(axis=-1)
    mean = (np.where(there, values, 0) * weights).sum(axis=-1) / np.where(total > 0, total, 1)
    return np.where(total > 0, mean, np.nan)


METRICS: Mapping[str, Metric] = {
    **{name: functools.partial(average_precision, iou=iou) for name, iou in CURVES.items()},
    **{f"AP{area[0]}": functools.partial(average_precision, area=area) for area in AREAS if area != "all"},
    **{f"AR@{most}": functools.partial(average_recall, most=most) for most in (1, 10, 100)},
    **{f"AR{area[0]}": functools.partial(average_recall, area=area) for area in AREAS if area != "all"},
}
"""COCO's twelve numbers: the first is the headline."""
