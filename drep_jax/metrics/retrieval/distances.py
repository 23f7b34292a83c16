"""Distances between queries and gallery: one matrix product per block of queries.

With x̃ = [−2x, 1, ‖x‖²] for a query and ỹ = [y, ‖y‖², 1] for a gallery image, x̃·ỹ = ‖x − y‖². For
unit vectors the cosine distance is 1 − x·y, and −x·y has the same order. The products in float32
are ranked.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.errors import ConfigError, DataError, did_you_mean

METRICS = ("euclidean", "cosine")
"""Distances by name."""

BLOCK_BYTES = {"cpu": 32 * 2**20}
"""Bytes of one block of distances by backend; counting is fastest where a block fits the cache."""

OTHER_BLOCK_BYTES = 256 * 2**20
"""Bytes of one block of distances on other backends."""

MOST_ROWS = 512
"""Largest number of queries in a block."""

_CHUNK = 4096
"""Rows processed at once on the host."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Queries and gallery in the form whose product is the distance.

    Attributes:
      query: (branches, q, width) float32, x̃ of each branch.
      gallery: (branches, g, width) float32 on the device, ỹ of each branch.
      views: views of queries (q,) and gallery (g,) with two branches; −1 is unknown. None
        otherwise.
      source: (g,) the column that holds each gallery image's distances; None if all features
        differ.
    """

    query: np.ndarray
    gallery: jax.Array
    views: tuple[np.ndarray, np.ndarray] | None
    source: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and gallery images."""
        return self.query.shape[1], self.gallery.shape[1]


def checked(features: Any, what: str) -> np.ndarray:
    """Returns features as float32, (n, width).

    Args:
      features: real numbers, (n, width).
      what: name of the set in messages.

    Raises:
      DataError: for another shape, no rows, or values that are not finite in float32.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise DataError(f"Features of the {what} have shape {features.shape}; expected one row an image, (n, width).")
    if len(features) == 0:
        raise DataError(f"The {what} is empty; retrieval needs at least one query and one gallery image.")
    if features.dtype.kind not in "biuf" and features.dtype.name != "bfloat16":
        raise DataError(f"Features of the {what} have type {features.dtype}; expected real numbers.")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(features, np.float32)
    bad = np.concatenate(
        [~np.isfinite(features[at : at + _CHUNK]).all(axis=1) for at in range(0, len(features), _CHUNK)]
    )
    if bad.any():
        raise DataError(
            f"{bad.sum()} of {len(features)} features of the {what} hold NaN or Inf, the first in row "
            f"{int(bad.argmax())}; such an image has no rank. Find the layer or the image that causes them."
        )
    return features


def unit(features: np.ndarray, what: str) -> np.ndarray:
    """Returns features scaled to unit length.

    Raises:
      DataError: for a feature of length zero, which has no direction.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))[:, None]
    zero = np.flatnonzero(lengths == 0)
    if zero.size:
        raise DataError(
            f'{zero.size} of {len(features)} features of the {what} are zero, the first in row {zero[0]}: "cosine" needs '
            'a direction. Use metric "euclidean", or find the layer whose output is zero.'
        )
    return features / lengths.astype(np.float32)


def both_checked(query: Any, gallery: Any, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of queries and gallery as float32, checked for a metric.

    Raises:
      ConfigError: for an unknown metric.
      DataError: for features that cannot be used.
    """
    if metric not in METRICS:
        raise ConfigError(f'Unknown metric "{metric}".{did_you_mean(str(metric), METRICS)}')
    query, gallery = checked(query, "query set"), checked(gallery, "gallery")
    if query.shape[1] != gallery.shape[1]:
        raise DataError(
            f"Queries have {query.shape[1]} features an image and the gallery {gallery.shape[1]}; both must come from "
            "one network."
        )
    return query, gallery


def prepare(
    query: Any,
    gallery: Any,
    metric: str = "euclidean",
    *,
    branches: int = 1,
    query_views: Any = None,
    gallery_views: Any = None,
) -> Pairs:
    """Checks features and converts them to the form whose product is the distance.

    Args:
      query, gallery: (q, width) and (g, width).
      metric: "euclidean" or "cosine"; they rank unit vectors alike.
      branches: 2 for features made of two halves, [same view | different view]. A pair is compared
        by the first half if both views are known and equal, otherwise by the second.
      query_views, gallery_views: with two branches, views from 0; negative is unknown.

    Raises:
      ConfigError: for an unknown metric or an unsupported number of branches.
      DataError: for features or views that cannot be used.
    """
    if branches not in (1, 2):
        raise ConfigError(f"branches = {branches}: expected 1, or 2 for [same view | different view].")
    query, gallery = both_checked(query, gallery, metric)
    if query.shape[1] % branches:
        raise DataError(f"Features of two branches have an even width; these have {query.shape[1]}.")
    views = None
    if branches == 2:
        views = numbers(query_views, len(query), "query views"), numbers(gallery_views, len(gallery), "gallery views")
    source = _source(gallery, views[1] if views else None)
    return Pairs(
        _extended(query, metric, branches, "query set", is_query=True),
        jnp.asarray(_extended(gallery, metric, branches, "gallery", is_query=False)),
        views,
        source,
    )


def blocks(pairs: Pairs, rows: int | None = None) -> Iterator[jax.Array]:
    """Yields the distances of consecutive queries to the whole gallery, (rows, g) float32.

    The last block may be shorter. The next block is computed while the caller uses the current one.

    Raises:
      ConfigError: for fewer than one row per block.
    """
    queries, gallery = pairs.shape
    if rows is None:
        rows = rows_at_once(gallery)
    if rows < 1:
        raise ConfigError(f"block = {rows}: expected at least one query per block.")
    rows = min(rows, queries)
    ready: jax.Array | None = None
    for start in range(0, queries, rows):
        block = _distances(
            _padded(pairs.query[:, start : start + rows], rows, axis=1),
            pairs.gallery,
            None if pairs.views is None else _padded(pairs.views[0][start : start + rows], rows),
            None if pairs.views is None else pairs.views[1],
            pairs.source,
        )
        if ready is not None:
            yield ready
        ready = block[: queries - start] if start + rows > queries else block
    if ready is not None:
        yield ready


def rows_at_once(gallery: int) -> int:
    """Returns the number of queries per block for a gallery of `gallery` images."""
    rows = BLOCK_BYTES.get(jax.default_backend(), OTHER_BLOCK_BYTES) // (4 * gallery)
    return max(8, min(rows, MOST_ROWS) // 8 * 8)


def numbers(values: Any, length: int, what: str) -> np.ndarray:
    """Returns `values` as one int64 per image.

    Raises:
      DataError: for None, another length, or values that are not integers.
    """
    if values is None:
        raise DataError(f"No {what}: expected one integer an image, ({length},).")
    values = np.asarray(values)
    if values.shape != (length,):
        raise DataError(f"{what} have shape {values.shape}; expected one an image, ({length},).".capitalize())
    if values.dtype.kind not in "iu":
        raise DataError(f"{what} have type {values.dtype}; expected integers.".capitalize())
    return values.astype(np.int64)


@functools.partial(jax.jit)
def _distances(
    query: jax.Array,
    gallery: jax.Array,
    query_views: jax.Array | None,
    gallery_views: jax.Array | None,
    source: jax.Array | None,
) -> jax.Array:
    """Returns the distances of a block, (b, g), with equal numbers for equal gallery features."""
    products = [
        jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        for x, y in zip(query, gallery, strict=True)
    ]
    distances = products[0]
    if query_views is not None and gallery_views is not None:
        same = (query_views[:, None] == gallery_views[None, :]) & (query_views >= 0)[:, None]
        distances = jnp.where(same, products[0], products[1])
    return distances if source is None else distances[:, source]


def _extended(features: np.ndarray, metric: str, branches: int, what: str, is_query: bool) -> np.ndarray:
    """Returns x̃ (queries) or ỹ (gallery) of every branch."""
    halves = np.split(features, branches, axis=1)
    if metric == "cosine":
        return np.stack([-unit(half, what) if is_query else unit(half, what) for half in halves])
    width = halves[0].shape[1]
    extended = np.empty((branches, len(features), width + 2), np.float32)
    for half, out in zip(halves, extended, strict=True):
        with np.errstate(over="ignore"):
            squares = np.einsum("nd,nd->n", half, half)
        large = np.flatnonzero(~(squares < np.finfo(np.float32).max / 4))
        if large.size:
            raise DataError(
                f"{large.size} of {len(half)} features of the {what} are too large to be squared in float32, the first in "
                f'row {large[0]}. Scale them, or use metric "cosine".'
            )
        out[:, :width] = -2 * half if is_query else half
        out[:, width], out[:, width + 1] = (1, squares) if is_query else (squares, 1)
    return extended


def _source(gallery: np.ndarray, views: np.ndarray | None) -> np.ndarray | None:
    """Returns the first gallery image with the same feature (and view) as each; None if all differ.

    A matrix product may round equal columns differently, depending on their position. So equal
    columns use the result of the first of them.
    """
    weights = np.random.default_rng(0).integers(0, 2**32, gallery.shape[1], dtype=np.uint32) | np.uint32(1)
    hashes = np.concatenate(
        [
            ((gallery[at : at + _CHUNK] + np.float32(0)).view(np.uint32) * weights).sum(axis=1, dtype=np.uint32)
            for at in range(0, len(gallery), _CHUNK)
        ]
    )
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(counts[inverse] > 1)
    if not candidates.size:
        return None
    rows = gallery[candidates]
    if views is not None:
        rows = np.concatenate([rows, views[candidates, None].astype(np.float32)], axis=1)
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    source = np.arange(len(gallery))
    source[candidates] = candidates[first[inverse.reshape(-1)]]
    return None if np.array_equal(source, np.arange(len(gallery))) else source.astype(np.int32)


def _padded(values: np.ndarray, length: int, axis: int = 0) -> np.ndarray:
    missing = length - values.shape[axis]
    if not missing:
        return values
    return np.pad(values, [(0, missing if at == axis else 0) for at in range(values.ndim)])
