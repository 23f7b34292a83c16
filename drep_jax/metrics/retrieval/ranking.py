"""Average precision, CMC and inverse negative penalty of every query, from the ranks of its right images alone.

No gallery is sorted: the right image at distance t, the k-th of its query (from 0), has the rank k + #{wrong: d ≤ t}, also
from 0. So a wrong image at the same distance comes before it (ties count against the network), and among right images at
one distance it makes no difference which is called first.
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
"""Right images of a query from which on sorting its row is quicker than counting for each of them."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a query's ranked gallery amounts to; one entry a query, in the queries' order.

    Attributes:
      ap: average precision, mean over the right images of (right ones up to it) / (its rank from 1); NaN without any.
      inp: inverse negative penalty, right images / rank of the last of them from 1; NaN without any.
      first: rank of the first right image from 0; −1 without any.
      valid: whether the gallery holds a right image.
      matches: how many.
      gallery: images it was compared with, without those left out by the protocol.
    """

    ap: np.ndarray
    inp: np.ndarray
    first: np.ndarray
    valid: np.ndarray
    matches: np.ndarray
    gallery: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which gallery images are right for a query, and which are left out; the rest are wrong.

    Attributes:
      query, gallery: identities, (q,) and (g,).
      cameras: those of queries and gallery where images of the query's identity and camera are left out, else None.
      images: which picture each query and each gallery entry is, where a picture must not find itself, else None.
    """

    query: np.ndarray
    gallery: np.ndarray
    cameras: tuple[np.ndarray, np.ndarray] | None
    images: tuple[np.ndarray, np.ndarray] | None

    def own(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields for each query the gallery images of its identity, and which of them are right (not left out)."""
        order = np.argsort(self.gallery, kind="stable")
        sorted_ids = self.gallery[order]
        starts = np.searchsorted(sorted_ids, self.query, side="left")
        ends = np.searchsorted(sorted_ids, self.query, side="right")
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            own = order[start:end]
            right = np.ones(len(own), bool)
            for pair in (self.cameras, self.images):
                if pair is not None:
                    right &= pair[1][own] != pair[0][index]
            yield own, right


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

    Identities are names and nothing else: none is special, negative ones neither. What a protocol calls junk is not to
    be in the gallery at all; a distractor has an identity that no query has.

    Raises:
      DataError: for arrays of the wrong length or type, no queries, an empty gallery, or the cross-camera rule without
        cameras.
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
    """Ranks the gallery for every query, holding two blocks of queries × gallery.

    Args:
      query, gallery: (q, width) and (g, width) features; compared in float32.
      query_ids, gallery_ids: (q,) and (g,) identities.
      query_cameras, gallery_cameras: (q,) and (g,), for `cross_camera`.
      cross_camera: leave out the gallery images that have the query's identity and its camera.
      query_images, gallery_images: (q,) and (g,) numbers of the pictures; a query's own picture is left out.
      query_views, gallery_views, branches, metric: see `drep_jax.metrics.retrieval.distances.prepare`.
      block: queries at once; None for as many as a few MiB hold.
      jitted: whether ranks are counted on JAX's device, or by NumPy; None for the first on an accelerator. The results
        are the same.

    Raises:
      DataError: for features, identities, cameras or views that cannot be used.
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
    """Ranks the gallery by distances that are given: blocks (b, g) of consecutive queries, all of them together (q, g).

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
    each, index = rule.own(), 0
    for block in rows:
        if block.ndim != 2 or block.shape[1] != g or index + len(block) > q:
            raise DataError(f"Distances of shape {block.shape} at query {index} of {q}; expected (rows, {g}).")
        own = list(itertools.islice(each, len(block)))
        for ranks, (_, right) in zip(count(block, own), own, strict=True):
            _enter(ranking, index, ranks, right)
            index += 1
    if index != q:
        raise DataError(f"Distances of {index} queries; expected those of all {q}.")
    return ranking


def scores(ranking: Ranking, ks: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """Returns the scores of every query that has a match, in the order of the queries, as fractions.

    Returns:
      {"mAP": (n,), "rank1": (n,) of 0 or 1, …, "mINP": (n,)}; their means are the published numbers.

    Raises:
      DataError: where no query has a match.
    """
    valid = _some(ranking)
    found = {"mAP": ranking.ap[valid]}
    found |= {f"rank{k}": (ranking.first[valid] < k).astype(np.float64) for k in ks}
    return found | {"mINP": ranking.inp[valid]}


def cmc(ranking: Ranking, most: int = 50) -> np.ndarray:
    """Returns the share of queries with a match among the first 1, 2, …, `most` images, (most,).

    It never falls, and stays at 1 from the size of the gallery on.
    """
    first = ranking.first[_some(ranking)]
    return np.cumsum(np.bincount(np.minimum(first, most), minlength=most + 1))[:most] / len(first)


def top(
    query: Any, gallery: Any, *, k: int = 10, metric: str = "euclidean", block: int | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the k nearest gallery images of every query under the rules of `rank`, the nearest first.

    At one distance wrong images come before right ones, and lower indices before higher ones.

    Args:
      query, gallery, metric, block, **options: as for `rank`.
      k: images a query.

    Returns:
      indices (q, k) into the gallery, −1 where it has no more images; their distances (q, k), Euclidean or 1 − cosine,
      NaN there; whether each is right (q, k).

    Raises:
      DataError, ConfigError: as `rank`.
    """
    if k < 1:
        raise ConfigError(f"k = {k}: expected at least one image a query.")
    places = ("branches", "query_views", "gallery_views")
    pairs = prepare(query, gallery, metric, **{name: options.pop(name) for name in places if name in options})
    rule = rules(options.pop("query_ids"), options.pop("gallery_ids"), **options)
    _same_sizes(pairs.shape, rule)
    q = pairs.shape[0]
    indices, values, right = np.full((q, k), -1), np.full((q, k), np.nan), np.zeros((q, k), bool)
    each, index = rule.own(), 0
    for rows in blocks(pairs, block):
        for row, (own, good) in zip(np.array(rows), each, strict=False):
            row[own[~good]] = np.inf
            marks = np.zeros(len(row), bool)
            marks[own[good]] = True
            edge = np.partition(row, k - 1)[k - 1] if k < len(row) else np.inf
            near = np.flatnonzero((row <= edge) & (row < np.inf))
            near = near[np.lexsort((near, marks[near], row[near]))][:k]
            indices[index, : len(near)] = near
            values[index, : len(near)] = row[near]
            right[index, : len(near)] = marks[near]
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
    """Writes one query's metrics from the ranks of its right images, ascending from 0."""
    ranking.gallery[index] -= len(right) - int(right.sum())
    ranking.matches[index] = len(ranks)
    if len(ranks):
        ranking.valid[index] = True
        ranking.ap[index] = np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1))
        ranking.inp[index] = len(ranks) / (ranks[-1] + 1)
        ranking.first[index] = ranks[0]


def _ranks(distances: np.ndarray, right: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Ranks of the right images of one query, ascending, from 0.

    Args:
      distances: (m,) of the gallery images of its identity.
      right: (m,) which of them are not left out.
      near: gallery images up to the distance of each right one, those of its identity included, ascending.
    """
    thresholds = np.sort(distances[right])
    wrong = near - np.searchsorted(np.sort(distances), thresholds, side="right")
    return wrong + np.arange(len(thresholds))


def _no_nan(largest: Any) -> None:
    """Refuses a block whose maximum is NaN, which it is where any of it is."""
    if np.isnan(largest):
        raise DataError("A distance is NaN; such an image has no rank.")


def _count(block: Any, own: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Ranks of each query's right images, counted by NumPy: a row stays in the cache while its images are counted."""
    block = np.asarray(block)
    _no_nan(block.max())
    below = np.empty(block.shape[1], bool)
    for row, (mine, right) in zip(block, own, strict=True):
        thresholds = np.sort(row[mine[right]])
        if len(thresholds) > MANY:
            near = np.searchsorted(np.sort(row), thresholds, side="right")
        else:
            near = np.array([np.count_nonzero(np.less_equal(row, t, out=below)) for t in thresholds], np.int64)
        yield _ranks(row[mine], right, near)


def _count_on_device(block: Any, own: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Ranks of each query's right images, counted by one program for a whole block."""
    most = max(1, *(len(mine) for mine, _ in own))
    places = np.zeros((len(own), 1 << (most - 1).bit_length()), np.int32)  # few sizes, few compilations
    for place, (mine, _) in zip(places, own, strict=True):
        place[: len(mine)] = mine
    distances, near, largest = jax.device_get(_counted(jnp.asarray(block), places))
    _no_nan(largest)
    for row, count, (mine, right) in zip(distances, near, own, strict=True):
        yield _ranks(row[: len(mine)], right, np.sort(count[: len(mine)][right]))


@jax.jit
def _counted(block: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distances at the given columns (b, m), how many of the row are no larger than each of them, and the largest of all."""
    found = jnp.take_along_axis(block, places, axis=1)
    if places.shape[1] > MANY:
        near = jax.vmap(lambda row, at: jnp.searchsorted(row, at, side="right"))(jnp.sort(block, axis=1), found)
    else:
        near = jnp.sum(block[:, None, :] <= found[:, :, None], axis=-1, dtype=jnp.int32)
    return found, near, jnp.max(block)
