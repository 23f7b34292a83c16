"""Re-ranking by k-reciprocal neighbours (Zhong et al. 2017), sparse.

    d* = (1 − λ) d_J + λ d̃,    d_J(p, g) = 1 − Σ min(V_p, V_g) / Σ max(V_p, V_g)

over all n = q + g images, with d̃ the squared Euclidean distance divided by the largest one of its row, and V_p sparse: it
holds exp(−d̃) at the expanded k₁-reciprocal neighbours of p, sums to one, and is averaged over p's k₂ nearest.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from drep_jax.errors import ConfigError
from drep_jax.metrics.retrieval import distances

_ROWS = 2048
"""Rows of a sparse product, or pairs × 16 of direct distances, at once."""


@dataclasses.dataclass(frozen=True)
class Rerank:
    """The constants of re-ranking; the defaults are the authors'.

    Attributes:
      k1: neighbours that are asked whether they are reciprocal.
      k2: nearest images over which V is averaged; 1 for not.
      share: λ, of the original distance in the result.
    """

    k1: int = 20
    k2: int = 6
    share: float = 0.3

    def __post_init__(self) -> None:
        for name, value in (("k1", self.k1), ("k2", self.k2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} = {value!r} of re-ranking: expected a whole number of at least 1.")
        if self.k2 > self.k1 + 1:
            raise ConfigError(f"k2 = {self.k2} of re-ranking: expected at most k1 + 1 = {self.k1 + 1}.")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"λ = {self.share!r} of re-ranking: expected a number from 0 to 1.")


def reranked(
    query: Any,
    gallery: Any,
    constants: Rerank | None = None,
    *,
    metric: str = "euclidean",
    block: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields re-ranked distances of consecutive queries to the whole gallery, (rows, g) float32.

    An image is its own first neighbour; others at one distance follow in the order of their index, queries before gallery.

    Beside the features it holds two blocks of distances to all n images, k₁ + 1 neighbours an image, and V with some
    dozens to a few hundred entries an image (8 bytes each, twice); never n² numbers.

    Args:
      query, gallery: (q, width) and (g, width) features.
      constants: k₁, k₂ and λ; None for the authors'.
      metric: "cosine" makes every feature of length one first.
      block: rows at once; None for as many as a few MiB hold.

    Raises:
      ConfigError, DataError: as `drep_jax.metrics.retrieval.distances.prepare`.
    """
    constants = constants or Rerank()
    query, gallery = distances.both_checked(query, gallery, metric)
    if metric == "cosine":
        query, gallery = distances.unit(query, "query set"), distances.unit(gallery, "gallery")
    images = np.concatenate([query, gallery])
    pairs = distances.prepare(images, images)
    nearest, largest = _neighbours(pairs, constants.k1 + 1, block)
    weights = _weights(images, nearest, largest, constants)
    columns = weights.tocsc()
    queries = len(query)
    asked = dataclasses.replace(pairs, query=pairs.query[:, :queries])
    start = 0
    for rows in distances.blocks(asked, block):
        original = np.maximum(np.asarray(rows)[:, queries:], 0) / largest[start : start + len(rows), None]
        overlap = np.stack([_overlap(weights, columns, start + index)[queries:] for index in range(len(rows))])
        jaccard = 1 - overlap / (2 - overlap)
        yield ((1 - constants.share) * jaccard + constants.share * original).astype(np.float32)
        start += len(rows)


def _neighbours(pairs: distances.Pairs, count: int, block: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest images of every image (n, count), itself first, and its largest squared distance (n,)."""
    count = min(count, pairs.shape[1])
    nearest, largest, start = [], [], 0
    for rows in distances.blocks(pairs, block):
        found = np.maximum(np.asarray(rows), 0)
        largest.append(found.max(axis=1))
        each = np.arange(len(found))
        found[each, start + each] = -1
        nearest.append(_first(found, count))
        start += len(found)
    top = np.concatenate(largest)
    return np.concatenate(nearest), np.where(top > 0, top, 1)


def _first(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns of the smallest values of every row, ascending, at one value by their index."""
    found = np.empty((len(rows), count), np.int32)
    for row, out in zip(rows, found, strict=True):
        edge = np.partition(row, count - 1)[count - 1]
        near = np.flatnonzero(row <= edge)
        out[:] = near[np.argsort(row[near], kind="stable")][:count]
    return found


def _reciprocal(nearest: np.ndarray, k: int) -> sparse.csr_array:
    """Returns the pairs of images that are among each other's first k + 1, (n, n) of 0 and 1."""
    n, k = len(nearest), min(k + 1, nearest.shape[1])
    forward = sparse.csr_array(
        (np.ones(n * k, np.int32), nearest[:, :k].reshape(-1), np.arange(0, n * k + 1, k)), shape=(n, n)
    )
    return sparse.csr_array(forward.multiply(forward.T))


def _weights(images: np.ndarray, nearest: np.ndarray, largest: np.ndarray, constants: Rerank) -> sparse.csr_array:
    """Returns V, (n, n)."""
    full, half = _reciprocal(nearest, constants.k1), _reciprocal(nearest, round(constants.k1 / 2))
    sizes = half.sum(axis=1)
    parts = []
    for start in range(0, len(images), _ROWS):
        own = full[start : start + _ROWS]
        shared = sparse.csr_array(
            own.multiply(own @ half.T)
        )  # of each candidate's neighbours, those that are its own too
        shared.data = (3 * shared.data > 2 * sizes[shared.indices]).astype(np.int32)
        wide = sparse.csr_array(own + shared @ half)
        wide.eliminate_zeros()
        wide.sort_indices()
        rows = np.repeat(np.arange(start, start + wide.shape[0]), np.diff(wide.indptr))
        values = np.exp(-_direct(images, rows, wide.indices) / largest[rows])
        sums = np.bincount(rows - start, values, minlength=wide.shape[0])
        parts.append(
            sparse.csr_array(
                ((values / sums[rows - start]).astype(np.float32), wide.indices, wide.indptr), shape=wide.shape
            )
        )
    weights = sparse.csr_array(sparse.vstack(parts))
    k2 = min(constants.k2, nearest.shape[1])
    if k2 == 1:
        return weights
    n = len(images)
    mean = sparse.csr_array(
        (np.full(n * k2, 1 / k2, np.float32), nearest[:, :k2].reshape(-1), np.arange(0, n * k2 + 1, k2)), shape=(n, n)
    )
    return sparse.csr_array(mean @ weights)


def _direct(images: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the squared distances of single pairs in float64."""
    found = np.empty(len(left))
    for start in range(0, len(left), 16 * _ROWS):
        part = slice(start, start + 16 * _ROWS)
        apart = images[left[part]] - images[right[part]]
        found[part] = np.einsum("nd,nd->n", apart, apart, dtype=np.float64)
    return found


def _overlap(weights: sparse.csr_array, columns: sparse.csc_array, index: int) -> np.ndarray:
    """Returns Σ_c min(V[index, c], V[j, c]) for all images j, over the columns where V[index] is not zero."""
    span = slice(weights.indptr[index], weights.indptr[index + 1])
    ours, values = weights.indices[span], weights.data[span]
    starts, lengths = columns.indptr[ours], np.diff(columns.indptr)[ours]
    offsets = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    entries = offsets + np.arange(lengths.sum())
    return np.bincount(
        columns.indices[entries],
        np.minimum(np.repeat(values, lengths), columns.data[entries]),
        minlength=weights.shape[0],
    )
