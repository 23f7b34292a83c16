"""`Source`: images with random access, and what is known of them without decoding."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from drep_jax.data.fits import VARYING


@runtime_checkable
class Source(Protocol):
    """A sequence of RGB images, of one size unless they are opened with `resize="keep"`.

    Attributes:
      name: as the user gave it, for messages and reports.
      num_classes: number of classes; None when the images are unlabeled.
      class_names: one name a class, in the order of the labels; None when there are none.
      note: what the user should know about how the images were found or split; None when there is
        nothing to say.

    Optional, for what a source can do besides:
      labels: the label of every image, int32 (n,), -1 where an image has none, known without
        decoding. By it images without a label are left out of what needs one, and counted.
      stored: the stored split that the images come from, where one may have been divided.
      in_memory: true where images need no reading or decoding; they are then read without threads.
      raw(index): the item as it is stored: "image" is bytes, a path, or a decoded array; "where" is
        what to call it; labels with geometry fit the stored image once it is upright. With it go
        `image_size`, (height, width), and `resize`, a way of `drep_jax.data.fits`. Random resized
        crops are taken of the whole stored image, and labels follow the geometry from there.
      size_of(index): (height, width) of the item's image without decoding it, where sizes differ;
        (0, 0) where it cannot be read.
      original_size_of(index): (height, width) of the image as it is stored, upright.
      columns: form of labels that are not one number an image (`drep_jax.data.columns`). A stage
        whose task does not declare them reads images without them. In `raw` such a label may be
        anything that `np.asarray` decodes.
      clusters: what images depend on each other, such as a video, int32 (n,), for intervals.
      palette: usual color of each class, (r, g, b).
      objects: number of labeled objects of each image that count, int32 (n,).
      masks(index): of labeled objects, bool (m, height, width); None where there are none.

    A source for re-identification also has `table`, the columns of its items without the images,
    int32 (n,) by name, without decoding; `protocol`, how it is evaluated; and `cameras` and
    `views`, the numbers of those in its data set.
    """

    name: str
    num_classes: int | None
    class_names: tuple[str, ...] | None
    note: str | None

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `{"image": uint8 (H, W, 3), "label": int32 scalar}`; "label" is optional.

        A label of -1 says that this image has none.
        Labels of another form are those that a task declares, see `drep_jax.data.columns`.
        """
        ...


def raw_item(source: Any, index: int) -> dict[str, Any]:
    """Returns an item as it is stored, with "where"; the fitted one if a source has no other."""
    if hasattr(source, "raw"):
        return source.raw(index)
    return {**source[index], "where": f"{source.name}, image {index}"}


def image_size_of(source: Any) -> tuple[int, int]:
    """Returns (height, width) that the images of a source are fitted to."""
    if hasattr(source, "image_size"):
        return source.image_size
    height, width = source[0]["image"].shape[:2]
    return height, width


def fit_of(source: Any) -> str:
    """Returns how stored images of a source are fitted; "keep" where they are stored fitted."""
    return getattr(source, "resize", "keep")


def size_of(source: Any, index: int) -> tuple[int, int]:
    """Returns (height, width) of an image without decoding it; (0, 0) if it cannot be read."""
    return source.size_of(index) if hasattr(source, "size_of") else image_size_of(source)


def original_size_of(source: Any, index: int) -> tuple[int, int]:
    """Returns (height, width) of an image as it is stored; (0, 0) if it cannot be read."""
    return source.original_size_of(index) if hasattr(source, "original_size_of") else size_of(source, index)


def original_sizes_of(source: Any) -> np.ndarray:
    """Returns the sizes of all images as they are stored, without decoding, int32 (n, 2)."""
    return np.array([original_size_of(source, index) for index in range(len(source))], np.int32).reshape(-1, 2)


def sizes_of(source: Any) -> np.ndarray:
    """Returns the sizes of all images as the source gives them, without decoding, int32 (n, 2)."""
    return np.array([size_of(source, index) for index in range(len(source))], np.int32).reshape(-1, 2)


def varies(source: Any) -> bool:
    """Returns whether a source was opened so that its images keep several sizes."""
    return str(getattr(source, "resize", "")).partition(":")[0] in VARYING


OF_THE_SET = ("protocol", "cameras", "views")


def pass_on(source: Any, wrapper: Any, indices: Sequence[int] | None = None) -> None:
    """Copies what is known of the images of a source without decoding to a source that wraps it.

    Args:
      source: the images.
      wrapper: the source that wraps it.
      indices: which images the wrapper has; None for all.
    """
    chosen = slice(None) if indices is None else np.array(indices, np.int64)
    wrapper.stored = getattr(source, "stored", None)
    wrapper.columns, wrapper.palette = getattr(source, "columns", ()), getattr(source, "palette", ())
    clusters = getattr(source, "clusters", None)
    wrapper.clusters = None if clusters is None else clusters[chosen]
    objects = getattr(source, "objects", None)
    wrapper.objects = None if objects is None else objects[chosen]
    labels = getattr(source, "labels", None)
    wrapper.labels = None if labels is None else labels[chosen]
    if not hasattr(source, "table"):
        return
    wrapper.table = {name: values[chosen] for name, values in source.table.items()}
    for name in OF_THE_SET:
        setattr(wrapper, name, getattr(source, name))


class Subset:
    """Some images of a source.

    Args:
      source: the images.
      indices: which, in the order wanted.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.name, self.note = source.name, source.note
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.in_memory = getattr(source, "in_memory", False)
        self.image_size, self.resize = image_size_of(source), fit_of(source)
        self._source = source
        self._indices = [int(index) for index in indices]
        pass_on(source, self, self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._indices[index]]

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item as it is stored."""
        return raw_item(self._source, self._indices[index])

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image without decoding it."""
        return size_of(self._source, self._indices[index])

    def original_size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image as it is stored."""
        return original_size_of(self._source, self._indices[index])
