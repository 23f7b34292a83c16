"""Retrieval scores of a test split under its protocol: cross-camera rule, random galleries."""

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
    """Scores of the queries with a match; these depend on the table alone, so arms are aligned.

    Attributes:
      scores: metric ↦ (n,) fractions, one per query; with trials, the mean over those trials in
        which the image is a query.
      queries: (n,) rows of the queries in the table.
      identity: (n,) identities of the queries, for intervals over persons instead of queries.
      trials: metric ↦ (trials,) the mean over the queries of each trial; the mean of these is the
        published number. Without trials there is one entry.
      counts: numbers of queries, of queries without a match, of gallery images, and of distractors
        (gallery images whose identity no query has); with trials, those of the first.
    """

    scores: dict[str, np.ndarray]
    queries: np.ndarray
    identity: np.ndarray
    trials: dict[str, np.ndarray]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of the table that are queries, and rows that are gallery images."""

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
      features: (n, width), one row per image of the table.
      table: the columns "label", "camera", "view", "query" and "gallery" of the test source, (n,)
        each.
      protocol: the evaluation protocol of the data set.
      metric: "euclidean" or "cosine" (Euclidean on features of unit length).
      branches: 2 for features [same view | different view].
      rerank: (k1, k2, λ) of k-reciprocal re-ranking; None for none.
      ks: ranks at which CMC is scored.

    Returns:
      The scores of all queries with a match, as fractions.

    Raises:
      DataError: for an invalid table or features, no queries, an empty gallery, or no query with a
        match.
      ConfigError: for unknown options or an invalid combination of them.
    """
    constants = None
    if rerank is not None:
        if branches != 1:
            raise ConfigError("Re-ranking compares neighbors in one space; set branches = 1, or leave out re-ranking.")
        k1, k2, original_weight = rerank
        constants = Rerank(int(k1), int(k2), float(original_weight))
    features = checked(features, "test split")
    columns = _columns(table, len(features))
    trials: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    counts: dict[str, int] = {}
    for split in splits(columns, protocol):
        ranking = _ranking(features, columns, split, protocol, metric, branches, constants)
        trials.append((split.query[ranking.valid], scores(ranking, ks)))
        counts = counts or _counts(columns["label"], split, ranking)
    queries = np.unique(np.concatenate([rows for rows, _ in trials]))
    positions = np.concatenate([np.searchsorted(queries, rows) for rows, _ in trials])
    trials_of_query = np.bincount(positions)
    return Result(
        {
            name: np.bincount(positions, np.concatenate([values[name] for _, values in trials])) / trials_of_query
            for name in trials[0][1]
        },
        queries,
        columns["label"][queries],
        {name: np.array([values[name].mean() for _, values in trials]) for name in trials[0][1]},
        counts,
    )


def splits(table: Mapping[str, np.ndarray], protocol: Protocol) -> list[Split]:
    """Returns the split of the table; with `protocol.trials`, one per random gallery.

    A random gallery holds one image per identity; the other images are the queries.

    Raises:
      DataError: for no queries or an empty gallery.
    """
    if not protocol.trials:
        result = [Split(np.flatnonzero(table["query"]), np.flatnonzero(table["gallery"]))]
    else:
        rng, result = np.random.default_rng(protocol.seed), []
        for _ in range(protocol.trials):
            order = rng.permutation(len(table["label"]))
            _, first = np.unique(table["label"][order], return_index=True)
            gallery = np.sort(order[first])
            result.append(Split(np.setdiff1d(np.arange(len(order)), gallery), gallery))
    for what, rows in (("queries", result[0].query), ("gallery images", result[0].gallery)):
        if not len(rows):
            reason = (
                " every identity has one image"
                if protocol.trials
                else ' none has the flag; see its columns "query" and "gallery"'
            )
            raise DataError(f"The test split has no {what}:{reason}.")
    return result


def pair_options(table: Mapping[str, np.ndarray], split: Split, protocol: Protocol) -> dict[str, Any]:
    """Returns a split's arguments of `ranking.rules`: identities, cameras and image indices."""
    return {
        "cross_camera": protocol.cross_camera,
        **{
            f"{side}_{column}": values[rows]
            for side, rows in (("query", split.query), ("gallery", split.gallery))
            for column, values in (
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
    matched = np.isin(labels[split.gallery], labels[split.query])
    return {
        "queries": len(split.query),
        "without_match": int((~ranking.valid).sum()),
        "gallery": len(split.gallery),
        "distractors": int((~matched).sum()),
    }
