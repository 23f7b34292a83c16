"""Batches of images of given numbers: reading, random resized crops, and what stands in for images that cannot be read."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from drep_jax.data.augment import Augmentation
from drep_jax.data.augment.flip_crop import crop_box, crop_numbers
from drep_jax.data.decode import as_rgb, decode_box, resized_box
from drep_jax.data.source import Source, image_size_of, raw_item
from drep_jax.data.unreadable import Tolerant
from drep_jax.errors import DataError, UnreadableError
from drep_jax.typing import Batch

Item = dict[str, Any]


def read(source: Source, indices: np.ndarray) -> Batch:
    """Returns images, with the next readable one in the place of any that cannot be read.

    Args:
      source: the images.
      indices: their numbers, (n,).

    Returns:
      `{"image": uint8 (n, H, W, C), "label": int32 (n,), "index": int32 (n,)}`; "index" is that of the image that was
      read, and "label" is left out when the source is unlabelled.

    Raises:
      DataError: for an image that cannot be read, unless the source tolerates it.
    """
    return _stacked(source, [_instead(source, int(index), source.__getitem__) for index in indices])


def read_or_mask(source: Source, indices: np.ndarray) -> Batch:
    """Returns images as `read` does, with "mask", bool (n,): false, with zeros as image, where one cannot be read."""
    found = [_tried(source, int(index), source.__getitem__) for index in indices]
    mask = np.array([item is not None for item in found])
    if mask.all():
        return {**_stacked(source, [(i, item) for i, item in zip(indices, found, strict=True) if item]), "mask": mask}
    good = _instead(source, int(indices[0]), source.__getitem__)[1]  # for the form of what is masked out
    empty = {name: np.zeros_like(value) for name, value in good.items()}
    pairs = [(i, item or empty) for i, item in zip(indices, found, strict=True)]
    return {**_stacked(source, pairs), "mask": mask}


def read_cropped(
    source: Source, indices: np.ndarray, augmentation: Augmentation, *, seed: int, first_position: int
) -> Batch:
    """Returns images as `read` does, each a random resized crop as its place in the stream says."""
    scale, ratio = augmentation.crop_scale, augmentation.crop_ratio
    size = image_size_of(source)

    def cropped(numbers: np.ndarray, index: int) -> Item:
        def choose(height: int, width: int) -> Any:
            return crop_box(numbers, height, width, (scale[0], scale[1]), (ratio[0], ratio[1]))

        raw = raw_item(source, index)
        stored, where = raw.pop("image"), raw.pop("where")
        if isinstance(stored, np.ndarray):
            return {**raw, "image": resized_box(as_rgb(stored, where), choose, size)}
        return {**raw, "image": decode_box(stored, where, choose, size)}

    draws = crop_numbers(seed, first_position, len(indices))
    pairs = zip(indices, draws, strict=True)
    return _stacked(source, [_instead(source, int(i), functools.partial(cropped, numbers)) for i, numbers in pairs])


def _instead(source: Source, index: int, load: Callable[[int], Item]) -> tuple[int, Item]:
    """Returns the image of this number, or the next one that can be read, and its number."""
    for step in range(len(source)):
        place = (index + step) % len(source)
        item = _tried(source, place, load)
        if item is not None:
            return place, item
    raise DataError(f"None of the {len(source)} images of {source.name} can be read.")


def _tried(source: Source, index: int, load: Callable[[int], Item]) -> Item | None:
    """Returns an image, or None where it cannot be read and the source tolerates that."""
    if not isinstance(source, Tolerant):
        return load(index)
    if source.known(index):
        return None
    try:
        return load(index)
    except UnreadableError as error:
        source.skip(index, error)
        return None


def _stacked(source: Source, pairs: list[tuple[int, Item]]) -> Batch:
    items = [item for _, item in pairs]
    shapes = {item["image"].shape for item in items}
    if len(shapes) > 1:
        raise DataError(f"{source.name} gives images of several sizes: {sorted(shapes)}.")
    batch = {name: np.array([item[name] for item in items], np.int32) for name in items[0] if name != "image"}
    return {
        **batch,
        "image": np.stack([item["image"] for item in items]),
        "index": np.array([i for i, _ in pairs], np.int32),
    }
