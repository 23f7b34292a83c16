"""Images in chunks (measured noise): which device takes which, and what waits in memory between sites."""

import abc
import dataclasses
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from drep_jax.core.working import bytes_of
from drep_jax.parallel import devices
from drep_jax.typing import AnyArray


class Streams(abc.ABC):
    """Clean and corrupted images that are made when they are needed."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(streams, images, *image_shape)."""

    @property
    def resident(self) -> bool:
        """Whether all images are in memory, so that none need wait there."""
        return False

    @abc.abstractmethod
    def take(self, index: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, "streams n *image_shape"]:
        """Returns some images of every stream."""

    def arguments(self, index: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """Returns what the backbone is given beside some images that have been taken, the same in every stream."""
        del index
        return {}


class InMemory(Streams):
    """Streams that are one array."""

    def __init__(self, images: Shaped[np.ndarray, "streams images *image_shape"]) -> None:
        self._images = images

    @property
    def shape(self) -> tuple[int, ...]:
        """(streams, images, *image_shape)."""
        return self._images.shape

    @property
    def resident(self) -> bool:
        """Always."""
        return True

    def take(self, index: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, "streams n *image_shape"]:
        """Returns some images of every stream."""
        return self._images[:, index]


# ---------------------------------------------------------------------------------------------------------------------
# Division
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Round:
    """A chunk of images for every device of all hosts, all of one fold.

    Attributes:
      fold: index of the fold.
      index: which images.
      mask: 1 for images that count; the others fill chunks up.
    """

    fold: int
    index: Int[np.ndarray, "devices chunk"]
    mask: Float[np.ndarray, "devices chunk"]

    def mine(self) -> tuple[Int[np.ndarray, "devices chunk"], Float[np.ndarray, "devices chunk"]]:
        """Returns the part of this host's devices."""
        host, hosts = devices.host()
        count = len(self.index) // hosts
        return self.index[host * count : (host + 1) * count], self.mask[host * count : (host + 1) * count]


def rounds_of(images: int, folds: int, most: int) -> tuple[Round, ...]:
    """Divides images into folds, and these into chunks of one size.

    Image i is in fold i modulo the number of folds, whatever the devices. Every image counts once;
    less than a round of a fold is filled up.

    Args:
      images: number of images.
      folds: number of folds.
      most: images in a chunk, at most.
    """
    folds = min(folds, images)
    largest = -(-images // folds)
    count = devices.device_count() if devices.host()[1] > 1 else min(devices.device_count(), largest)
    each = -(-largest // (count * most))
    chunk = -(-largest // (count * each))
    rounds = []
    for fold in range(folds):
        members = np.arange(fold, images, folds)
        places = np.arange(each * count * chunk).reshape(each, count, chunk)
        for place in places:
            if place.min() < len(members):
                rounds.append(Round(fold, members[place % len(members)], (place < len(members)).astype(np.float32)))
    return tuple(rounds)


# ---------------------------------------------------------------------------------------------------------------------
# Waiting
# ---------------------------------------------------------------------------------------------------------------------


PAGES = 2**21
"""Bytes from which an array that waits has pages of its own; a process may have some 65,000 mappings."""


def apart(array: Shaped[np.ndarray, "..."], spare: list[np.ndarray]) -> Shaped[np.ndarray, "..."]:
    """Returns a copy in pages of its own, which the system has back as soon as the copy is dropped.

    Between sites arrays of many sizes come and go. glibc takes blocks of up to 32 MiB from its heap once
    it has seen one freed, and cannot return what lies between others: twice the bound was in use.

    Args:
      array: to copy.
      spare: copies that nobody needs; one of the same size is taken from the list and overwritten.
    """
    for number, old in enumerate(spare):
        if old.nbytes == array.nbytes:
            copy = spare.pop(number).reshape(-1).view(np.uint8).view(array.dtype).reshape(array.shape)
            break
    else:
        copy = _paged(array)
    copy[...] = array
    return copy


def _paged(like: np.ndarray) -> np.ndarray:
    """Returns an array of the same shape and type, in pages of its own if it is large and the system has them."""
    if like.nbytes < PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.empty(like.shape, like.dtype)
    try:
        pages = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # too many mappings
        return np.empty(like.shape, like.dtype)
    return np.frombuffer(pages, np.uint8).view(like.dtype).reshape(like.shape)


class Waiting:
    """What is alive at a cut, of every round, for as many rounds as a bound allows.

    A round that does not fit keeps what it had at an earlier cut, or nothing, and is computed again
    from there.
    """

    def __init__(self, limit: float) -> None:
        """Starts with nothing.

        Args:
          limit: bytes.
        """
        self._limit, self._used = limit, 0
        self._held: dict[int, tuple[int, int, Mapping[Any, Any]]] = {}

    def get(self, number: int) -> tuple[int, Mapping[Any, Any]]:
        """Returns the latest cut of which a round is held, and its values; (−1, {}) if there is none."""
        cut, _, values = self._held.get(number, (-1, 0, {}))
        return cut, values

    def put(self, number: int, cut: int, size: int, values: Mapping[Any, AnyArray]) -> bool:
        """Holds copies of a round's values at a cut instead of those at an earlier one, if they fit; returns whether."""
        _, old_size, before = self._held.get(number, (-1, 0, {}))
        if self._used - old_size + size > self._limit:
            return False
        kept = {v: before[v] for v, value in values.items() if before.get(v) is value}
        new = {v: np.asarray(value) for v, value in values.items() if v not in kept}
        spare = [old for v, old in before.items() if v not in kept]
        spare = [old for old in spare if not any(np.may_share_memory(old, array) for array in new.values())]
        held = {v: kept[v] if v in kept else apart(new[v], spare) for v in values}
        self._held[number], self._used = (cut, size, held), self._used - old_size + size
        return True

    @property
    def used(self) -> int:
        """Bytes that are held."""
        return self._used

    def earliest(self, count: int) -> int:
        """Returns the earliest cut from which any of the first `count` rounds continues."""
        return min(self.get(number)[0] for number in range(count))


def live_bytes(live: Sequence[Any], local_devices: int) -> int:
    """Returns the bytes of variables of one chunk, on so many devices."""
    return local_devices * sum(map(bytes_of, live))


def passes(sizes: Sequence[int], rounds: int, limit: float) -> float:
    """Returns how many forward passes it takes to reach every cut, if what does not fit is computed again.

    Args:
      sizes: bytes of a round at each cut.
      rounds: number of rounds.
      limit: bytes that may wait.

    >>> passes([10, 10, 10, 10], 2, 20), passes([10, 10, 10, 10], 2, 0)
    (1.0, 2.5)
    """
    waiting, runs = Waiting(limit), 0
    for cut, size in enumerate(sizes):
        for number in range(rounds):
            runs += cut - waiting.get(number)[0]
            waiting.put(number, cut, size, {})
    return runs / max(1, rounds * len(sizes))
