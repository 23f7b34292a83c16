"""Statistics of a whole set from flat lists of detections and objects, in float64 on the host.

For files of detections, for other people's numbers, and for masks. Objects of one class in one
image are a unit. The units are visited side by side: the first detection of each, then the second …
"""

import dataclasses

import numpy as np

from drep_jax.errors import DataError
from drep_jax.metrics.detection.overlaps import box_areas, box_overlaps, mask_overlaps
from drep_jax.metrics.detection.statistics import (
    AREAS,
    MOST,
    THRESHOLDS,
    Statistics,
    bits_of,
    outside,
    take,
    without_match,
)


@dataclasses.dataclass(frozen=True)
class Detected:
    """Detections of a set of images.

    Attributes:
      image: (n,) index of the image.
      boxes: (n, 4) x0, y0, x1, y1 in pixels of the original image.
      classes: (n,) from 0.
      scores: (n,).
      masks: one bool (height, width) of its image each, for AP of masks; None for boxes.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    masks: list[np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Truths:
    """Annotated objects of a set of images.

    Attributes:
      image, boxes, classes: as of `Detected`.
      crowd: bool (m,), regions of many objects; None for none.
      areas: (m,) in pixels; COCO's are those of the segmentation, for boxes, too. None for those of
        the boxes, or the masks.
      ignore: bool (m,), objects that are neither asked for nor wrong, such as Pascal's difficult
        ones; None for none.
      masks: as of `Detected`.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray | None = None
    areas: np.ndarray | None = None
    ignore: np.ndarray | None = None
    masks: list[np.ndarray] | None = None


def statistics_of_lists(detected: Detected, truths: Truths, *, images: int, num_classes: int) -> Statistics:
    """Returns the statistics of every image, see `drep_jax.metrics.detection.statistics`.

    Args:
      detected: the detections. Of a class in an image the best `MOST` count.
      truths: the objects.
      images: number of images, with or without objects.
      num_classes: C.

    Raises:
      DataError: for images or classes beyond these numbers, NaN, lists of different lengths, and
        masks on one side only.
    """
    _check(detected, "detection", images, num_classes)
    _check(truths, "object", images, num_classes)
    if (detected.masks is None) != (truths.masks is None):
        raise DataError("AP of masks needs a mask for every detection and for every object; one of them has none.")
    unit = detected.image.astype(np.int64) * num_classes + detected.classes
    order = np.lexsort((-detected.scores, unit))
    rank = np.empty(len(unit), np.int64)
    rank[order] = np.arange(len(unit)) - np.searchsorted(unit[order], unit[order])
    crowd = _flags(truths.crowd, len(truths.image))
    truth_areas = _areas(truths) if truths.areas is None else np.asarray(truths.areas, np.float64)
    ignored = (crowd | _flags(truths.ignore, len(truths.image)))[:, None] | outside(truth_areas)
    matched, lost = _matched(detected, truths, unit, rank, crowd, ignored, num_classes)
    beyond = outside(_areas(detected))
    counts = np.zeros((images, num_classes, len(AREAS)), np.int32)
    np.add.at(counts, (truths.image, truths.classes), (~ignored).astype(np.int32))
    kept = np.flatnonzero(rank < MOST)
    kept = kept[np.lexsort((-detected.scores[kept], detected.image[kept]))]
    image = detected.image[kept]
    place = np.arange(len(kept)) - np.searchsorted(image, image)
    width = int(place.max(initial=-1)) + 1

    def rows(values: np.ndarray, fill: float) -> np.ndarray:
        out = np.full((images, width, *values.shape[1:]), fill, values.dtype)
        out[image, place] = values[kept]
        return out

    return {
        "scores": rows(np.asarray(detected.scores), 0),
        "classes": rows(detected.classes.astype(np.int32), -1),
        "matched": rows(matched, 0),
        "ignored": rows(without_match(matched, lost, beyond), 0),
        "truths": counts,
    }


def _matched(
    detected: Detected,
    truths: Truths,
    unit: np.ndarray,
    rank: np.ndarray,
    crowd: np.ndarray,
    ignored: np.ndarray,
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bits of what takes an object that counts, and of what takes an ignored one, uint16 (n, 4)."""
    matched = np.zeros((len(unit), len(AREAS)), np.uint16)
    lost = np.zeros_like(matched)
    overlaps = _MaskOverlaps(detected, truths, crowd) if detected.masks is not None else None
    truth_unit = truths.image.astype(np.int64) * num_classes + truths.classes
    by_unit = np.argsort(truth_unit, kind="stable")
    keys, first, sizes = np.unique(truth_unit[by_unit], return_index=True, return_counts=True)
    order = np.lexsort((rank, unit))
    order = order[(rank[order] < MOST) & np.isin(unit[order], keys)]
    with_both, start, counts = np.unique(unit[order], return_index=True, return_counts=True)
    sought = np.searchsorted(keys, with_both)
    first, sizes = first[sought], sizes[sought]
    room = 1 << np.ceil(np.log2(np.maximum(sizes, 1))).astype(int)
    for width in np.unique(room):
        # Of the units with about as many objects, those with most detections first: the ones still at work are a prefix.
        chosen = np.flatnonzero(room == width)
        chosen = chosen[np.argsort(-counts[chosen], kind="stable")]
        there = np.arange(width) < sizes[chosen][:, None]
        places = by_unit[np.where(there, first[chosen][:, None] + np.arange(width), 0)]
        is_crowd, is_ignored = crowd[places] & there, ignored[places].transpose(0, 2, 1)
        taken = np.zeros((len(chosen), len(AREAS), len(THRESHOLDS), width), bool)
        for number in range(counts[chosen[0]]):
            active = int(np.searchsorted(-counts[chosen], -number, side="left"))
            mine = order[start[chosen[:active]] + number]
            part = places[:active]
            if overlaps is not None:
                overlap = overlaps(mine, part)
            else:
                overlap = box_overlaps(detected.boxes[mine][:, None], truths.boxes[part], is_crowd[:active])[:, 0]
            near = there[:active] & (overlap >= THRESHOLDS[0])
            taken[:active], hit, miss = take(overlap, near, is_crowd[:active], is_ignored[:active], taken[:active], np)
            matched[mine], lost[mine] = bits_of(hit), bits_of(miss)
    return matched, lost


class _MaskOverlaps:
    """Overlaps of detections with objects of the same image, all computed at once, image by image."""

    def __init__(self, detected: Detected, truths: Truths, crowd: np.ndarray) -> None:
        self._row, self._column = np.zeros(len(detected.image), int), np.zeros(len(truths.image), int)
        self._start = np.zeros(len(detected.image), int)
        parts, end = [np.zeros(1)], 1
        masks, truth_masks = detected.masks or [], truths.masks or []
        for image in np.intersect1d(detected.image, truths.image):
            mine, objects = np.flatnonzero(detected.image == image), np.flatnonzero(truths.image == image)
            own = np.stack([masks[place] for place in mine])
            of_objects = np.stack([truth_masks[place] for place in objects])
            overlap = mask_overlaps(own, of_objects, crowd[objects])
            self._row[mine] = np.arange(len(mine)) * len(objects)
            self._column[objects], self._start[mine] = np.arange(len(objects)), end
            parts.append(overlap.reshape(-1))
            end += overlap.size
        self._flat = np.concatenate(parts)

    def __call__(self, mine: np.ndarray, objects: np.ndarray) -> np.ndarray:
        """Returns the overlaps of detections (u,) with objects (u, m)."""
        place = (self._start + self._row)[mine][:, None] + self._column[objects]
        return self._flat[np.minimum(place, len(self._flat) - 1)]


def _areas(side: Detected | Truths) -> np.ndarray:
    if side.masks is not None:
        return np.array([mask.sum() for mask in side.masks], np.float64)
    return box_areas(np.asarray(side.boxes, np.float64))


def _flags(values: np.ndarray | None, count: int) -> np.ndarray:
    return np.zeros(count, bool) if values is None else np.asarray(values, bool)


def _check(side: Detected | Truths, what: str, images: int, num_classes: int) -> None:
    count = len(side.image)
    lengths = {
        field.name: len(getattr(side, field.name))
        for field in dataclasses.fields(side)
        if getattr(side, field.name) is not None
    }
    if len(set(lengths.values())) > 1 or side.boxes.shape != (count, 4):
        raise DataError(f"Expected one entry of each list for every {what}; got {lengths}, boxes {side.boxes.shape}.")
    for name, values, limit in (("image", side.image, images), ("class", side.classes, num_classes)):
        wrong = np.flatnonzero((values < 0) | (values >= limit))
        if len(wrong):
            raise DataError(
                f"The {what} {wrong[0]} has the {name} {values[wrong[0]]}; expected 0 to {limit - 1}. Are numbers of COCO's "
                "categories (1 to 90) meant to be classes (0 to 79)?"
            )
    scores = getattr(side, "scores", np.zeros(0))
    if np.isnan(side.boxes).any() or np.isnan(scores).any():
        raise DataError(f"A {what} has a coordinate or score of NaN; leave it out.")
