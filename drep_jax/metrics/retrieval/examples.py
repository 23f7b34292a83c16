"""The ranked galleries of a report: which queries to show, and the images two arms rank first."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.pictures import small
from drep_jax.metrics.protocol import Protocol
from drep_jax.metrics.retrieval.evaluate import Result, pair_options, splits
from drep_jax.metrics.retrieval.ranking import top

GAINED, LOST, RANDOM = "largest gain", "largest loss", "drawn at random"


def choose(after: np.ndarray, before: np.ndarray, *, each: int = 2, seed: int = 0) -> list[tuple[int, str]]:
    """Returns the queries to show and the reason: largest gains, largest losses, random others.

    >>> choose(np.array([0.9, 0.2, 0.5]), np.array([0.1, 0.6, 0.5]), each=1)
    [(0, 'largest gain'), (1, 'largest loss'), (2, 'drawn at random')]

    Args:
      after, before: (n,) average precision of each query by the two arms.
      each: number of queries of each kind; fewer if fewer gained or lost.
      seed: of the random ones.

    Returns:
      (index of the query, reason).
    """
    change = after - before
    order = np.argsort(-change, kind="stable")
    selected = [(int(index), GAINED) for index in order[:each] if change[index] > 0]
    selected += [(int(index), LOST) for index in order[::-1][:each] if change[index] < 0]
    rest = np.setdiff1d(np.arange(len(change)), [index for index, _ in selected])
    random = np.random.default_rng(seed).permutation(rest)[:each]
    return selected + [(int(index), RANDOM) for index in random]


def ranked(
    features: Mapping[str, Any],
    results: Mapping[str, Result],
    table: Mapping[str, np.ndarray],
    protocol: Protocol,
    picture: Callable[[int], np.ndarray],
    *,
    condition: str = "clean",
    metric: str = "euclidean",
    branches: int = 1,
    k: int = 10,
    each: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns a report's `ranked`: queries with the first images of two arms, as thumbnails.

    With random galleries, the first of them is used. Distances are those of the features, without
    re-ranking.

    Args:
      features: two arms ↦ (n, width) of the table's images; the unchanged backbone comes first.
      results: arm ↦ the result of `evaluate`.
      table, protocol, metric, branches: as for `evaluate`.
      picture: row of the table ↦ image, uint8 (height, width, 3).
      condition: corruption of the images, for the title.
      k: gallery images per query.
      each, seed: as for `choose`.

    Raises:
      ConfigError: for a number of arms other than two.
      DataError: for arms that were not scored on the same queries.
    """
    if len(features) != 2 or list(features) != list(results):
        raise ConfigError(
            f"Ranked results compare two arms, the unchanged one first; these have features of {', '.join(features)} and "
            f"results of {', '.join(results)}."
        )
    before, after = results.values()
    if not np.array_equal(before.queries, after.queries):
        raise DataError("The arms were scored on different queries; a comparison needs the same table and protocol.")
    split = splits(table, protocol)[0]
    eligible = np.flatnonzero(np.isin(before.queries, split.query))
    selected = choose(after.scores["mAP"][eligible], before.scores["mAP"][eligible], each=each, seed=seed)
    positions = eligible[[index for index, _ in selected]]
    rows = before.queries[positions]
    selected_split = type(split)(rows, split.gallery)
    rankings: dict[str, list[list[dict[str, Any]]]] = {}
    for arm, arm_features in features.items() if len(rows) else ():
        arm_features = np.asarray(arm_features)
        indices, values, right = top(
            arm_features[rows],
            arm_features[split.gallery],
            k=k,
            metric=metric,
            branches=branches,
            query_views=table["view"][rows],
            gallery_views=table["view"][split.gallery],
            **pair_options(table, selected_split, protocol),
        )
        rankings[arm] = [
            [
                {"image": int(split.gallery[index]), "distance": float(distance), "right": bool(good)}
                for index, distance, good in zip(*ranking, strict=True)
                if index >= 0
            ]
            for ranking in zip(indices, values, right, strict=True)
        ]
    images = {int(row) for row in rows}
    images |= {entry["image"] for lists in rankings.values() for entries in lists for entry in entries}
    return {
        "condition": condition,
        "metric": metric,
        "arms": list(features),
        "queries": [
            {
                "image": int(row),
                "why": reason,
                "ap": {arm: float(result.scores["mAP"][position]) for arm, result in results.items()},
                "found": {arm: rankings[arm][index] for arm in features},
            }
            for index, (row, position, (_, reason)) in enumerate(zip(rows, positions, selected, strict=True))
        ],
        "images": {str(row): small(picture(row)) for row in sorted(images)},
    }


def effect(after: Result, before: Result) -> dict[str, Any]:
    """Returns the mean change of average precision, and the numbers of queries gained and lost."""
    change = after.scores["mAP"] - before.scores["mAP"]
    return {
        "mAP": 100.0 * float(np.mean(change)),
        "gained": int(np.sum(change > 0)),
        "lost": int(np.sum(change < 0)),
        "queries": len(change),
    }
