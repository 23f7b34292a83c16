"""Batches of a source, read ahead by grain.

Batch n depends on (source, seed, n) alone, so that runs can be resumed.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Num

from drep_jax.data.augment import OFF, Augmentation
from drep_jax.data.buckets import Bucket
from drep_jax.data.collate import read, read_augmented, read_or_mask
from drep_jax.data.columns import Columns, by_name
from drep_jax.data.source import Source
from drep_jax.errors import ConfigError, DataError
from drep_jax.typing import Batch

READING_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of the images in each epoch.

    Attributes:
      length: images an epoch.
      at: epoch ↦ the images in their order, int32 (length,).
      images: indices of the images that may stand in for an unreadable one; None for all.
    """

    length: int
    at: Callable[[int], np.ndarray]
    images: np.ndarray | None = None


def training_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    num_threads: int | None = None,
    augmentation: Augmentation = OFF,
    shard: tuple[int, int] = (0, 1),
    order: Order | None = None,
    columns: Columns = (),
    sizes: bool = False,
) -> Iterator[Batch]:
    """Yields batches for ever: epochs in new orders, one flowing into the next, so none is cut.

    Args:
      source: images, all fitted to one size.
      batch_size: images a step, over all hosts.
      seed: of the order and the augmentation, at least 0.
      start_step: index of the first batch; the same as skipping that many.
      num_threads: threads that read and decode, each a whole batch, and number of batches read
        ahead. None means 8, or 0 for a source that is in memory.
      augmentation: of the images, drawn anew for each position in the endless stream. Labels follow
        its geometry.
      shard: (index, count) of the equal slices of every batch, one of which each host reads.
      order: of the images in each epoch; None for a permutation of all of them.
      columns: label columns that the task declares; any other holds one int32 an image.
      sizes: whether batches have "size" where images are padded, see `read_augmented`.

    Returns:
      An iterator over batches of `drep_jax.data.collate.collate` with "index", int32 (B,), the
      image's index in the source. Where nothing is declared:
      `{"image": uint8 (B, H, W, 3), "label": int32 (B,), "index": int32 (B,)}`, without "label" if
      the source is unlabeled. Mixup and cutmix add "label2", int32 (B,), and "share", float32 (B,):
      the weight of "label", 1 − share being that of "label2".

    Raises:
      ConfigError: for a batch that cannot be divided so; for mixing images without labels; and for
        augmentation that labels cannot follow.
      DataError: when the source has fewer images than a batch; and, while reading, for an image
        that cannot be read.
    """
    rows = _rows(batch_size, shard)
    if len(source) < batch_size:
        raise DataError(f"{source.name} has {len(source)} images in this split, fewer than one batch of {batch_size}.")
    if not 0 <= seed < 2**64 or start_step < 0:
        raise ConfigError(f"seed and start_step must be at least 0; got {seed} and {start_step}.")
    augmentation.check_batch(rows.stop - rows.start, "batch_size" if shard[1] == 1 else "each host's part of a batch")
    augmentation.check_columns(columns)
    _check_capacity(columns, shard)
    if augmentation.mixes and source.num_classes is None:
        raise ConfigError(f"Mixup and cutmix mix labels, too, but {source.name} has none. Set both to 0.")
    if order is None:
        order = Order(len(source), functools.partial(epoch_order, len(source), seed))
    if not order.length:
        raise DataError(f"None of the {len(source)} images of {source.name} has a label to train with.")
    length, order_at = order.length, functools.lru_cache(maxsize=4)(order.at)
    stand_ins = order.images

    def load(step: int) -> Batch:
        positions = step * batch_size + np.arange(rows.start, rows.stop)
        epochs, places = np.divmod(positions, length)
        indices = np.concatenate([order_at(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])
        where = {"seed": seed, "first_position": int(positions[0])}
        return read_augmented(source, indices, augmentation, columns, stand_ins=stand_ins, sizes=sizes, **where)

    if num_threads is None and augmentation.slow:
        num_threads = READING_THREADS
    return _read_ahead(range(start_step, sys.maxsize), load, source, num_threads)


def evaluation_batches(
    source: Source,
    batch_size: int,
    *,
    num_threads: int | None = None,
    shard: tuple[int, int] = (0, 1),
    columns: Columns = (),
    buckets: Sequence[Bucket] | None = None,
    sizes: bool = False,
) -> Iterator[Batch]:
    """Yields every image once, in order or bucket by bucket; last batches are padded.

    Args:
      source: images, of one size unless there are buckets.
      batch_size: images a step, over all hosts; a bucket may ask for fewer.
      num_threads: as for `training_batches`.
      shard: as for `training_batches`.
      columns: as for `training_batches`.
      buckets: of `drep_jax.data.buckets.make_buckets`, for images of several sizes: the images of
        one bucket after those of another, padded to its shape.
        `drep_jax.data.buckets.restore_order` puts results in the order of the source.
      sizes: whether batches have "size" where fitting pads the images, too.

    Returns:
      An iterator over batches as `training_batches` gives, with "mask", bool (B,): false on padding
      and on images that cannot be read where the source tolerates that; their index is -1, their
      image and scalar labels are 0. With buckets also "size", int32 (B, 2), the height and width of
      each image without padding.
    """
    _check_capacity(columns, shard)
    everything = Bucket((0, 0), np.arange(len(source), dtype=np.int32))
    steps = [
        (
            None if buckets is None else bucket.shape,
            bucket.original,
            _rows(bucket.batch_size(batch_size), shard),
            indices,
        )
        for bucket in ([everything] if buckets is None else buckets)
        for indices in bucket.steps(batch_size)
    ]

    def load(step: int) -> Batch:
        shape, original, rows, indices = steps[step]
        return read_or_mask(source, indices[rows], rows.stop - rows.start, columns, shape, original, sizes=sizes)

    return _read_ahead(range(len(steps)), load, source, num_threads)


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation of `range(size)`, int32, of one epoch.

    It sorts a bit generator's raw words, because NumPy promises that those stay the same from one
    release to the next; it does not promise this of `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int32)


def order_of(images: np.ndarray, seed: int) -> Order:
    """Returns the order in which each epoch is a new permutation of these images.

    Args:
      images: indices, int (n,).
      seed: of the permutations.
    """
    return Order(len(images), lambda epoch: images[epoch_order(len(images), seed, epoch)].astype(np.int32), images)


def normalize(
    images: Num[Array | np.ndarray, "*b c"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Array, "*b c"]:
    """Returns (images / 255 − mean) / std in float32.

    Args:
      images: (..., C), uint8 or float, from 0 to 255.
      mean: one number a channel (or one for all), on the scale from 0 to 1.
      std: likewise, above 0.
    """
    channels = images.shape[-1]
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise ConfigError(
            f"Expected {channels} means and {channels} positive standard deviations; got {mean} and {std}."
        )
    shape = (1,) * (images.ndim - 1) + (-1,)
    center, spread = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (mean, std))
    return (jnp.asarray(images, jnp.float32) / 255 - center) / spread


def read_images(source: Source, indices: np.ndarray) -> np.ndarray:
    """Returns the images at these indices, uint8 (n, H, W, C), all in memory."""
    return read(source, indices)["image"]


def read_labels(source: Source, indices: np.ndarray) -> np.ndarray | None:
    """Returns their labels, or None where the source has none."""
    return read(source, indices).get("label")


def _rows(batch_size: int, shard: tuple[int, int]) -> slice:
    which, count = shard
    if batch_size < 1 or not 0 <= which < count or batch_size % count:
        raise ConfigError(
            f"A batch of {batch_size} images cannot be divided into {count} equal parts, of which part {which} is read."
        )
    part = batch_size // count
    return slice(which * part, (which + 1) * part)


def _check_capacity(columns: Columns, shard: tuple[int, int]) -> None:
    """Raises ConfigError unless every host pads ragged columns to the same length."""
    open_ended = [column.name for column in by_name(columns).values() if column.ragged and not column.capacity]
    if open_ended and shard[1] > 1:
        raise ConfigError(
            f"Several hosts pad ragged columns to one length, but {', '.join(open_ended)} is declared without a capacity."
        )


def _read_ahead(
    steps: range, load: Callable[[int], Batch], source: Source, num_threads: int | None
) -> Iterator[dict[str, Any]]:
    # Whole batches are grain's records: one by one, the digits take 28 times as long (measured).
    if num_threads is None:
        num_threads = 0 if getattr(source, "in_memory", False) else READING_THREADS
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    return iter(grain.MapDataset.range(steps.start, steps.stop).map(load).to_iter_dataset(options))
