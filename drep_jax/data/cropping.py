"""Random crops of stored images, of each position in the stream of training images; labels follow."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from drep_jax.data.augment import Augmentation
from drep_jax.data.augment.flip_crop import crop_box, crop_numbers, flips
from drep_jax.data.augment.photometric import photometric
from drep_jax.data.augment.scaled_crop import scaled_crop, scaled_crop_numbers
from drep_jax.data.columns import Columns, follow, geometric
from drep_jax.data.decode import as_rgb, decode, decode_box, resized_box
from drep_jax.data.geometry import Transform
from drep_jax.data.resampling import PLAIN
from drep_jax.data.source import Source, image_size_of, raw_item

Item = dict[str, Any]
Load = Callable[[int], Item]
"""Index in the source ↦ item."""


def raw_with(source: Source, index: int, columns: Columns) -> Item:
    """Returns an item as it is stored, without labels of a form that nobody declares: they are not decoded."""
    undeclared = {column.name for column in getattr(source, "columns", ())} - {column.name for column in columns}
    return {name: value for name, value in raw_item(source, index).items() if name not in undeclared}


def random_crops(
    source: Source,
    augmentation: Augmentation,
    columns: Columns,
    *,
    seed: int,
    first_position: int,
    count: int,
    sizes: bool = False,
) -> list[Load] | None:
    """Returns how the image of each of `count` positions is read and cropped; None without random crops.

    Args:
      source: the images.
      augmentation: of the images.
      columns: label columns that the task declares.
      seed: of the augmentation.
      first_position: of the first image in the stream.
      count: number of positions.
      sizes: whether items of random scale say the "size" of their picture without its padding.
    """
    if augmentation.crop_scale:
        rows = crop_numbers(seed, first_position, count)
        return [functools.partial(_cropped, source, augmentation, columns, row) for row in rows]
    if augmentation.scale:
        rows = scaled_crop_numbers(seed, first_position, count)
        flipped = flips(seed, first_position, count) & augmentation.flip
        return [
            functools.partial(
                _scaled, source, augmentation, columns, row, bool(flip), (seed, first_position + place), sizes
            )
            for place, (row, flip) in enumerate(zip(rows, flipped, strict=True))
        ]
    return None


def _cropped(source: Source, augmentation: Augmentation, columns: Columns, numbers: np.ndarray, index: int) -> Item:
    """Returns a random resized crop of a stored image."""
    scale, ratio = augmentation.crop_scale, augmentation.crop_ratio
    size = image_size_of(source)

    def choose(height: int, width: int) -> Any:
        return crop_box(numbers, height, width, (scale[0], scale[1]), (ratio[0], ratio[1]))

    raw = raw_with(source, index, columns)
    stored, where = raw.pop("image"), raw.pop("where")
    if isinstance(stored, np.ndarray):
        image, transform = resized_box(as_rgb(stored, where), choose, size)
    else:
        image, transform = decode_box(stored, where, choose, size)
    item = {**raw, "image": image}
    return follow(item, transform, columns, where) if geometric(columns) else item


def _scaled(
    source: Source,
    augmentation: Augmentation,
    columns: Columns,
    numbers: np.ndarray,
    flipped: bool,
    draw: tuple[int, int],
    sizes: bool,
    index: int,
) -> Item:
    """Returns a random crop of a stored image at a random scale, flipped, distorted and padded.

    `draw` is the seed and the position in the stream, of the distortion; with `sizes` the item says
    the "size" of the picture without its padding.
    """
    size = image_size_of(source)
    raw = raw_with(source, index, columns)
    stored, where = raw.pop("image"), raw.pop("where")
    image = as_rgb(stored, where) if isinstance(stored, np.ndarray) else decode(stored, where)
    mask = next((column for column in columns if column.geometry == "mask" and column.name in raw), None)
    labels = None
    if mask is not None:
        labels = raw[mask.name] = mask.value(raw[mask.name], image.shape[:2], where)
    crop = scaled_crop(
        numbers,
        image.shape[:2],
        size,
        scale=augmentation.scale,
        base=augmentation.scale_base,
        labels=labels,
        cat_max_ratio=augmentation.cat_max_ratio,
        flipped=flipped,
    )
    image = crop.shown.image(image, interpolation=PLAIN)
    if augmentation.photometric:  # before padding, whose color stays
        image = photometric(image[None], seed=draw[0], first_position=draw[1])[0]
    padding = Transform(crop.shown.size_out).window(0, 0, *size)
    item = {**raw, "image": padding.image(image, fill=augmentation.pad_color)}
    item |= {"size": crop.shown.size_out} if sizes else {}
    return follow(item, crop.whole, columns, where) if geometric(columns) else item
