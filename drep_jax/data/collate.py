"""Batches: reading images by index, and collating them with labels and padding."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.data.augment import Augmentation
from drep_jax.data.columns import Column, Columns, by_name, follow, geometric
from drep_jax.data.cropping import random_crops, raw_with
from drep_jax.data.decode import fitted
from drep_jax.data.fits import pads
from drep_jax.data.geometry import ROW, Transform
from drep_jax.data.source import Source, fit_of, image_size_of
from drep_jax.data.steps import Size
from drep_jax.data.unreadable import Tolerant
from drep_jax.errors import DataError, UnreadableError
from drep_jax.typing import Batch

Item = dict[str, Any]
Load = Callable[[int], Item]


def collate(
    items: Sequence[Item],
    columns: Columns = (),
    shape: Size | None = None,
    where: str = "The batch",
    original: Size | None = None,
) -> Batch:
    """Stacks images and labels, padded where their sizes differ; the batch says what is padding.

    Args:
      items: with "image", uint8 (h, w, C), and the same labels each; "transform" where labels have
        followed the image; "size", (height, width), where the image has padding of its own.
      columns: label columns that the task declares; any other holds one int32 an image.
      shape: (H, W) that images and maps are padded to, at the bottom and on the right; None for
        images of one size.
      where: what to call them in messages.
      original: (height, width) that maps are padded to which keep the size of the stored image;
        None where all follow the image.

    Returns:
      A batch of n images with these columns:
        "image": uint8 (n, H, W, C), padded with 0.
        "size": int32 (n, 2), height and width without padding; with a `shape` only, or where items
        say it. `valid_pixels` makes a mask of it.
        Labels: of their dtype, (n, …); maps (n, H, W, …) and ragged columns (n, capacity, …) are
        padded with their `fill`.
        "objects_valid": bool (n, capacity), true where ragged columns have an object.
        "transform": int32 (n, 42), where labels have followed the image. `Transform.from_row` makes
        it the transform from the image as it was decoded to the one in the batch, padding included;
        its inverse takes predictions back.
        "original_size": int32 (n, 2), height and width of the image as it was decoded.

    Raises:
      DataError: for images of several sizes without a `shape`, those that it does not hold, and
        labels that differ.
    """
    table = by_name(columns)
    names = items[0].keys()
    if any(item.keys() != names for item in items):
        raise DataError(f"{where} has images with different columns: {sorted({tuple(item) for item in items})}.")
    sizes = [item["image"].shape[:2] for item in items]
    if shape is None and len(set(sizes)) > 1:
        raise DataError(
            f"{where} gives images of several sizes: {sorted(set(sizes))}. Fit them to one size (data.resize=crop, squash or "
            "pad), or evaluate them in buckets (drep_jax.data.buckets)."
        )
    canvas = shape or sizes[0]
    if max(height for height, _ in sizes) > canvas[0] or max(width for _, width in sizes) > canvas[1]:
        raise DataError(f"{where} has images of {max(sizes)} pixels (height, width), which {canvas} does not hold.")
    batch = {"image": _padded([item["image"] for item in items], canvas, 0)}
    ragged = {}
    for name in names - {"image", "transform", "size"}:
        column = table.get(name)
        if column is None:
            batch[name] = _scalars(name, [item[name] for item in items], sizes[0], where)
            continue
        stored = column.original and original is not None
        own_sizes = [_original_size(item) for item in items] if stored else sizes
        values = [column.value(item[name], size, where) for item, size in zip(items, own_sizes, strict=True)]
        if column.ragged:
            ragged[name] = values
        else:
            place = original if stored and original is not None else canvas
            if stored and any(size[0] > place[0] or size[1] > place[1] for size in own_sizes):
                raise DataError(
                    f'{where} has maps "{name}" of {max(own_sizes)} pixels (height, width), which {place} does not hold.'
                )
            batch[name] = _padded(values, place, column.fill) if column.geometry == "mask" else np.stack(values)
    batch |= _objects(ragged, table)
    if "size" in names or shape is not None:
        shown = [item["size"] for item in items] if "size" in names else sizes
        batch["size"] = np.array(shown, np.int32).reshape(-1, 2)
    if "transform" in names:
        batch |= _transforms([item["transform"] for item in items], canvas)
    return batch


def _original_size(item: Item) -> Size:
    return (0, 0) if item["transform"] is None else item["transform"].size_in


def uncollate(batch: Batch, columns: Columns = (), *, original: bool = False) -> list[Item]:
    """Returns the items of a batch without their padding: what `collate` was given.

    Args:
      batch: of `collate`; other columns, such as "index" and "mask", are handed out row by row.
      columns: as for `collate`.
      original: whether maps that are declared so have the size of the stored image.

    Returns:
      One item an image. "size" and "original_size" are left out, as the image and the transform
      have them.
    """
    table = by_name(columns)
    items = []
    for place, image in enumerate(batch["image"]):
        height, width = batch["size"][place].tolist() if "size" in batch else image.shape[:2]
        item: Item = {}
        for name in batch.keys() - {"size", "original_size", "objects_valid"}:
            value = batch[name][place]
            column = table.get(name, Column(name))
            if column.original and original:
                rows, across = batch["original_size"][place].tolist()
                value = value[:rows, :across]
            elif name == "image" or column.geometry == "mask":
                value = value[:height, :width]
            elif name == "transform":
                transform = Transform.from_row(value)
                padded = transform.size_out != (height, width)
                value = Transform(transform.size_in, transform.steps[:-1]) if padded else transform
            elif column.ragged:
                value = value[batch["objects_valid"][place]]
            item[name] = value
        items.append(item)
    return items


def valid_pixels(size: Any, shape: Size) -> Any:
    """Returns which pixels of padded images belong to the image.

    Args:
      size: (n, 2), the column "size" of a batch, of NumPy or of JAX.
      shape: (H, W) of the padded images, or of a feature map whose sizes are given.

    Returns:
      bool (n, H, W).

    >>> valid_pixels(np.array([[1, 2]]), (2, 3))[0].tolist()
    [[True, True, False], [False, False, False]]
    """
    rows, columns = np.arange(shape[0], dtype=np.int32), np.arange(shape[1], dtype=np.int32)
    return (rows[None, :, None] < size[:, 0, None, None]) & (columns[None, None, :] < size[:, 1, None, None])


def read(source: Source, indices: np.ndarray, columns: Columns = (), *, sizes: bool = False) -> Batch:
    """Returns images, with the next readable one in the place of any that cannot be read.

    Args:
      source: the images.
      indices: which, (n,).
      columns: label columns that the task declares.
      sizes: whether the batch has "size" where fitting pads the images (`Setup.sizes`).

    Returns:
      A batch of `collate` with "index", int32 (n,), of the images that were read. Where nothing is
      declared: `{"image": uint8 (n, H, W, C), "label": int32 (n,), "index": int32 (n,)}`, without
      "label" if the source is unlabeled.

    Raises:
      DataError: for an image that cannot be read, unless the source tolerates it.
    """
    load = functools.partial(item_of, source, columns=columns, sizes=sizes)
    return _with_index(source, [_instead(source, int(index), load) for index in indices], columns)


def read_or_mask(
    source: Source,
    indices: np.ndarray,
    rows: int,
    columns: Columns = (),
    shape: Size | None = None,
    original: Size | None = None,
    *,
    sizes: bool = False,
) -> Batch:
    """Returns a batch of `rows` images, the first of which are these, with "mask", bool (rows,).

    Args:
      source: the images.
      indices: which, at most `rows`.
      rows: size of the batch.
      columns: label columns that the task declares.
      shape: that images are padded to; None for images of one size.
      original: as for `collate`.
      sizes: as for `read`.

    Returns:
      A batch of `collate` with "index", int32 (rows,), and "mask": false on padding and on images
      that cannot be read where the source tolerates that. Their index is -1, their image 0, and
      their labels as of an image without any.
    """
    load = functools.partial(item_of, source, columns=columns, original=original is not None, sizes=sizes)
    items = [_tried(source, int(index), load) for index in indices]
    items += [None] * (rows - len(items))
    form = next((item for item in items if item is not None), None)
    if form is None:
        form = _instead(source, int(indices[0]) if len(indices) else 0, load)[1]
    empty = _empty(form, columns, padded=shape is not None)
    mask = np.array([item is not None for item in items])
    batch = collate([item or empty for item in items], columns, shape, source.name, original)
    places = np.append(np.asarray(indices, np.int32), np.zeros(rows - len(indices), np.int32))
    return {**batch, "index": np.where(mask, places, -1).astype(np.int32), "mask": mask}


def read_augmented(
    source: Source,
    indices: np.ndarray,
    augmentation: Augmentation,
    columns: Columns = (),
    *,
    seed: int,
    first_position: int,
    stand_ins: np.ndarray | None = None,
    sizes: bool = False,
) -> Batch:
    """Returns images as `read` does, augmented by their position in the stream; labels follow.

    Where the batch has "size", also with random scales, flips and shifts are those of the picture
    within its padding.

    Args:
      source, indices, columns, sizes: as for `read`.
      augmentation: of the images.
      seed: of the augmentation.
      first_position: of the first image in the stream.
      stand_ins: indices of the images that may replace an unreadable one; None for all.
    """
    where = {"seed": seed, "first_position": first_position}
    loads = random_crops(source, augmentation, columns, **where, count=len(indices), sizes=sizes)
    if loads is None:
        loads = [functools.partial(item_of, source, columns=columns, sizes=sizes)] * len(indices)
    augmentation = augmentation.after_crops
    pairs = [_instead(source, int(index), load, stand_ins) for index, load in zip(indices, loads, strict=True)]
    if geometric(columns):
        shapes = [item["image"].shape[:2] for _, item in pairs]
        pictures = [item.get("size", shape) for (_, item), shape in zip(pairs, shapes, strict=True)]
        moves = augmentation.transforms(shapes, pictures, **where)
        pairs = [
            (index, follow(item, move, columns, source.name)) for (index, item), move in zip(pairs, moves, strict=True)
        ]
    return augmentation(_with_index(source, pairs, columns), **where)


def item_of(source: Source, index: int, columns: Columns = (), *, original: bool = False, sizes: bool = False) -> Item:
    """Returns an item, whose labels follow its image from the stored one if `columns` say so.

    With `sizes` it says the "size" of its picture, where fitting pads.
    """
    sizes = sizes and pads(fit_of(source))
    if not sizes and not geometric(columns) and not geometric(getattr(source, "columns", ())):
        return source[index]
    raw, how = raw_with(source, index, columns), fit_of(source)
    return fitted(raw, image_size_of(source), how, columns, original=original, sizes=sizes)


def _instead(source: Source, index: int, load: Load, stand_ins: np.ndarray | None = None) -> tuple[int, Item]:
    """Returns the image at this index, or the next one that can be read, and its index."""
    for step in range(len(source)):
        place = (index + step) % len(source)
        if step and stand_ins is not None and place not in stand_ins:
            continue
        item = _tried(source, place, load)
        if item is not None:
            return place, item
    raise DataError(f"None of the {len(source)} images of {source.name} can be read.")


def _tried(source: Source, index: int, load: Load) -> Item | None:
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


def _with_index(source: Source, pairs: list[tuple[int, Item]], columns: Columns) -> Batch:
    batch = collate([item for _, item in pairs], columns, where=source.name)
    return {**batch, "index": np.array([index for index, _ in pairs], np.int32)}


def _empty(form: Item, columns: Columns, *, padded: bool) -> Item:
    """Returns an item of this form that shows nothing: no pixels if they are padded, no objects."""
    table = by_name(columns)
    image = form["image"][:0, :0] if padded else np.zeros_like(form["image"])
    item: Item = {"image": image}
    for name in form.keys() - {"image", "size"}:
        column = table.get(name, Column(name))
        fill = column.fill if column.geometry == "mask" else 0
        item[name] = np.full(column.value_shape(image.shape[:2], 0), fill, column.dtype)
    item |= {"size": (0, 0)} if "size" in form else {}
    return {**item, "transform": None} if "transform" in form else item


def _padded(arrays: Sequence[np.ndarray], shape: Size, fill: float) -> np.ndarray:
    """Returns arrays (h, w, …) in one array (n, H, W, …)."""
    if all(array.shape[:2] == tuple(shape) for array in arrays):
        return np.stack(arrays)
    out = np.full((len(arrays), *shape, *arrays[0].shape[2:]), fill, arrays[0].dtype)
    for place, array in zip(out, arrays, strict=True):
        place[: array.shape[0], : array.shape[1]] = array
    return out


def _scalars(name: str, values: Sequence[Any], size: Size, where: str) -> np.ndarray:
    """Returns a column that no task declares, int32 (n,)."""
    try:
        array = np.array(values, np.int32)
        if array.shape == (len(values),):
            return array
    except (TypeError, ValueError):
        pass  # one of the values is refused below, with its shape or type
    return np.stack([Column(name).value(value, size, where) for value in values])


def _objects(ragged: Mapping[str, Sequence[np.ndarray]], table: Mapping[str, Column]) -> Batch:
    """Returns ragged columns padded to their capacity, and which places hold an object."""
    if not ragged:
        return {}
    first, *others = ragged
    counts = [len(values) for values in ragged[first]]
    for name in others:
        if [len(values) for values in ragged[name]] != counts:
            raise DataError(f'"{first}" and "{name}" speak of different numbers of objects in the same images.')
    capacity = table[first].capacity or 1 << max(max(counts) - 1, 0).bit_length()
    if max(counts) > capacity:
        raise DataError(
            f'An image has {max(counts)} objects, but the column "{first}" is declared for {capacity}. Raise its capacity.'
        )
    batch = {"objects_valid": np.arange(capacity) < np.array(counts)[:, None]}
    for name, rows in ragged.items():
        column = table[name]
        batch[name] = np.full((len(rows), capacity, *column.shape), column.fill, column.dtype)
        for place, values in zip(batch[name], rows, strict=True):
            place[: len(values)] = values
    return batch


def _transforms(transforms: Sequence[Transform | None], canvas: Size) -> Batch:
    """Returns transforms, each followed by the padding, as rows; zeros where there is none."""
    rows = np.zeros((len(transforms), ROW), np.int32)
    for row, transform in zip(rows, transforms, strict=True):
        if transform is not None:
            row[:] = transform.window(0, 0, *canvas).row()
    return {"transform": rows, "original_size": rows[:, :2].copy()}
