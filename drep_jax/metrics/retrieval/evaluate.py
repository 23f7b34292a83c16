"""A test split's retrieval scores under its protocol: single query, cross-camera rule, repeated random galleries."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.protocol import Protocol
from drep_jax.metrics.retrieval.distances import checked, numbers
from drep_jax.metrics.retrieval.ranking import Ranking, rank, rank_blocks, rules, scores
from drep_jax.metrics.retrieval.rerank import Rerank, reranked


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of the queries that have a match; which these are depends on the table alone, so arms are aligned.

    Attributes:
      scores: metric ↦ (n,) fractions, one a query; over trials, the mean over those in which the image is a query.
      queries: (n,) their rows in the table.
      identity: (n,) theirs, for intervals over persons instead of queries.
      trials: metric ↦ (trials,) mean over the queries of each trial, whose mean is the published number; one entry for a
        split of its own.
      counts: numbers of queries, of queries without a match, of gallery images, and of distractors among them (of
        identities that no query has); over trials, of the first.
    """

    scores: dict[str, np.ndarray]
    queries: np.ndarray
    identity: np.ndarray
    trials: dict[str, np.ndarray]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of the table that are queries and gallery."""

    query: np.ndarray
    gallery: np.ndarray


def evaluate(
    features: Any,
    table: Mapping[str, np.ndarray],
    protocol: Protocol,
    *,
    metric: str = "euclidean",
    branches: int = 1,
    rerank: Sequence[float] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Result:
    """Returns the retrieval scores of one arm.

    Args:
      features: (n, width), one row an image of the table.
      table: the test source's columns "label", "camera", "view", "query" and "gallery".
      protocol: that of the data set.
      metric: "euclidean" or "cosine" (Euclidean after making every feature of length one).
      branches: 2 for features [same view | different view].
      rerank: (k1, k2, λ) for k-reciprocal re-ranking, None for none.
      ks: places of CMC to score.

    Raises:
      DataError: for a table or features that cannot be used, no queries, an empty gallery, or no query with a match.
      ConfigError: for options that do not exist or do not go together.
    """
    constants = None
    if rerank is not None:
        if branches != 1:
            raise ConfigError("Re-ranking compares neighbours in one space; use it with branches = 1, or without.")
        k1, k2, share = rerank
        constants = Rerank(int(k1), int(k2), float(share))
    features = checked(features, "test split")
    columns = _columns(table, len(features))
    found: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    counts: dict[str, int] = {}
    for split in splits(columns, protocol):
        ranking = _ranking(features, columns, split, protocol, metric, branches, constants)
        found.append((split.query[ranking.valid], scores(ranking, ks)))
        counts = counts or _counts(columns["label"], split, ranking)
    queries = np.unique(np.concatenate([rows for rows, _ in found]))
    places = np.concatenate([np.searchsorted(queries, rows) for rows, _ in found])
    times = np.bincount(places)
    return Result(
        {
            name: np.bincount(places, np.concatenate([values[name] for _, values in found])) / times
            for name in found[0][1]
        },
        queries,
        columns["label"][queries],
        {name: np.array([values[name].mean() for _, values in found]) for name in found[0][1]},
        counts,
    )


def splits(table: Mapping[str, np.ndarray], protocol: Protocol) -> list[Split]:
    """Returns the split of the table, or for a protocol of `trials` that many: one random image an identity is the gallery.

    Raises:
      DataError: for no queries or an empty gallery.
    """
    if not protocol.trials:
        drawn = [Split(np.flatnonzero(table["query"]), np.flatnonzero(table["gallery"]))]
    else:
        rng, drawn = np.random.default_rng(protocol.seed), []
        for _ in range(protocol.trials):
            order = rng.permutation(len(table["label"]))
            _, first = np.unique(table["label"][order], return_index=True)
            gallery = np.sort(order[first])
            drawn.append(Split(np.setdiff1d(np.arange(len(order)), gallery), gallery))
    for what, rows in (("queries", drawn[0].query), ("gallery images", drawn[0].gallery)):
        if not len(rows):
            why = (
                " every identity has one image"
                if protocol.trials
                else ' none has the flag; see its columns "query" and "gallery"'
            )
            raise DataError(f"The test split has no {what}:{why}.")
    return drawn


def pair_options(table: Mapping[str, np.ndarray], split: Split, protocol: Protocol) -> dict[str, Any]:
    """Returns identities, cameras and own pictures of a split as `ranking.rules` takes them."""
    return {
        "cross_camera": protocol.cross_camera,
        **{
            f"{who}_{what}": values[rows]
            for who, rows in (("query", split.query), ("gallery", split.gallery))
            for what, values in (
                ("ids", table["label"]),
                ("cameras", table["camera"]),
                ("images", np.arange(len(table["label"]))),
            )
        },
    }


def _ranking(
    features: np.ndarray,
    table: Mapping[str, np.ndarray],
    split: Split,
    protocol: Protocol,
    metric: str,
    branches: int,
    constants: Rerank | None,
) -> Ranking:
    query, gallery = features[split.query], features[split.gallery]
    options = pair_options(table, split, protocol)
    if constants is not None:
        return rank_blocks(reranked(query, gallery, constants, metric=metric), rules(**options))
    views = {"query_views": table["view"][split.query], "gallery_views": table["view"][split.gallery]}
    return rank(query, gallery, metric=metric, branches=branches, **views, **options)


def _columns(table: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    missing = [name for name in ("label", "camera", "view", "query", "gallery") if name not in table]
    if missing:
        raise DataError(
            f"The table of the test split has no column {', '.join(missing)}; retrieval needs label, camera, view, query "
            "and gallery. Is it a re-identification set?"
        )
    if length != len(table["label"]):
        raise DataError(f"{length} features but {len(table['label'])} images in the test split; expected one each.")
    return {
        name: numbers(table[name], length, f"column {name}") for name in ("label", "camera", "view", "query", "gallery")
    }


def _counts(labels: np.ndarray, split: Split, ranking: Ranking) -> dict[str, int]:
    known = np.isin(labels[split.gallery], labels[split.query])
    return {
        "queries": len(split.query),
        "without_match": int((~ranking.valid).sum()),
        "gallery": len(split.gallery),
        "distractors": int((~known).sum()),
    }
