"""Average precision, CMC and inverse negative penalty of queries, from ranks of right images.

No gallery is sorted. The k-th right image of a query (from 0), at distance t, has rank k + #{wrong:
d ≤ t}, also from 0. So ties count against the network: a wrong image at the same distance ranks
before it. The order among right images at one distance does not matter.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.retrieval.distances import blocks, numbers, prepare

MANY = 256
"""Number of right images above which sorting a row is faster than counting for each of them."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The scores of every query's ranked gallery, in the order of the queries, (q,) each.

    Attributes:
      ap: average precision, the mean over right images of (right images up to it) / (its rank from
        1); NaN without a right image.
      inp: inverse negative penalty, right images / (rank of the last of them from 1); NaN without
        one.
      first: rank of the first right image from 0; −1 without one.
      valid: whether the gallery holds a right image.
      matches: number of right images.
      gallery: number of gallery images compared, without those that the protocol excludes.
    """

    ap: np.ndarray
    inp: np.ndarray
    first: np.ndarray
    valid: np.ndarray
    matches: np.ndarray
    gallery: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which gallery images are right for a query, and which are excluded; the rest are wrong.

    Attributes:
      query, gallery: identities, (q,) and (g,).
      cameras: cameras of queries and gallery, if images of the query's identity and camera are
        excluded; otherwise None.
      images: image indices of queries and gallery, if a query's own image is excluded; otherwise
        None.
    """

    query: np.ndarray
    gallery: np.ndarray
    cameras: tuple[np.ndarray, np.ndarray] | None
    images: tuple[np.ndarray, np.ndarray] | None

    def same_identity(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields each query's gallery images of the same identity, and which of them are right."""
        order = np.argsort(self.gallery, kind="stable")
        sorted_ids = self.gallery[order]
        starts = np.searchsorted(sorted_ids, self.query, side="left")
        ends = np.searchsorted(sorted_ids, self.query, side="right")
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            candidates = order[start:end]
            right = np.ones(len(candidates), bool)
            for pair in (self.cameras, self.images):
                if pair is not None:
                    right &= pair[1][candidates] != pair[0][index]
            yield candidates, right


def rules(
    query_ids: Any,
    gallery_ids: Any,
    *,
    query_cameras: Any = None,
    gallery_cameras: Any = None,
    cross_camera: bool = True,
    query_images: Any = None,
    gallery_images: Any = None,
) -> Rules:
    """Returns the rules of one evaluation.

    No identity is special, not even a negative one. Leave what a protocol calls junk out of the
    gallery. A distractor has an identity that no query has.

    Args:
      query_ids, gallery_ids, query_cameras, gallery_cameras, cross_camera, query_images,
        gallery_images: as for `rank`.

    Raises:
      DataError: for arrays of the wrong length or type, no queries, an empty gallery, or the
        cross-camera rule without cameras.
    """
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    for what, ids in (("query", query_ids), ("gallery", gallery_ids)):
        if ids.size == 0:
            raise DataError(f"The {what} set is empty; retrieval needs at least one query and one gallery image.")
    q, g = query_ids.size, gallery_ids.size
    query_ids, gallery_ids = numbers(query_ids, q, "query identities"), numbers(gallery_ids, g, "gallery identities")
    cameras = images = None
    if cross_camera:
        if query_cameras is None or gallery_cameras is None:
            raise DataError(
                "The cross-camera rule needs the cameras of queries and gallery; without them, use cross_camera=False."
            )
        cameras = numbers(query_cameras, q, "query cameras"), numbers(gallery_cameras, g, "gallery cameras")
    if query_images is not None or gallery_images is not None:
        images = numbers(query_images, q, "query images"), numbers(gallery_images, g, "gallery images")
    return Rules(query_ids, gallery_ids, cameras, images)


def rank(
    query: Any,
    gallery: Any,
    *,
    query_ids: Any,
    gallery_ids: Any,
    query_cameras: Any = None,
    gallery_cameras: Any = None,
    cross_camera: bool = True,
    query_images: Any = None,
    gallery_images: Any = None,
    query_views: Any = None,
    gallery_views: Any = None,
    branches: int = 1,
    metric: str = "euclidean",
    block: int | None = None,
    jitted: bool | None = None,
) -> Ranking:
    """Ranks the gallery for every query; memory holds two blocks of queries × gallery.

    >>> query, gallery = np.array([[0.0]]), np.array([[1.0], [2.0], [3.0]])
    >>> ids = {"query_ids": np.array([7]), "gallery_ids": np.array([5, 7, 7])}
    >>> ranking = rank(query, gallery, cross_camera=False, **ids)
    >>> float(ranking.ap[0]), int(ranking.first[0])  # (1/2 + 2/3) / 2, rank from 0
    (0.5833333333333333, 1)

    Args:
      query, gallery: (q, width) and (g, width) features; compared in float32.
      query_ids, gallery_ids: (q,) and (g,) identities.
      query_cameras, gallery_cameras: (q,) and (g,), for `cross_camera`.
      cross_camera: whether to exclude gallery images with the query's identity and camera.
      query_images, gallery_images: (q,) and (g,) image indices; a query's own image is excluded.
      query_views, gallery_views, branches, metric: see
        `drep_jax.metrics.retrieval.distances.prepare`.
      block: queries per block; None for as many as fit a few MiB.
      jitted: whether JAX's device counts the ranks instead of NumPy; None for JAX on an
        accelerator. The results are the same.

    Returns:
      One entry per query.

    Raises:
      DataError: for invalid features, identities, cameras or views.
      ConfigError: for an unknown metric, or a number of branches other than 1 and 2.
    """
    rule = rules(
        query_ids,
        gallery_ids,
        query_cameras=query_cameras,
        gallery_cameras=gallery_cameras,
        cross_camera=cross_camera,
        query_images=query_images,
        gallery_images=gallery_images,
    )
    views = {"query_views": query_views, "gallery_views": gallery_views}
    pairs = prepare(query, gallery, metric, branches=branches, **views)
    _same_sizes(pairs.shape, rule)
    return rank_blocks(blocks(pairs, block), rule, jitted=jitted)


def rank_blocks(rows: Iterable[Any], rule: Rules, *, jitted: bool | None = None) -> Ranking:
    """Ranks the gallery by given distances.

    Args:
      rows: blocks (b, g) of consecutive queries, together (q, g).
      rule: which gallery images are right.
      jitted: as for `rank`.

    Raises:
      DataError: for blocks of another shape, or distances that are NaN.
    """
    count = _count_on_device if (jax.default_backend() != "cpu" if jitted is None else jitted) else _count
    q, g = len(rule.query), len(rule.gallery)
    ranking = Ranking(
        np.full(q, np.nan),
        np.full(q, np.nan),
        np.full(q, -1, np.int64),
        np.zeros(q, bool),
        np.zeros(q, np.int64),
        np.full(q, g, np.int64),
    )
    candidates, index = rule.same_identity(), 0
    for block in rows:
        if block.ndim != 2 or block.shape[1] != g or index + len(block) > q:
            raise DataError(f"Distances of shape {block.shape} at query {index} of {q}; expected (rows, {g}).")
        in_block = list(itertools.islice(candidates, len(block)))
        for ranks, (_, right) in zip(count(block, in_block), in_block, strict=True):
            _enter(ranking, index, ranks, right)
            index += 1
    if index != q:
        raise DataError(f"Distances of {index} queries; expected all {q}.")
    return ranking


def scores(ranking: Ranking, ks: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """Returns the scores of every query with a match, in the order of the queries.

    Args:
      ranking: of all queries.
      ks: ranks of CMC.

    Returns:
      {"mAP": (n,), "rank1": (n,) of 0 or 1, …, "mINP": (n,)}, fractions; their means are the
      published numbers.

    Raises:
      DataError: where no query has a match.
    """
    valid = _some(ranking)
    hits = {f"rank{k}": (ranking.first[valid] < k).astype(np.float64) for k in ks}
    return {"mAP": ranking.ap[valid], **hits, "mINP": ranking.inp[valid]}


def cmc(ranking: Ranking, most: int = 50) -> np.ndarray:
    """Returns the cumulative matching curve, the fraction of queries matched by each rank.

    It never falls, and is 1 from the size of the gallery on.

    Args:
      ranking: of all queries; those without a match do not count.
      most: last rank.

    Returns:
      Fractions, (most,).

    Raises:
      DataError: where no query has a match.
    """
    first = ranking.first[_some(ranking)]
    return np.cumsum(np.bincount(np.minimum(first, most), minlength=most + 1))[:most] / len(first)


def top(
    query: Any, gallery: Any, *, k: int = 10, metric: str = "euclidean", block: int | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the k nearest gallery images of every query under the rules of `rank`, nearest first.

    At equal distance, wrong images come before right ones, then lower indices before higher ones.

    Args:
      query, gallery, metric, block, **options: as for `rank`.
      k: images per query.

    Returns:
      Gallery indices (q, k), distances (q, k; Euclidean or 1 − cosine), and whether each image is
      right (q, k). Beyond the end of the gallery they are −1, NaN and False.

    Raises:
      DataError, ConfigError: as `rank`.
    """
    if k < 1:
        raise ConfigError(f"k = {k}: expected at least one image per query.")
    of_pairs = ("branches", "query_views", "gallery_views")
    pairs = prepare(query, gallery, metric, **{name: options.pop(name) for name in of_pairs if name in options})
    rule = rules(options.pop("query_ids"), options.pop("gallery_ids"), **options)
    _same_sizes(pairs.shape, rule)
    q = pairs.shape[0]
    indices, values, right = np.full((q, k), -1), np.full((q, k), np.nan), np.zeros((q, k), bool)
    candidates, index = rule.same_identity(), 0
    for rows in blocks(pairs, block):
        for row, (same, is_right) in zip(np.array(rows), candidates, strict=False):
            row[same[~is_right]] = np.inf
            right_in_row = np.zeros(len(row), bool)
            right_in_row[same[is_right]] = True
            limit = np.partition(row, k - 1)[k - 1] if k < len(row) else np.inf
            nearest = np.flatnonzero((row <= limit) & (row < np.inf))
            nearest = nearest[np.lexsort((nearest, right_in_row[nearest], row[nearest]))][:k]
            indices[index, : len(nearest)] = nearest
            values[index, : len(nearest)] = row[nearest]
            right[index, : len(nearest)] = right_in_row[nearest]
            index += 1
    return indices, 1 + values if metric == "cosine" else np.sqrt(np.maximum(values, 0)), right


def _some(ranking: Ranking) -> np.ndarray:
    if not ranking.valid.any():
        raise DataError(
            f"None of the {len(ranking.valid)} queries has a right image in the gallery; are identities of queries and "
            "gallery numbered alike, and seen by more than one camera?"
        )
    return ranking.valid


def _same_sizes(shape: tuple[int, int], rule: Rules) -> None:
    for what, features, ids in (("queries", shape[0], rule.query), ("gallery images", shape[1], rule.gallery)):
        if features != len(ids):
            raise DataError(f"{features} features but {len(ids)} identities of {what}; expected one each.")


def _enter(ranking: Ranking, index: int, ranks: np.ndarray, right: np.ndarray) -> None:
    """Writes a query's metrics from the ranks of its right images, ascending from 0."""
    ranking.gallery[index] -= len(right) - int(right.sum())
    ranking.matches[index] = len(ranks)
    if len(ranks):
        ranking.valid[index] = True
        ranking.ap[index] = np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1))
        ranking.inp[index] = len(ranks) / (ranks[-1] + 1)
        ranking.first[index] = ranks[0]


def _ranks(distances: np.ndarray, right: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Returns the ranks of a query's right images, ascending, from 0.

    Args:
      distances: (m,) distances of the gallery images of its identity.
      right: (m,) which of these are right.
      near: number of gallery images up to the distance of each right one, of any identity,
        ascending.
    """
    thresholds = np.sort(distances[right])
    wrong = near - np.searchsorted(np.sort(distances), thresholds, side="right")
    return wrong + np.arange(len(thresholds))


def _no_nan(largest: Any) -> None:
    """Raises `DataError` if the maximum of a block is NaN, as it is if any entry is."""
    if np.isnan(largest):
        raise DataError("A distance is NaN; such an image has no rank.")


def _count(block: Any, candidates: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Yields the ranks of each query's right images, counted by NumPy row by row, in the cache."""
    block = np.asarray(block)
    _no_nan(block.max())
    below = np.empty(block.shape[1], bool)
    for row, (same, right) in zip(block, candidates, strict=True):
        thresholds = np.sort(row[same[right]])
        if len(thresholds) > MANY:
            near = np.searchsorted(np.sort(row), thresholds, side="right")
        else:
            near = np.array([np.count_nonzero(np.less_equal(row, t, out=below)) for t in thresholds], np.int64)
        yield _ranks(row[same], right, near)


def _count_on_device(block: Any, candidates: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Yields the ranks of each query's right images, counted by one program per block."""
    most = max(1, *(len(same) for same, _ in candidates))
    columns = np.zeros((len(candidates), 1 << (most - 1).bit_length()), np.int32)  # few sizes, few compilations
    for row, (same, _) in zip(columns, candidates, strict=True):
        row[: len(same)] = same
    distances, near, largest = jax.device_get(_counted(jnp.asarray(block), columns))
    _no_nan(largest)
    for row, count, (same, right) in zip(distances, near, candidates, strict=True):
        yield _ranks(row[: len(same)], right, np.sort(count[: len(same)][right]))


@jax.jit
def _counted(block: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns distances at `columns` (b, m), counts of the row up to each, and the maximum."""
    distances = jnp.take_along_axis(block, columns, axis=1)
    if columns.shape[1] > MANY:
        near = jax.vmap(lambda row, at: jnp.searchsorted(row, at, side="right"))(jnp.sort(block, axis=1), distances)
    else:
        near = jnp.sum(block[:, None, :] <= distances[:, :, None], axis=-1, dtype=jnp.int32)
    return distances, near, jnp.max(block)
