"""Buckets: a few padded shapes for images of several sizes, with one compilation each.

The buckets are a function of the sizes alone, so every host makes the same ones.
"""

import dataclasses

import numpy as np

from drep_jax.data.fits import round_up
from drep_jax.data.steps import Size
from drep_jax.errors import ConfigError, DataError
from drep_jax.typing import Tree

MULTIPLE = 32
LIMIT = 8


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Images that are padded to one shape.

    Attributes:
      shape: (height, width) in pixels.
      indices: which images, int32 (n,), ascending.
      original: (height, width) that maps are padded to which keep the size of the stored image;
        None where all follow the image.
      rows: images per batch over all hosts, if they are fewer than asked for; 0 for as many.
    """

    shape: Size
    indices: np.ndarray
    original: Size | None = None
    rows: int = 0

    def batch_size(self, requested: int) -> int:
        """Returns the images per batch, over all hosts."""
        return min(requested, self.rows or requested)

    def steps(self, batch_size: int) -> list[np.ndarray]:
        """Returns the images of each batch; the last one may have fewer."""
        batch_size = self.batch_size(batch_size)
        return [self.indices[start : start + batch_size] for start in range(0, len(self.indices), batch_size)]


def make_buckets(
    sizes: np.ndarray, *, multiple: int = MULTIPLE, limit: int = LIMIT, originals: np.ndarray | None = None
) -> tuple[Bucket, ...]:
    """Returns the buckets of images of these sizes.

    Each size is rounded up to multiples. While there are more shapes than the limit, two of them
    are merged into the smallest shape that holds both: those two whose images get the fewest pixels
    more. Every image then goes to the smallest bucket that holds it.

    Args:
      sizes: (n, 2), height and width of each image, as `drep_jax.data.source.sizes_of` gives them;
        (0, 0) of an image that cannot be read, which goes to the smallest bucket.
      multiple: of pixels, which the sides of each shape are; the largest stride of the network.
      limit: how many shapes at most.
      originals: (n, 2), sizes of the stored images, where label maps keep them
        (`drep_jax.data.source.original_sizes_of`).

    Returns:
      Buckets, the largest first, so that too little memory shows at once. Each image is in exactly
      one.

    Raises:
      ConfigError: for a multiple or a limit below 1.
      DataError: for sizes of another shape.

    >>> [(bucket.shape, bucket.indices.tolist()) for bucket in make_buckets(np.array([[30, 50], [64, 40], [31, 64]]))]
    [((64, 64), [1]), ((32, 64), [0, 2])]
    """
    sizes = np.asarray(sizes)
    if multiple < 1 or limit < 1:
        raise ConfigError(f"Buckets need a multiple and a limit of at least 1; got {multiple} and {limit}.")
    if sizes.ndim != 2 or sizes.shape[1] != 2:
        raise DataError(f"Expected the height and width of each image, (n, 2); got an array of shape {sizes.shape}.")
    known = sizes[(sizes > 0).all(axis=1)]
    shapes, counts = np.unique(-(-known // multiple) * multiple, axis=0, return_counts=True)
    if not len(shapes):
        shapes, counts = np.array([[multiple, multiple]]), np.array([0])
    shapes = _merged(shapes.astype(np.int64), counts.astype(np.int64), limit)
    shapes = shapes[np.lexsort((shapes[:, 0], shapes.prod(axis=1)))]
    fits = (sizes[:, None, :] <= shapes).all(axis=2)
    chosen = fits.argmax(axis=1)
    buckets = [
        Bucket((int(height), int(width)), np.flatnonzero(chosen == number).astype(np.int32))
        for number, (height, width) in enumerate(shapes)
    ]
    if originals is not None:
        largest = [originals[bucket.indices].max(axis=0, initial=1) for bucket in buckets]
        buckets = [
            dataclasses.replace(bucket, original=round_up(size, MULTIPLE))
            for bucket, size in zip(buckets, largest, strict=True)
        ]
    return tuple(bucket for bucket in reversed(buckets) if len(bucket.indices))


def exact_buckets(sizes: np.ndarray, originals: np.ndarray | None = None, *, parts: int = 1) -> tuple[Bucket, ...]:
    """Returns a bucket for every size, whose images are not padded: padding changes what a network gives.

    Args:
      sizes, originals: as for `make_buckets`; images that cannot be read go to the last bucket.
      parts: number that batches divide among, that of all devices. Batches have as many images as
        the bucket, if those are few, so that no large batch is computed for one image.

    Returns:
      Buckets, the largest first. Each image is in exactly one.

    >>> [(bucket.shape, bucket.indices.tolist()) for bucket in exact_buckets(np.array([[3, 5], [6, 4], [3, 5]]))]
    [((6, 4), [1]), ((3, 5), [0, 2])]
    """
    sizes = np.asarray(sizes).reshape(-1, 2)
    known = (sizes > 0).all(axis=1)
    if not known.any():
        sizes, known = np.ones_like(sizes), np.ones(len(sizes), bool)
    keys = sizes if originals is None else np.concatenate([sizes, originals], axis=1)
    shapes, places = np.unique(keys[known], axis=0, return_inverse=True)
    order = np.lexsort((*shapes.T[1:], shapes[:, 0], shapes[:, 0].astype(np.int64) * shapes[:, 1]))[::-1]
    chosen = np.full(len(sizes), order[-1] if len(order) else 0)
    chosen[known] = places.reshape(-1)
    buckets = []
    for number in order.tolist():
        indices = np.flatnonzero(chosen == number).astype(np.int32)
        height, width, *original = shapes[number].tolist()
        rows = -(-len(indices) // parts) * parts
        buckets.append(Bucket((height, width), indices, (original[0], original[1]) if original else None, rows))
    return tuple(buckets)


def padding_of(buckets: tuple[Bucket, ...], sizes: np.ndarray) -> float:
    """Returns the number of padding pixels over that of image pixels, in these buckets."""
    padded = sum(bucket.shape[0] * bucket.shape[1] * len(bucket.indices) for bucket in buckets)
    pixels = int(np.asarray(sizes, np.int64).prod(axis=1).sum())
    return padded / max(pixels, 1) - 1


def restore_order(index: np.ndarray, values: Tree) -> Tree:
    """Returns the rows of all batches in the order of the source, without padding.

    Args:
      index: (rows,), the column "index" of all batches in a row, -1 on padding.
      values: arrays with a first axis (rows, …), in nested dicts.

    Returns:
      The same with (n, …): the row of the smallest index first.
    """
    index = np.asarray(index)
    real = np.flatnonzero(index >= 0)
    order = real[np.argsort(index[real], kind="stable")]
    if isinstance(values, dict):
        return {name: restore_order(index, part) for name, part in values.items()}
    return np.asarray(values)[order]


def _merged(shapes: np.ndarray, counts: np.ndarray, limit: int) -> np.ndarray:
    """Returns at most `limit` shapes (k, 2) that hold all of these, (n, 2) with counts (n,)."""
    while len(shapes) > limit:
        areas = shapes.prod(axis=1)
        both = np.maximum(shapes[:, None], shapes).prod(axis=2)
        more = counts[:, None] * (both - areas[:, None]) + counts * (both - areas)
        np.fill_diagonal(more, np.iinfo(np.int64).max)
        one, other = sorted(map(int, np.unravel_index(more.argmin(), more.shape)))
        shapes[one], counts[one] = np.maximum(shapes[one], shapes[other]), counts[one] + counts[other]
        shapes, counts = np.delete(shapes, other, axis=0), np.delete(counts, other)
        same = np.flatnonzero((shapes == shapes[one]).all(axis=1))
        if len(same) > 1:
            counts[same[0]] = counts[same].sum()
            shapes, counts = np.delete(shapes, same[1:], axis=0), np.delete(counts, same[1:])
    return shapes
