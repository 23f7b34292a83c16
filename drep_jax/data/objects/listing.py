"""What the readers of sets with boxes return: images with their objects, checked in one place.

Boxes are x0, y0, x1, y1 in pixels of the stored image, pixel j alone being the span [j, j + 1].
Stated behavior: a box may reach beyond the image by up to `SLACK` pixels, and is cut there, since
published annotations are rounded; one further out, with NaN, or with x1 < x0 or y1 < y0 is an
error that names it. Boxes of no area are left out and counted. Images without objects, or with crowds only, stay.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drep_jax.data.steps import Size
from drep_jax.errors import DataError

SLACK = 2.0
"""Pixels by which a box may reach beyond its image."""

ROUNDING = 0.01
"""Pixels by which text of a few digits is off; not counted as reaching beyond the image."""

SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Annotated:
    """An image with its objects.

    Attributes:
      image: its file, or its bytes.
      name: of the image in its set; it decides which split an undivided set gives it to.
      where: what to call it in messages.
      image_id: the set's number of it.
      boxes: float64 (m, 4).
      classes: int32 (m,), from 0.
      crowd: bool (m,), regions of many objects.
      ignore: bool (m,), neither asked for nor wrong, such as Pascal's difficult objects.
      area: float32 (m,) in pixels of the stored image, of the object's outline where it is known.
      size: (height, width) that the annotations state; None where they do not.
      outlines: COCO's outline of each object, None where it has none; () if nothing has.
    """

    image: Any
    name: str
    where: str
    image_id: int
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    area: np.ndarray
    size: Size | None
    outlines: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class ObjectSet:
    """A data set.

    Attributes:
      where: its place, for messages.
      splits: images of each stored split that there is: train, validation, test.
      class_names: in the order of the classes.
      category_ids: the set's own numbers of the classes.
      remarks: sentences for the user.
    """

    where: str
    splits: Mapping[str, Sequence[Annotated]]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    remarks: tuple[str, ...] = ()


class Counts:
    """What was changed or left out while reading, for the note."""

    def __init__(self) -> None:
        self.empty = self.cut = 0

    def remarks(self) -> tuple[str, ...]:
        """Returns sentences on it."""
        parts = []
        if self.empty:
            parts.append(f"{self.empty:,} boxes of no area are left out.")
        if self.cut:
            parts.append(f"{self.cut:,} boxes that reach beyond their image by up to {SLACK:g} pixels are cut there.")
        return tuple(parts)


def annotated(
    image: Any,
    name: str,
    where: str,
    image_id: int,
    *,
    boxes: Any,
    classes: Any,
    counts: Counts,
    size: Size | None,
    crowd: Any = None,
    ignore: Any = None,
    area: Any = None,
    labels: Sequence[str] = (),
    outlines: Sequence[Any] = (),
) -> Annotated:
    """Returns an image with its objects, after all checks of their boxes.

    Args:
      image, name, where, image_id: as of `Annotated`.
      boxes: (m, 4) x0, y0, x1, y1.
      classes: (m,) from 0.
      counts: adds what is cut and left out.
      size: (height, width) of the image; None where only its file says it. Boxes are then checked
        when it is read.
      crowd, ignore: (m,); None for none.
      area: (m,); None, or NaN where it is not known, for that of the box.
      outlines: COCO's outlines, (m,); () if there are none.
      labels: what to call the objects in messages; by default they are counted from 1.

    Raises:
      DataError: naming the first box that cannot be, the image, and what is wrong.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    count = len(boxes)

    def refuse(wrong: np.ndarray, reason: str) -> None:
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            which = labels[first] if len(labels) else f"box {first + 1}"
            numbers = ", ".join(f"{value:g}" for value in boxes[first])
            raise DataError(
                f"{where}: {which} is ({numbers}) as x0, y0, x1, y1: {reason} {int(wrong.sum())} of the image's {count} boxes "
                "are like this. Correct the annotations."
            )

    refuse(~np.isfinite(boxes).all(axis=1), "not finite numbers.")
    refuse((boxes[:, 2:] < boxes[:, :2]).any(axis=1), "its width or height is negative.")
    if size is not None:
        boxes = cut(boxes, size, refuse, counts)
    flags = [np.zeros(count, bool) if values is None else np.asarray(values, bool) for values in (crowd, ignore)]
    own = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    areas = own if area is None else np.asarray(area, np.float64)
    areas = np.where(np.isnan(areas), own, areas)
    keep = own > 0
    counts.empty += int((~keep).sum())
    return Annotated(
        image,
        name,
        where,
        image_id,
        boxes=boxes[keep],
        classes=np.asarray(classes, np.int32).reshape(-1)[keep],
        crowd=flags[0][keep],
        ignore=flags[1][keep],
        area=areas.astype(np.float32)[keep],
        size=size,
        outlines=tuple(outline for outline, there in zip(outlines, keep, strict=False) if there),
    )


def cut(boxes: np.ndarray, size: Size, refuse: Any, counts: Counts | None = None) -> np.ndarray:
    """Returns boxes cut at the borders of their image; those too far out are refused."""
    limit = np.array([size[1], size[0]] * 2, np.float64)
    beyond = ((boxes < -SLACK) | (boxes > limit + SLACK)).any(axis=1)
    refuse(beyond, f"it lies outside the image of {size[0]} x {size[1]} pixels (height x width).")
    inside = np.clip(boxes, 0, limit)
    if counts is not None:
        counts.cut += int((np.abs(inside - boxes) > ROUNDING).any(axis=1).sum())
    return inside


def no_duplicates(values: Sequence[Any], what: str, where: str) -> None:
    """Refuses a value that is there twice.

    Raises:
      DataError: naming it.
    """
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise DataError(f"{where}: the {what} {value} is there twice. Each needs its own.")
        seen.add(value)


def present(files: Sequence[Path], where: str, folder: Path) -> None:
    """Refuses annotations whose images are missing.

    Raises:
      DataError: with their number and the first ones.
    """
    missing = [file for file in files if not file.is_file()]
    if missing:
        listed = ", ".join(file.name for file in missing[:SHOWN])
        more = ", …" if len(missing) > SHOWN else ""
        all_of = "Is it the file of another split? " if len(missing) == len(files) else ""
        raise DataError(
            f"{where}: {len(missing):,} of its {len(files):,} images are not in {folder} ({listed}{more}). {all_of}"
            "Complete the folder, or name the one that has them."
        )


def class_range(classes: Sequence[int], names: Sequence[str], where: str) -> None:
    """Refuses classes beyond the names.

    Raises:
      DataError: naming the first.
    """
    for value in classes:
        if not 0 <= value < len(names):
            raise DataError(f"{where}: the class {value} is none of the {len(names)} (0 to {len(names) - 1}).")
