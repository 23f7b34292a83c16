"""`Column`: the form of a label column, so that it can follow its image and be padded."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from drep_jax.data.geometry import Transform
from drep_jax.errors import ConfigError, DataError

RESERVED = ("image", "index", "mask", "size", "original_size", "transform", "objects_valid", "label2", "share")
"""Columns of a batch that the data side makes; no label has such a name."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One label column that a task declares. Any other column holds one int32 an image.

    Attributes:
      name: in items and batches.
      dtype: of the values.
      shape: of one value: without (height, width) for a map, without the number of objects for a
        ragged column.
      ragged: whether an image has any number of values, one for each of its objects. All ragged
        columns of an image speak of the same objects in the same order.
      geometry: how it follows the image: "mask" for a map of the image's pixels, moved by nearest
        neighbor; "boxes" for x0, y0, x1, y1 in pixels, ragged, of shape (4,); None where it does
        not.
      fill: value of padding, of maps and ragged columns.
      original: whether a map keeps the size of the stored image in evaluation in buckets, so that
        predictions are taken back to that size. In training it follows the image.
      capacity: number of objects that a ragged column is padded to in every batch; an image with
        more is refused. 0 takes the largest number in the batch, rounded up to a power of two: few
        shapes, but for one host only, since other hosts see other images.

    Raises:
      ConfigError: for a declaration that contradicts itself.

    >>> Column("label", np.uint8, geometry="mask", fill=255).value_shape((4, 6), 0)
    (4, 6)
    >>> Column("boxes", np.float32, (4,), ragged=True, geometry="boxes").value_shape((4, 6), 3)
    (3, 4)
    """

    name: str
    dtype: Any = np.int32
    shape: tuple[int, ...] = ()
    ragged: bool = False
    geometry: Literal["mask", "boxes"] | None = None
    fill: float = 0
    capacity: int = 0
    original: bool = False

    def __post_init__(self) -> None:
        if self.geometry not in (None, "mask", "boxes"):
            raise ConfigError(f'Column "{self.name}": the geometry is "mask", "boxes" or None; got {self.geometry!r}.')
        if self.geometry == "boxes" and not (self.ragged and self.shape == (4,)):
            raise ConfigError(f'Column "{self.name}": boxes are ragged and of shape (4,): x0, y0, x1, y1.')
        if self.geometry == "mask" and self.ragged:
            raise ConfigError(f'Column "{self.name}": a map of the pixels is not ragged.')
        if self.original and self.geometry != "mask":
            raise ConfigError(f'Column "{self.name}": only a map of the pixels has a size of its own (original).')
        if self.capacity < 0 or (self.capacity and not self.ragged):
            raise ConfigError(f'Column "{self.name}": the capacity is at least 0, and for ragged columns only.')

    def value_shape(self, size: tuple[int, int], objects: int) -> tuple[int, ...]:
        """Returns the shape of the values of an image of this size with that many objects."""
        if self.ragged:
            return (objects, *self.shape)
        return (*size, *self.shape) if self.geometry == "mask" else self.shape

    def value(self, value: Any, size: tuple[int, int], where: str, dtype: Any = None) -> np.ndarray:
        """Returns the values of one image as an array of the declared type, or of `dtype`.

        Raises:
          DataError: for values of another shape, naming the image.
        """
        array = np.asarray(value)
        objects = len(array) if self.ragged and array.ndim else 0
        if self.ragged and not array.size:
            array = array.reshape(0, *self.shape)
        if array.shape != self.value_shape(size, objects):
            if self.geometry == "mask":
                raise DataError(
                    f'{where}: the map "{self.name}" is an array of {array.shape}, and its image has {size[0]} x {size[1]} '
                    "pixels (height x width). A map has one value for every pixel of its image, upright."
                )
            expected = ", ".join(["objects"] * self.ragged + list(map(str, self.value_shape(size, 0)[self.ragged :])))
            raise DataError(
                f'{where}: the column "{self.name}" has the shape {array.shape}; expected ({expected}), as it is declared. A '
                "column that no task declares holds one number an image."
            )
        wanted = np.dtype(self.dtype if dtype is None else dtype)
        try:
            return array.astype(wanted)
        except (TypeError, ValueError) as error:
            raise DataError(f'{where}: the column "{self.name}" holds {array.dtype}; expected {wanted}.') from error


Columns = Sequence[Column]


def by_name(columns: Columns) -> dict[str, Column]:
    """Returns declarations by name.

    Raises:
      ConfigError: for a reserved name or one that is there twice, and for ragged columns with
        different capacities.
    """
    reserved = next((column.name for column in columns if column.name in RESERVED), None)
    if reserved:
        raise ConfigError(
            f'A label column cannot be called "{reserved}": batches have a column of that name. Reserved: '
            f"{', '.join(RESERVED)}."
        )
    table = {column.name: column for column in columns}
    if len(table) < len(columns):
        raise ConfigError(f"Columns are declared once each; got {', '.join(column.name for column in columns)}.")
    capacities = {column.name: column.capacity for column in columns if column.ragged}
    if len(set(capacities.values())) > 1:
        raise ConfigError(f"Ragged columns speak of the same objects and have one capacity; got {capacities}.")
    return table


def geometric(columns: Columns) -> tuple[Column, ...]:
    """Returns the columns that follow the image's geometry."""
    return tuple(column for column in columns if column.geometry)


def follow(
    item: Mapping[str, Any], transform: Transform, columns: Columns, where: str, *, original: bool = False
) -> dict[str, Any]:
    """Returns an item whose labels have followed its image through a transform.

    The image itself is left alone.

    Args:
      item: labels that fit an image of `transform.size_in`.
      transform: what is done to the image.
      columns: those that the task declares.
      where: what to call the image in messages.
      original: whether maps that are declared so stay as they are.

    Returns:
      The item. Objects whose box is empty by now are dropped from every ragged column. Boxes are
      float64, so that they are rounded once, by `collate`. "transform" is all that has been done to
      the image since it was decoded.

    Raises:
      DataError: for labels of another shape, and ragged columns that disagree about the number of
        objects.
    """
    declared = [column for column in columns if column.name in item]
    values = {
        column.name: column.value(
            item[column.name], transform.size_in, where, np.float64 if column.geometry == "boxes" else None
        )
        for column in declared
    }
    counts = {column.name: len(values[column.name]) for column in declared if column.ragged}
    if len(set(counts.values())) > 1:
        raise DataError(f"{where}: its ragged columns speak of different numbers of objects: {counts}.")
    keep = np.ones(next(iter(counts.values()), 0), bool)
    for column in declared:
        if column.geometry == "mask" and not (original and column.original):
            values[column.name] = transform.mask(values[column.name], fill=column.fill)
        elif column.geometry == "boxes":
            values[column.name], there = transform.boxes(values[column.name])
            keep = keep & there
    values |= {name: values[name][keep] for name in counts}
    done = item["transform"].then(transform) if "transform" in item else transform
    return {**item, **values, "transform": done}
