"""Which detections of an image match an annotated object, at ten IoUs and in four ranges of area.

Detections are visited by falling score. Each takes the free object of its class with the largest
IoU, if that reaches the threshold; of equal ones the later. Objects that count are preferred to
ignored ones, and a crowd may be taken any number of times. A detection counts for nothing if what
it took is ignored, or if it took nothing and its own area is outside the range
(https://github.com/ppwwyyxx/cocoapi, cocoeval.py). Objects are ignored that are crowds, are marked so,
or have an area outside the range; both ends belong to it.

The statistics of an image are

    scores   (k,)             of its detections
    classes  (k,) int32       −1 where there is none
    matched  (k, 4) uint16    bit i: takes an object that counts, at the i-th IoU; one number a range
    ignored  (k, 4) uint16    bit i: counts for nothing
    truths   (classes, 4)     int32, the objects that count, by class and range

so they are of one shape for all images, and AP is a function of them and of the images' weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from drep_jax.metrics.detection.overlaps import box_areas, box_overlaps

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoUs from which a detection matches."""

AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Ranges of an object's area in pixels of the original image."""

BITS = 1 << np.arange(len(THRESHOLDS))
MOST = 100
"""Detections of a class in an image that count."""

Statistics = dict[str, Any]


def take(overlap: Any, near: Any, crowd: Any, ignored: Any, taken: Any, xp: Any) -> tuple[Any, Any, Any]:
    """Returns what one detection of each unit takes.

    A unit is whatever shares objects: an image, or a class of it.

    Args:
      overlap: of the detection with the unit's objects, (u, m).
      near: which objects are of its class and exist, bool (u, m).
      crowd: bool (u, m).
      ignored: by range of area, bool (u, 4, m).
      taken: by range and threshold, bool (u, 4, 10, m).
      xp: `numpy` or `jax.numpy`.

    Returns:
      (taken from now on, whether it takes an object that counts (u, 4, 10), whether it takes an
      ignored one (u, 4, 10)).
    """
    objects = overlap.shape[-1]
    limits = xp.asarray(np.minimum(THRESHOLDS, 1 - 1e-10), overlap.dtype)[None, :, None]
    reached = (overlap[:, None, :] >= limits) & near[:, None, :]
    free = reached[:, None] & (~taken | crowd[:, None, None, :])
    real = free & ~ignored[:, :, None, :]
    pool = xp.where(real.any(axis=-1, keepdims=True), real, free)
    value = xp.where(pool, overlap[:, None, None, :], -1)
    last_best = objects - 1 - xp.argmax(value[..., ::-1], axis=-1)
    picked = pool & (xp.arange(objects)[None, None, None] == last_best[..., None])
    of_ignored = (picked & ignored[:, :, None, :]).any(axis=-1)
    return taken | picked, picked.any(axis=-1) & ~of_ignored, of_ignored


def outside(areas: Any, xp: Any = np) -> Any:
    """Returns which areas (…) lie outside each range, bool (…, 4)."""
    low, high = (xp.asarray([ends[end] for ends in AREAS.values()], areas.dtype) for end in (0, 1))
    low, high = (ends.reshape((1,) * areas.ndim + (-1,)) for ends in (low, high))
    return (areas[..., None] < low) | (areas[..., None] > high)


def bits_of(flags: Any, xp: Any = np) -> Any:
    """Returns flags of the ten thresholds (…, 10) as uint16 (…)."""
    return xp.sum(flags * xp.asarray(BITS, np.int32).reshape((1,) * (flags.ndim - 1) + (-1,)), axis=-1).astype(
        np.uint16
    )


def image_statistics(
    boxes: Any,
    scores: Any,
    classes: Any,
    valid: Any,
    *,
    truth_boxes: Any,
    truth_classes: Any,
    truth_valid: Any,
    num_classes: int,
    crowd: Any = None,
    ignore: Any = None,
    areas: Any = None,
    overlaps: Any = None,
    detected_areas: Any = None,
) -> Statistics:
    """Returns the statistics of a batch of images, inside a compiled program.

    IoUs are in the boxes' type: in float32 one that is within rounding of a threshold may fall on
    its other side; `drep_jax.metrics.detection.lists` computes in float64.

    Args:
      boxes, scores, classes, valid: detections, (n, k, 4), (n, k), (n, k), (n, k). Of a class in an
        image the best `MOST` count.
      truth_boxes, truth_classes, truth_valid: annotated objects, (n, m, 4), (n, m), (n, m). Classes
        that are not of 0 … num_classes − 1 match nothing and count for nothing.
      num_classes: C.
      crowd, ignore: bool (n, m); None for none.
      areas: (n, m) in pixels of the original image; None for those of the boxes.
      overlaps: (n, k, m) instead of the boxes' IoUs, for masks.
      detected_areas: (n, k) instead of the boxes' areas, for masks.
    """
    count, objects = truth_valid.shape
    none = jnp.zeros((count, objects), bool)
    crowd = none if crowd is None else crowd.astype(bool) & truth_valid
    ignore = none if ignore is None else ignore.astype(bool)
    areas = box_areas(truth_boxes) if areas is None else areas
    detected_areas = box_areas(boxes) if detected_areas is None else detected_areas
    truth_valid = truth_valid & (truth_classes >= 0) & (truth_classes < num_classes)
    valid = valid & ~jnp.isnan(scores) & (classes >= 0) & (classes < num_classes)
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), axis=1, stable=True)

    def ordered(values: Any) -> Any:
        return jnp.take_along_axis(values, order.reshape(order.shape + (1,) * (values.ndim - 2)), axis=1)

    overlaps = box_overlaps(boxes, truth_boxes, crowd, jnp) if overlaps is None else overlaps
    boxes, scores, classes, valid = map(ordered, (boxes, scores, classes, valid))
    detected_areas, overlaps = ordered(detected_areas), ordered(overlaps)
    same = (classes[:, :, None] == classes[:, None, :]) & valid[:, None, :]
    place = jnp.arange(classes.shape[1])
    earlier = place[None, None, :] < place[None, :, None]
    valid &= jnp.sum(same & earlier, axis=2) < MOST
    ignored = crowd[:, None, :] | ignore[:, None, :] | outside(areas, jnp).transpose(0, 2, 1)
    near = (classes[:, :, None] == truth_classes[:, None, :]) & truth_valid[:, None, :] & valid[:, :, None]

    def step(taken: Any, row: tuple[Any, Any]) -> tuple[Any, tuple[Any, Any]]:
        taken, hit, lost = take(row[0], row[1], crowd, ignored, taken, jnp)
        return taken, (bits_of(hit, jnp), bits_of(lost, jnp))

    if objects:
        start = jnp.zeros((count, len(AREAS), len(THRESHOLDS), objects), bool)
        rows = (overlaps.transpose(1, 0, 2), near.transpose(1, 0, 2))
        matched, lost = (bits.transpose(1, 0, 2) for bits in lax.scan(step, start, rows)[1])
    else:
        matched = lost = jnp.zeros((*valid.shape, len(AREAS)), jnp.uint16)
    counts = jax.nn.one_hot(jnp.where(truth_valid, truth_classes, -1), num_classes, dtype=jnp.int32)
    return {
        "scores": jnp.where(valid, scores, 0),
        "classes": jnp.where(valid, classes, -1).astype(jnp.int32),
        "matched": matched,
        "ignored": jnp.where(
            valid[:, :, None], without_match(matched, lost, outside(detected_areas, jnp), jnp), jnp.uint16(0)
        ),
        "truths": jnp.einsum("nmc,nam->nca", counts, (~ignored).astype(jnp.int32)),
    }


def without_match(matched: Any, lost: Any, beyond: Any, xp: Any = np) -> Any:
    """Returns the bits of what counts for nothing: what took an ignored object, or nothing while its own area is outside."""
    everything = int(BITS.sum())
    nothing = xp.where(beyond, everything, 0).astype(np.uint16) & ~matched
    return lost | (nothing & ~lost)
