"""Re-ranking by k-reciprocal neighbors (Zhong et al. 2017), with sparse matrices.

    d* = (1 − λ) d_J + λ d̃,    d_J(p, g) = 1 − Σ min(V_p, V_g) / Σ max(V_p, V_g)

over all n = q + g images. d̃ is the squared Euclidean distance divided by the maximum of its row.
V_p is sparse: exp(−d̃) at the expanded k₁-reciprocal neighbors of p, normalized to sum 1 and
averaged over the k₂ nearest images of p.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from drep_jax.errors import ConfigError
from drep_jax.metrics.retrieval import distances

_ROWS = 2048
"""Rows of a sparse product at once; 16 times as many pairs of direct distances."""


@dataclasses.dataclass(frozen=True)
class Rerank:
    """The constants of re-ranking; the defaults are those of Zhong et al.

    Attributes:
      k1: neighbors that are tested for reciprocity.
      k2: nearest images over which V is averaged; 1 for no averaging.
      original_weight: λ, the weight of the original distance.
    """

    k1: int = 20
    k2: int = 6
    original_weight: float = 0.3

    def __post_init__(self) -> None:
        for name, value in (("k1", self.k1), ("k2", self.k2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} = {value!r} of re-ranking: expected a whole number of at least 1.")
        if self.k2 > self.k1 + 1:
            raise ConfigError(f"k2 = {self.k2} of re-ranking: expected at most k1 + 1 = {self.k1 + 1}.")
        if not 0 <= self.original_weight <= 1:
            raise ConfigError(f"λ = {self.original_weight!r} of re-ranking: expected a number from 0 to 1.")


def reranked(
    query: Any,
    gallery: Any,
    constants: Rerank | None = None,
    *,
    metric: str = "euclidean",
    block: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields re-ranked distances of consecutive queries to the whole gallery, (rows, g) float32.

    An image is its own first neighbor. Others at equal distance follow by index, queries before
    gallery.

    Memory: two blocks of distances to all n images, k₁ + 1 neighbors per image, and V with dozens
    to a few hundred entries per image (8 bytes each, twice). It never holds n² numbers.

    Args:
      query, gallery: (q, width) and (g, width) features.
      constants: k₁, k₂ and λ; None for the defaults.
      metric: "cosine" first scales every feature to unit length.
      block: rows per block; None for as many as fit a few MiB.

    Raises:
      ConfigError, DataError: as `drep_jax.metrics.retrieval.distances.prepare`.
    """
    constants = constants or Rerank()
    query, gallery = distances.both_checked(query, gallery, metric)
    if metric == "cosine":
        query, gallery = distances.unit(query, "query set"), distances.unit(gallery, "gallery")
    images = np.concatenate([query, gallery])
    pairs = distances.prepare(images, images)
    nearest, largest = _neighbors(pairs, constants.k1 + 1, block)
    weights = _weights(images, nearest, largest, constants)
    columns = weights.tocsc()
    queries = len(query)
    query_pairs = dataclasses.replace(pairs, query=pairs.query[:, :queries])
    start = 0
    for rows in distances.blocks(query_pairs, block):
        original = np.maximum(np.asarray(rows)[:, queries:], 0) / largest[start : start + len(rows), None]
        overlap = np.stack([_overlap(weights, columns, start + index)[queries:] for index in range(len(rows))])
        jaccard = 1 - overlap / (2 - overlap)
        weight = constants.original_weight
        yield ((1 - weight) * jaccard + weight * original).astype(np.float32)
        start += len(rows)


def _neighbors(pairs: distances.Pairs, count: int, block: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest images (n, count), itself first, and largest squared distances (n,)."""
    count = min(count, pairs.shape[1])
    nearest, largest, start = [], [], 0
    for rows in distances.blocks(pairs, block):
        squared = np.maximum(np.asarray(rows), 0)
        largest.append(squared.max(axis=1))
        each = np.arange(len(squared))
        squared[each, start + each] = -1
        nearest.append(_first(squared, count))
        start += len(squared)
    maxima = np.concatenate(largest)
    return np.concatenate(nearest), np.where(maxima > 0, maxima, 1)


def _first(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns of the smallest values of every row, ascending; ties by index."""
    columns = np.empty((len(rows), count), np.int32)
    for row, out in zip(rows, columns, strict=True):
        limit = np.partition(row, count - 1)[count - 1]
        near = np.flatnonzero(row <= limit)
        out[:] = near[np.argsort(row[near], kind="stable")][:count]
    return columns


def _reciprocal(nearest: np.ndarray, k: int) -> sparse.csr_array:
    """Returns which pairs of images are among each other's first k + 1, (n, n) of 0 and 1."""
    n, k = len(nearest), min(k + 1, nearest.shape[1])
    forward = sparse.csr_array(
        (np.ones(n * k, np.int32), nearest[:, :k].reshape(-1), np.arange(0, n * k + 1, k)), shape=(n, n)
    )
    return sparse.csr_array(forward.multiply(forward.T))


def _weights(images: np.ndarray, nearest: np.ndarray, largest: np.ndarray, constants: Rerank) -> sparse.csr_array:
    """Returns V, sparse (n, n)."""
    full, half = _reciprocal(nearest, constants.k1), _reciprocal(nearest, round(constants.k1 / 2))
    sizes = half.sum(axis=1)
    parts = []
    for start in range(0, len(images), _ROWS):
        neighbors = full[start : start + _ROWS]
        # The overlap of each neighbor's own neighbors with those of the image.
        overlap = sparse.csr_array(neighbors.multiply(neighbors @ half.T))
        overlap.data = (3 * overlap.data > 2 * sizes[overlap.indices]).astype(np.int32)
        expanded = sparse.csr_array(neighbors + overlap @ half)
        expanded.eliminate_zeros()
        expanded.sort_indices()
        rows = np.repeat(np.arange(start, start + expanded.shape[0]), np.diff(expanded.indptr))
        values = np.exp(-_direct(images, rows, expanded.indices) / largest[rows])
        sums = np.bincount(rows - start, values, minlength=expanded.shape[0])
        parts.append(
            sparse.csr_array(
                ((values / sums[rows - start]).astype(np.float32), expanded.indices, expanded.indptr),
                shape=expanded.shape,
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
    """Returns the squared distances of pairs of images in float64."""
    squared = np.empty(len(left))
    for start in range(0, len(left), 16 * _ROWS):
        part = slice(start, start + 16 * _ROWS)
        difference = images[left[part]] - images[right[part]]
        squared[part] = np.einsum("nd,nd->n", difference, difference, dtype=np.float64)
    return squared


def _overlap(weights: sparse.csr_array, columns: sparse.csc_array, index: int) -> np.ndarray:
    """Returns Σ_c min(V[index, c], V[j, c]) for all images j, over nonzeros c of V[index]."""
    span = slice(weights.indptr[index], weights.indptr[index + 1])
    nonzero, values = weights.indices[span], weights.data[span]
    starts, lengths = columns.indptr[nonzero], np.diff(columns.indptr)[nonzero]
    offsets = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    entries = offsets + np.arange(lengths.sum())
    return np.bincount(
        columns.indices[entries],
        np.minimum(np.repeat(values, lengths), columns.data[entries]),
        minlength=weights.shape[0],
    )
