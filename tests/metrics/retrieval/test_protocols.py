"""Evaluation of a test split: its flags, its cameras, and VehicleID's random galleries."""

import numpy as np
import pytest

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.protocol import Protocol
from drep_jax.metrics.retrieval.evaluate import evaluate, splits
from tests.metrics.retrieval import naive


@pytest.fixture(scope="module")
def market():
    """Queries, then their gallery with distractors, one image with both flags, one query without a match."""
    rng = np.random.default_rng(0)
    n = 90
    label = rng.integers(0, 9, n)
    label[40:55] = 99  # distractors, in the gallery alone
    label[3] = 50
    query = np.arange(n) < 20
    gallery = ~query
    gallery[5] = True
    features = rng.standard_normal((100, 8))[label] + rng.standard_normal((n, 8))
    columns = {"label": label, "camera": rng.integers(0, 3, n), "view": rng.integers(-1, 2, n)}
    columns |= {"query": query, "gallery": gallery}
    return features.astype(np.float32), {name: values.astype(np.int32) for name, values in columns.items()}


def expected(features, table, cross_camera=True):
    queries, gallery = np.flatnonzero(table["query"]), np.flatnonzero(table["gallery"])
    found = {}
    for i in queries:
        row = [naive.squared(features[i].tolist(), features[j].tolist()) for j in gallery]
        listed = naive.ranked(
            row,
            table["label"][i],
            table["label"][gallery],
            table["camera"][i] if cross_camera else None,
            table["camera"][gallery],
            own=dict(zip(gallery, range(len(gallery)), strict=True)).get(i),
        )
        found[i] = naive.metrics(listed)
    return {i: entry for i, entry in found.items() if entry}


@pytest.mark.parametrize("cross_camera", [True, False])
def test_a_split_of_its_own(market, cross_camera):
    features, table = market
    result = evaluate(features, table, Protocol(cross_camera=cross_camera))
    right = expected(features, table, cross_camera)
    assert result.queries.tolist() == list(right)
    np.testing.assert_allclose(result.scores["mAP"], [ap for ap, *_ in right.values()])
    np.testing.assert_allclose(result.scores["mINP"], [inp for _, inp, *_ in right.values()])
    for k in (1, 5, 10):
        assert result.scores[f"rank{k}"].tolist() == [first < k for *_, first, _ in right.values()]
    np.testing.assert_array_equal(result.identity, table["label"][result.queries])
    np.testing.assert_allclose(result.trials["mAP"], [result.scores["mAP"].mean()])
    # Image 5 stands in the gallery too; label 99's fifteen and what no query shares are distractors.
    distractors = sum(one not in set(table["label"][:20]) for one in table["label"][table["gallery"] == 1])
    assert result.counts == {"queries": 20, "without_match": 20 - len(right), "gallery": 71, "distractors": distractors}
    assert 3 not in result.queries


def test_arms_have_the_same_queries(market):
    features, table = market
    one, other = (evaluate(values, table, Protocol()) for values in (features, -features[::-1]))
    assert one.queries.tolist() == other.queries.tolist()
    assert one.scores["mAP"].mean() > other.scores["mAP"].mean()


def test_trials_of_random_galleries(market):
    features, table = market
    protocol = Protocol(cross_camera=False, trials=4, seed=3)
    result = evaluate(features, table, protocol)
    apart = []
    for split in splits(table, protocol):
        assert len(np.unique(table["label"][split.gallery])) == len(split.gallery) == len(np.unique(table["label"]))
        assert sorted([*split.query, *split.gallery]) == list(range(90))
        flags = {name: np.isin(np.arange(90), getattr(split, name)) for name in ("query", "gallery")}
        apart.append(expected(features, table | flags, cross_camera=False))
    assert len({tuple(one) for one in apart}) == 4  # each draw is another
    np.testing.assert_allclose(result.trials["mAP"], [np.mean([ap for ap, *_ in one.values()]) for one in apart])
    for index, row in enumerate(result.queries):
        own = [one[row] for one in apart if row in one]
        np.testing.assert_allclose(result.scores["mAP"][index], np.mean([ap for ap, *_ in own]))
        np.testing.assert_allclose(result.scores["rank5"][index], np.mean([first < 5 for *_, first, _ in own]))
    np.testing.assert_allclose(result.scores["mAP"], result.scores["mINP"])  # one right image each: both are 1 / rank
    assert result.counts["gallery"] == len(np.unique(table["label"]))
    again = evaluate(features, table, protocol)
    np.testing.assert_array_equal(again.scores["mAP"], result.scores["mAP"])
    other = evaluate(features, table, Protocol(cross_camera=False, trials=4, seed=4))
    assert other.trials["mAP"].tolist() != result.trials["mAP"].tolist()


def test_reranking_and_branches(market):
    features, table = market
    plain, moved = (evaluate(features, table, Protocol(), rerank=rerank) for rerank in (None, (8, 3, 0.3)))
    kept = evaluate(features, table, Protocol(), rerank=(8, 3, 1.0))
    np.testing.assert_allclose(kept.scores["mAP"], plain.scores["mAP"])
    assert not np.allclose(moved.scores["mAP"], plain.scores["mAP"])
    halves = evaluate(np.concatenate([features, features], axis=1), table, Protocol(), branches=2)
    np.testing.assert_allclose(halves.scores["mAP"], plain.scores["mAP"])
    only = evaluate(
        np.concatenate([0 * features, features], axis=1), table | {"view": np.full(90, -1)}, Protocol(), branches=2
    )
    np.testing.assert_allclose(only.scores["mAP"], plain.scores["mAP"])  # unknown views use the second half
    cosine = evaluate(features * np.arange(1, 91)[:, None], table, Protocol(), metric="cosine")
    np.testing.assert_allclose(
        cosine.scores["mAP"], evaluate(features, table, Protocol(), metric="cosine").scores["mAP"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros(90, int)}, "no queries"),
        ({"gallery": np.zeros(90, int)}, "no gallery images"),
        ({"label": np.arange(90)}, "None of the 20 queries has a right image"),
        ({"camera": np.zeros(90, int)}, "seen by more than one camera"),
        ({"label": np.zeros(89, int)}, "90 features but 89 images"),
        ({"view": np.zeros(90)}, "Column view have type float64"),
    ],
)
def test_tables_that_cannot_be_evaluated(market, change, message):
    with pytest.raises(DataError, match=message):
        evaluate(market[0], market[1] | change, Protocol())


def test_other_bad_input(market):
    features, table = market
    with pytest.raises(DataError, match="every identity has one image"):
        evaluate(features, table | {"label": np.arange(90)}, Protocol(cross_camera=False, trials=2))
    with pytest.raises(DataError, match="no column camera, view"):
        evaluate(features, {name: table[name] for name in ("label", "query", "gallery")}, Protocol())
    with pytest.raises(ConfigError, match="Re-ranking compares neighbors in one space"):
        evaluate(features, table, Protocol(), branches=2, rerank=(20, 6, 0.3))
    with pytest.raises(DataError, match="test split hold NaN or Inf, the first in row 0"):
        evaluate(features * np.nan, table, Protocol())
