"""Segmentation: pixel counts of each image and class; mIoU, mAcc, aAcc and boundary IoU of a set.

The counts of an image are sums over its labeled pixels, so the counts of a set are their sums, and
all metrics are ratios of those. The mean of the images' own IoUs is another number.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from drep_jax.metrics.reducers import Metric

RATIO = 0.02
"""Width of a boundary region over the diagonal of the image (Cheng et al. 2021)."""


def boundary_width(size: tuple[int, int], ratio: float = RATIO) -> int:
    """Returns the width of boundary regions in pixels, max(1, round(ratio·√(height² + width²))).

    >>> boundary_width((360, 480)), boundary_width((1024, 2048)), boundary_width((8, 8))
    (12, 46, 1)
    """
    return max(1, round(ratio * math.hypot(*size)))


def boundary_region(labels: Int[Array, "n h w"], width: int) -> Bool[Array, "n h w"]:
    """Returns which pixels lie in the boundary region of their own class.

    A pixel does if another class, or the outside of the image, is at most `width` rows and columns
    away: the class minus its erosion, `width` times, by a square of 3 x 3 pixels. So it does not if
    the window of 2·width + 1 rows and columns around it lies in the image and has one label, which
    neighbors compared along rows and columns tell for all classes at once.
    """
    across = labels[:, :, 1:] == labels[:, :, :-1]
    down = labels[:, 1:] == labels[:, :-1]
    pad = (width, width)
    rows = _all(jnp.pad(across, ((0, 0), (0, 0), pad)), 2, 2 * width)  # the window's row around each pixel
    rows = _all(jnp.pad(rows, ((0, 0), pad, (0, 0))), 1, 2 * width + 1)
    columns = _all(jnp.pad(down, ((0, 0), pad, (0, 0))), 1, 2 * width)
    return ~(rows & columns)


def _all(values: Bool[Array, "..."], axis: int, length: int) -> Bool[Array, "..."]:
    """Returns whether all of `length` successive values are true, by doubling windows."""
    size = values.shape[axis] - length + 1
    step = 1

    def behind(array: Any, start: int, count: int) -> Any:
        return array[(slice(None),) * axis + (slice(start, start + count),)]

    while 2 * step <= length:
        count = values.shape[axis] - step
        values = behind(values, 0, count) & behind(values, step, count)
        step *= 2
    return behind(values, 0, size) & behind(values, length - step, size)


def counts(
    labels: Int[Array, "n h w"],
    answers: Int[Array, "n h w"],
    classes: int,
    *,
    ratio: float = RATIO,
) -> dict[str, Int[Array, "..."]]:
    """Returns the pixels of each image by class, and those in boundary regions.

    Regions are computed on the whole maps, where ignored pixels are another label. Only labeled
    pixels are counted, of labels and answers alike.

    Args:
      labels: 0 … classes − 1; pixels with any other label, such as 255, are ignored.
      answers: classes of the network; others than 0 … classes − 1 are answers that are no class.
      classes: number of classes.
      ratio: see `boundary_width`.

    Returns:
      "pixels": (n, classes, 3), the pixels of I, G and P: of the class in both, in the labels, and
      in the answers. "boundary": likewise, of their boundary regions. "size": (n,), all pixels of
      the image. All int32, since float32 cannot count beyond 2²⁴.

    Examples:
      >>> labels, answers = jnp.array([[[0, 0, 1, 255]]]), jnp.array([[[0, 1, 1, 1]]])
      >>> counts(labels, answers, 2)["pixels"].tolist()
      [[[1, 2, 1], [1, 1, 2]]]
    """
    number, height, width = labels.shape
    labels, answers = labels.astype(jnp.int32), answers.astype(jnp.int32)
    distance = boundary_width((height, width), ratio)
    valid = labels < classes
    near_label, near_answer = (boundary_region(each, distance) for each in (labels, answers))
    is_class = (answers >= 0) & (answers < classes)
    right = labels == answers
    # One histogram a map; the flags tell which of the counts a pixel is part of.
    flags = right + 2 * near_label + 4 * near_answer
    of_labels = _histogram(jnp.where(valid, labels, classes), flags, classes, 8)
    of_answers = _histogram(jnp.where(valid & is_class, answers, classes), near_answer, classes, 2)
    by_flag = of_labels.reshape(number, classes, 2, 2, 2)  # near answer, near label, right
    both, near_both = by_flag[..., 1].sum(axis=(2, 3)), by_flag[:, :, 1, 1, 1]
    return {
        "pixels": jnp.stack([both, of_labels.sum(axis=2), of_answers.sum(axis=2)], axis=-1),
        "boundary": jnp.stack([near_both, by_flag[:, :, :, 1].sum(axis=(2, 3)), of_answers[..., 1]], axis=-1),
        "size": jnp.full((number,), height * width, jnp.int32),
    }


def _histogram(
    values: Int[Array, "n h w"], flags: Int[Array, "n h w"], classes: int, kinds: int
) -> Int[Array, "n classes kinds"]:
    """Returns how often each value below `classes` has each flag below `kinds`."""
    number = values.shape[0]
    image = jnp.arange(number, dtype=jnp.int32).reshape(number, 1, 1)
    bins = (image * (classes + 1) + values) * kinds + flags.astype(jnp.int32)
    totals = jnp.zeros(number * (classes + 1) * kinds, jnp.int32).at[bins.reshape(-1)].add(1)
    return totals.reshape(number, classes + 1, kinds)[:, :classes]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def totals(statistics: Any, weights: np.ndarray, name: str) -> np.ndarray:
    """Returns Σ w_i·counts_i, float64 (…, classes, 3), of weights (…, n)."""
    rows = np.asarray(statistics[name], np.float64)
    flat = np.asarray(weights, np.float64) @ rows.reshape(len(rows), -1)
    return flat.reshape(*flat.shape[:-1], *rows.shape[1:])


def _mean_of_known(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns the mean over the classes with a denominator above 0; NaN if there is none."""
    known = denominator > 0
    ratios = np.where(known, numerator / np.where(known, denominator, 1.0), 0.0)
    number = known.sum(axis=-1)
    return np.where(number > 0, ratios.sum(axis=-1) / np.maximum(number, 1), np.nan)


def class_ious(statistics: Any, weights: np.ndarray, name: str = "pixels") -> np.ndarray:
    """Returns I / (G + P − I) of each class, (…, classes); NaN of classes that are nowhere.

    Args:
      statistics: of `counts`.
      weights: (…, n).
      name: "pixels", or "boundary" for the boundary IoU.
    """
    both, labels, answers = np.moveaxis(totals(statistics, weights, name), -1, 0)
    union = labels + answers - both
    return np.where(union > 0, both / np.where(union > 0, union, 1.0), np.nan)


def mean_iou(statistics: Any, weights: np.ndarray, name: str = "pixels") -> np.ndarray:
    """Returns mean over c of I_c / (G_c + P_c − I_c).

    Classes that are neither in labels nor in answers are left out. A class that is in the answers
    only counts as 0.
    """
    both, labels, answers = np.moveaxis(totals(statistics, weights, name), -1, 0)
    return _mean_of_known(both, labels + answers - both)


def boundary_iou(statistics: Any, weights: np.ndarray) -> np.ndarray:
    """Returns `mean_iou` of the boundary regions (Cheng et al. 2021, here for classes of a map)."""
    return mean_iou(statistics, weights, "boundary")


def mean_accuracy(statistics: Any, weights: np.ndarray) -> np.ndarray:
    """Returns mean over c of I_c / G_c, of the classes that are in the labels."""
    both, labels, _ = np.moveaxis(totals(statistics, weights, "pixels"), -1, 0)
    return _mean_of_known(both, labels)


def pixel_accuracy(statistics: Any, weights: np.ndarray) -> np.ndarray:
    """Returns Σ_c I_c / Σ_c G_c."""
    per_image = np.asarray(statistics["pixels"], np.float64)[..., :2].sum(axis=1)
    both, labels = np.moveaxis(np.asarray(weights, np.float64) @ per_image, -1, 0)
    return np.where(labels > 0, both / np.where(labels > 0, labels, 1.0), np.nan)


def ignored_share(statistics: Any) -> float:
    """Returns the fraction of pixels without a label, of all images."""
    labeled = float(np.asarray(statistics["pixels"], np.float64)[..., 1].sum())
    return 1.0 - labeled / max(float(np.asarray(statistics["size"], np.float64).sum()), 1.0)


METRICS: Mapping[str, Metric] = {
    "mIoU": mean_iou,
    "mAcc": mean_accuracy,
    "aAcc": pixel_accuracy,
    "B-IoU": boundary_iou,
}
