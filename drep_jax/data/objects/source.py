"""`ObjectSource`: images with the boxes of their objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drep_jax.data.columns import Column
from drep_jax.data.decode import fitted, fitted_size, stored_size
from drep_jax.data.folder import tenth
from drep_jax.data.objects.listing import Annotated, ObjectSet, cut
from drep_jax.data.objects.outlines import mask_of
from drep_jax.data.splits import SPLITS, plan
from drep_jax.data.steps import Size
from drep_jax.errors import DataError

NO_OBJECT = 255
"""Value of a map of instances where no object is."""


def object_columns(capacity: int = 0, *, masks: bool = False) -> tuple[Column, ...]:
    """Returns the label columns of images with boxes.

    Args:
      capacity: objects that every batch has room for; 0 as for `drep_jax.data.columns.Column`.
      masks: whether objects have masks.

    Returns:
      "boxes" float32 (m, 4) x0, y0, x1, y1 in pixels; "classes" int32 (m,), −1 where there is no
      object; "crowd" and "ignore" bool (m,); "area" float32 (m,) in pixels of the stored image, which
      no resize changes. With masks "instances", a map of the pixels, and "place" int32 (m,): the mask
      of an object is where the map has its place. Where objects overlap, the smallest has the pixel.
    """
    maps = (
        Column("instances", np.uint8, geometry="mask", fill=NO_OBJECT),
        Column("place", ragged=True, fill=-1, capacity=capacity),
    )
    return (
        *(maps if masks else ()),
        Column("boxes", np.float32, (4,), ragged=True, geometry="boxes", capacity=capacity),
        Column("classes", np.int32, ragged=True, fill=-1, capacity=capacity),
        Column("crowd", np.bool_, ragged=True, capacity=capacity),
        Column("ignore", np.bool_, ragged=True, capacity=capacity),
        Column("area", np.float32, ragged=True, capacity=capacity),
    )


class Instances:
    """The map of an image's objects, drawn when it is read."""

    def __init__(self, source: "ObjectSource", index: int, where: str) -> None:
        self._source, self._index, self._where = source, index, where

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the map, uint8 (height, width).

        Raises:
          DataError: for an object without an outline, and for more objects than a map has numbers.
        """
        del dtype, copy
        masks = self._source.masks(self._index)
        if masks is None:
            raise DataError(
                f"{self._where}: an object has no outline, so there is no mask to learn. Give annotations with outlines, or "
                "take a network without masks."
            )
        if len(masks) > NO_OBJECT:
            raise DataError(f"{self._where}: {len(masks)} objects; a map of masks holds {NO_OBJECT} at most.")
        drawn = np.full(masks.shape[1:], NO_OBJECT, np.uint8)
        for place in np.argsort(-masks.sum(axis=(1, 2)), kind="stable"):
            drawn[masks[place]] = place
        return drawn


class ObjectSource:
    """One split of a set of images with boxes, read on demand.

    Items have the columns of `object_columns` and "image_id".

    Attributes:
      columns: form of the labels.
      category_ids: the set's own number of each class, as in COCO's files of results.
      image_ids: the set's own number of each image, int64 (n,).
      objects: number of objects of each image that are neither crowds nor ignored, int32 (n,).
      has_areas: whether the set states areas other than those of the boxes.
      stored: the stored split that the images come from.
    """

    columns = object_columns()
    labels = None

    def __init__(
        self,
        images: Sequence[Annotated],
        listed: ObjectSet,
        *,
        name: str,
        note: str | None,
        stored: str,
        image_size: Size,
        resize: str,
    ) -> None:
        self.name, self.note, self.stored = name, note, stored
        self.class_names: tuple[str, ...] | None = listed.class_names
        self.num_classes: int | None = len(listed.class_names)
        self.category_ids = listed.category_ids
        self.image_size, self.resize = image_size, resize
        self.image_ids = np.array([image.image_id for image in images], np.int64)
        self.objects = np.array([int((~(image.crowd | image.ignore)).sum()) for image in images], np.int32)
        self._images = list(images)
        if any(image.outlines for image in images):
            self.columns = object_columns(masks=True)
        self.has_areas = any(
            not np.allclose(image.area, np.prod(image.boxes[:, 2:] - image.boxes[:, :2], axis=1), rtol=1e-3)
            for image in images
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = fitted(self.raw(index), self.image_size, self.resize, self.columns)
        return {name: value for name, value in item.items() if name != "transform"}

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item with the file or bytes of its image; its boxes fit the stored image.

        Raises:
          DataError: if the image has another size than its annotations state, or a box lies outside
            it.
        """
        image = self._images[index]
        height, width = stored_size(image.image, image.where)
        boxes = image.boxes
        if image.size is None:

            def refuse(wrong: np.ndarray, reason: str) -> None:
                if wrong.any():
                    numbers = ", ".join(f"{value:g}" for value in boxes[int(np.flatnonzero(wrong)[0])])
                    raise DataError(f"{image.where}: the box ({numbers}): {reason} Correct the annotations.")

            boxes = cut(boxes, (height, width), refuse)
        elif image.size != (height, width):
            turned = " They are of the image before its EXIF block turns it." if image.size == (width, height) else ""
            raise DataError(
                f"{image.where} is {height} x {width} pixels (height x width), but its annotations are for {image.size[0]} x "
                f"{image.size[1]}.{turned} Give the images that were annotated."
            )
        return {
            "image": image.image,
            "where": image.where,
            "boxes": boxes,
            "classes": image.classes,
            "crowd": image.crowd,
            "ignore": image.ignore,
            "area": image.area,
            "image_id": np.int32(image.image_id),
            **self._outlined(index, image),
        }

    def _outlined(self, index: int, image: Annotated) -> dict[str, Any]:
        """Returns the columns of masks, where the set has any."""
        if len(self.columns) == len(object_columns()):
            return {}
        return {"instances": Instances(self, index, image.where), "place": np.arange(len(image.boxes), dtype=np.int32)}

    def masks(self, index: int) -> np.ndarray | None:
        """Returns the masks of an image's objects in the stored image, bool (m, height, width); None if one has none.

        Raises:
          DataError: for an outline that cannot be read.
        """
        image = self._images[index]
        if len(image.outlines) < len(image.boxes) or None in image.outlines:
            return None
        size = self.original_size_of(index)
        masks = [mask_of(outline, size, f"{image.where}, object {n + 1}") for n, outline in enumerate(image.outlines)]
        return np.stack(masks) if masks else np.zeros((0, *size), bool)

    def size_of(self, index: int) -> Size:
        """Returns (height, width) of an image from its header."""
        image = self._images[index]
        return fitted_size({"image": image.image, "where": image.where}, self.image_size, self.resize)

    def original_size_of(self, index: int) -> Size:
        """Returns (height, width) of an image as it is stored."""
        return stored_size(self._images[index].image, self._images[index].where)


def split_source(listed: ObjectSet, split: str, *, name: str, image_size: Size, resize: str) -> ObjectSource:
    """Returns a split of a set of images with boxes.

    Args:
      listed: the set.
      split: train, validation or test.
      name: as the user gave it.
      image_size: (height, width) in pixels.
      resize: a way of `drep_jax.data.fits`.

    Raises:
      DataError: for a split without images.
    """
    stored = {kind: listed.splits[kind] for kind in SPLITS if listed.splits.get(kind)}
    part = plan(stored, split, listed.where)
    images = [image for image in stored[part.stored] if part.start <= tenth(Path(image.name)) < part.stop]
    if not images:
        raise DataError(
            f"None of the {len(stored[part.stored])} images of {listed.where} falls into the {split} part. Give more images, "
            f"or a split of its own."
        )
    notes = [part.note, *listed.remarks]
    bare = sum(not len(image.boxes) for image in images)
    crowds = sum(bool(len(image.boxes)) and bool((image.crowd | image.ignore).all()) for image in images)
    if bare or crowds:
        notes.append(
            f"{bare:,} of {len(images):,} images have no object, and {crowds:,} only crowds or ignored ones; they stay, and "
            "whatever is found in them counts."
        )
    note = " ".join(filter(None, notes)) or None
    return ObjectSource(images, listed, name=name, note=note, stored=part.stored, image_size=image_size, resize=resize)
