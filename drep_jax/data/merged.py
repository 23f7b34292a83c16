"""Several sources as one, mixed by weight, to learn from without labels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from drep_jax.data.collate import item_of
from drep_jax.data.source import Source, fit_of, image_size_of, raw_item, size_of
from drep_jax.errors import ConfigError, DataError


class MergedSource:
    """A virtual epoch of several sources: every image at least once, sources by their weights.

    Its images are unlabeled, since the classes of one source mean nothing in another. The column
    "origin" is the index of an image's source. Sources alternate evenly: any stretch of the epoch
    holds each in proportion, to within one image.

    Attributes:
      sources: in the order of "origin".
      shares: fraction of the virtual epoch that each source has; the weights, up to rounding.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        empty = [source.name for source in sources if not len(source)]
        if empty:
            raise DataError(f"{empty[0]} has no images to merge.")
        self.sources = tuple(sources)
        self.name = " + ".join(source.name for source in sources)
        self.num_classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        self.in_memory = all(getattr(source, "in_memory", False) for source in sources)
        self.image_size, self.resize = image_size_of(sources[0]), fit_of(sources[0])
        counts = epoch_counts([len(source) for source in sources], weights)
        self._origins, self._places = layout(counts)
        self.shares = tuple(float(count) / len(self._origins) for count in counts)
        mixture = ", ".join(
            f"{100 * share:.1f} % {source.name} ({len(source)} images)"
            for share, source in zip(self.shares, sources, strict=True)
        )
        self.note: str | None = " ".join(
            [f"Merged: {mixture}.", *dict.fromkeys(source.note for source in sources if source.note)]
        )

    def __len__(self) -> int:
        return len(self._origins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        origin, place = self._at(index)
        return {"image": item_of(self.sources[origin], place)["image"], "origin": np.int32(origin)}

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item as its source stores it, with "where" and "origin"."""
        origin, place = self._at(index)
        raw = raw_item(self.sources[origin], place)
        return {"image": raw["image"], "where": raw["where"], "origin": np.int32(origin)}

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image without decoding it."""
        origin, place = self._at(index)
        return size_of(self.sources[origin], place)

    def _at(self, index: int) -> tuple[int, int]:
        origin = int(self._origins[index])
        return origin, int(self._places[index]) % len(self.sources[origin])


def epoch_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Returns each source's images a virtual epoch: the fewest with every image and the weights.

    Args:
      sizes: images of each source, at least 1.
      weights: above 0, of any sum.

    Returns:
      Whole numbers, at least the sizes, each within one of weight / Σ weights of their sum.

    Raises:
      ConfigError: for weights that are not positive numbers, or so uneven that a virtual epoch
        would not end.
    """
    if len(weights) != len(sizes) or not all(
        isinstance(weight, int | float) and math.isfinite(weight) and weight > 0 for weight in weights
    ):
        raise ConfigError(f"data.merge: expected one weight above 0 a source, got {tuple(weights)}.")
    total = sum(weights)
    needed = max(size * total / weight for size, weight in zip(sizes, weights, strict=True))
    if needed > MOST_PLACES:
        raise ConfigError(
            f"data.merge: with the weights {tuple(weights)} a pass over every one of {tuple(sizes)} images takes "
            f"{needed:.3g} steps, more than {MOST_PLACES:,}. Take weights that are less uneven."
        )
    length = math.ceil(needed - 1e-6)  # not one more for what rounding adds
    exact = [length * weight / total for weight in weights]
    counts = [max(size, math.floor(value + 1e-6)) for size, value in zip(sizes, exact, strict=True)]
    for number in sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])[: max(0, length - sum(counts))]:
        counts[number] += 1
    return counts


def layout(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each place of an epoch, the index of its source and its rank within that source.

    The j-th of a source's n places lies at (j + ½) / n of the epoch.
    """
    origins = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    numbers = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    at = (numbers + 0.5) / np.asarray(counts)[origins]
    order = np.argsort(at, kind="stable")
    return origins[order], numbers[order]


MOST_PLACES = 100_000_000
"""Largest virtual epoch, since its layout is held in memory."""
