"""What a source of images is."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Source(Protocol):
    """A sequence of equally large RGB images.

    Attributes:
      name: what the user asked for, used in messages and reports.
      num_classes: the number of classes; None when the images are unlabelled.
      class_names: one name a class, in the order of the labels; None when there are none.
      note: what the user should know about how the images were found or split; None when there is nothing to say.

    A source whose images need no reading or decoding may also have a true `in_memory`: it is then read without threads.
    One whose images are files or encoded may have `raw(index)`, which returns an image as it is stored (bytes, a path, or a
    decoded array) with "where", what to call it, and "label", and `image_size`: random resized crops are then taken of the
    whole image, not of what was fitted to the size.

    One for re-identification also has `table`, which holds the columns of its items but the images, int32 (n,) by name, without
    decoding; `protocol`, how it is evaluated; and `cameras` and `views`, how many its data set has.
    """

    name: str
    num_classes: int | None
    class_names: tuple[str, ...] | None
    note: str | None

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `{"image": uint8 (H, W, 3), "label": int32 scalar}`, without "label" when unlabelled."""
        ...


def raw_item(source: Any, index: int) -> dict[str, Any]:
    """Returns an image as it is stored, with "where" and "label"; of sources that fit their images, the fitted one."""
    if hasattr(source, "raw"):
        return source.raw(index)
    return {**source[index], "where": f"{source.name}, image {index}"}


def image_size_of(source: Any) -> tuple[int, int]:
    """Returns (height, width) of the images that a source gives."""
    if hasattr(source, "image_size"):
        return source.image_size
    height, width = source[0]["image"].shape[:2]
    return height, width


OF_THE_SET = ("protocol", "cameras", "views")


def pass_on(source: Any, wrapper: Any, indices: Sequence[int] | None = None) -> None:
    """Gives a wrapper of a source for re-identification what such a source has besides images.

    Args:
      source: the images; of other sources nothing is passed on.
      wrapper: what wraps them.
      indices: which of them, None for all.
    """
    if not hasattr(source, "table"):
        return
    chosen = slice(None) if indices is None else np.array(indices, np.int64)
    wrapper.table = {name: values[chosen] for name, values in source.table.items()}
    for name in OF_THE_SET:
        setattr(wrapper, name, getattr(source, name))


class Subset:
    """Some images of a source.

    Args:
      source: the images.
      indices: their numbers, in the order wanted.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.name, self.note = source.name, source.note
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.in_memory = getattr(source, "in_memory", False)
        self.image_size = image_size_of(source)
        self._source = source
        self._indices = [int(index) for index in indices]
        pass_on(source, self, self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._indices[index]]

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an image as it is stored."""
        return raw_item(self._source, self._indices[index])
