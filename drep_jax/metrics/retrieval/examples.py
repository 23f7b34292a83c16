"""The ranked galleries that a report shows: which queries, and what two arms find for them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.pictures import small
from drep_jax.metrics.protocol import Protocol
from drep_jax.metrics.retrieval.evaluate import Result, pair_options, splits
from drep_jax.metrics.retrieval.ranking import top

GAINED, LOST, RANDOM = "largest gain", "largest loss", "drawn at random"


def choose(ours: np.ndarray, theirs: np.ndarray, *, each: int = 2, seed: int = 0) -> list[tuple[int, str]]:
    """Returns the queries to show and why: those that gained and lost most, and some of the others at random.

    Args:
      ours, theirs: (n,) average precision of each query by the two arms.
      each: how many of each kind; fewer where fewer gained or lost.
      seed: of the draw.
    """
    change = ours - theirs
    order = np.argsort(-change, kind="stable")
    chosen = [(int(index), GAINED) for index in order[:each] if change[index] > 0]
    chosen += [(int(index), LOST) for index in order[::-1][:each] if change[index] < 0]
    rest = np.setdiff1d(np.arange(len(change)), [index for index, _ in chosen])
    drawn = np.random.default_rng(seed).permutation(rest)[:each]
    return chosen + [(int(index), RANDOM) for index in drawn]


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
    """Returns a report's `ranked`: some queries with the first images that two arms find, small pictures included.

    Of a protocol with trials it is the first gallery. Distances are those of the features, without re-ranking.

    Args:
      features: by arm (two: the unchanged backbone, then the denoised one), (n, width) of the table's images.
      results: by arm, what `evaluate` returned for them.
      table, protocol, metric, branches: as for `evaluate`.
      picture: returns the image of a row of the table, uint8 (height, width, 3).
      condition: what was done to the images, for the title.
      k: gallery images a query.
      each, seed: as for `choose`.

    Raises:
      ConfigError: for another number of arms than two.
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
    asked = np.flatnonzero(np.isin(before.queries, split.query))
    chosen = choose(after.scores["mAP"][asked], before.scores["mAP"][asked], each=each, seed=seed)
    places = asked[[index for index, _ in chosen]]
    rows = before.queries[places]
    shown = type(split)(rows, split.gallery)
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for arm, own in features.items() if len(rows) else ():
        own = np.asarray(own)
        indices, values, right = top(
            own[rows],
            own[split.gallery],
            k=k,
            metric=metric,
            branches=branches,
            query_views=table["view"][rows],
            gallery_views=table["view"][split.gallery],
            **pair_options(table, shown, protocol),
        )
        found[arm] = [
            [
                {"image": int(split.gallery[index]), "distance": float(distance), "right": bool(good)}
                for index, distance, good in zip(*one, strict=True)
                if index >= 0
            ]
            for one in zip(indices, values, right, strict=True)
        ]
    needed = {int(row) for row in rows}
    needed |= {entry["image"] for lists in found.values() for listed in lists for entry in listed}
    return {
        "condition": condition,
        "metric": metric,
        "arms": list(features),
        "queries": [
            {
                "image": int(row),
                "why": why,
                "ap": {arm: float(result.scores["mAP"][place]) for arm, result in results.items()},
                "found": {arm: found[arm][index] for arm in features},
            }
            for index, (row, place, (_, why)) in enumerate(zip(rows, places, chosen, strict=True))
        ],
        "images": {str(row): small(picture(row)) for row in sorted(needed)},
    }
