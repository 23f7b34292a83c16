"""The ranked galleries that a report shows."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.protocol import Protocol
from drep_jax.metrics.retrieval import examples
from drep_jax.metrics.retrieval.evaluate import evaluate
from drep_jax.report.plots import PLOTS


@pytest.fixture(scope="module")
def arms():
    rng = np.random.default_rng(0)
    n = 120
    label = rng.integers(0, 10, n)
    table = {"label": label, "camera": rng.integers(0, 2, n), "view": np.full(n, -1), "query": np.arange(n) < 25}
    table = {name: values.astype(np.int32) for name, values in table.items()}
    table["gallery"] = 1 - table["query"]
    centres = rng.standard_normal((10, 12))[label]
    return {
        name: centres + spread * rng.standard_normal((n, 12)) for name, spread in (("none", 2.0), ("ours", 1.6))
    }, table


def picture(row):
    return np.full((40, 20, 3), row, np.uint8)


@pytest.mark.parametrize("protocol", [Protocol(), Protocol(cross_camera=False, trials=3)])
def test_what_is_shown_is_what_was_scored(arms, protocol):
    features, table = arms
    results = {name: evaluate(own, table, protocol) for name, own in features.items()}
    ranked = examples.ranked(features, results, table, protocol, picture, condition="gaussian:20", k=10, each=2)
    assert [query["why"] for query in ranked["queries"]] == 2 * [examples.GAINED] + 2 * [examples.LOST] + 2 * [
        examples.RANDOM
    ]
    change = [query["ap"]["ours"] - query["ap"]["none"] for query in ranked["queries"]]
    assert min(change[:2]) > 0 > max(change[2:4])
    if not protocol.trials:
        every = results["ours"].scores["mAP"] - results["none"].scores["mAP"]
        assert change[:2] == sorted(every)[::-1][:2]
        assert change[2:4] == sorted(every)[:2]
    for query in ranked["queries"]:
        own, place = query["image"], list(results["ours"].queries).index(query["image"])
        for arm, found in query["found"].items():
            assert len(found) == 10
            assert [one["distance"] for one in found] == sorted(one["distance"] for one in found)
            for one in found:
                row = one["image"]
                assert one["right"] == (table["label"][row] == table["label"][own]) and row != own
                assert not (protocol.cross_camera and one["right"] and table["camera"][row] == table["camera"][own])
                apart = np.linalg.norm(features[arm][row] - features[arm][own])
                assert one["distance"] == pytest.approx(apart, rel=1e-4)
            if not protocol.trials:  # else the score is a mean over several galleries
                assert query["ap"][arm] == results[arm].scores["mAP"][place]
                assert found[0]["right"] == (results[arm].scores["rank1"][place] == 1)
    for name, image in ranked["images"].items():
        with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
            assert opened.size == (20, 40)
            assert abs(np.asarray(opened).astype(int) - int(name)).max() <= 3
    with Image.open(io.BytesIO(PLOTS["ranked"]({"ranked": ranked}))) as drawn:
        assert drawn.width > 600 and drawn.height > 900


def test_no_query_need_be_shown(arms):
    features, table = arms
    results = {name: evaluate(own, table, Protocol()) for name, own in features.items()}
    ranked = examples.ranked(features, results, table, Protocol(), picture, each=0)
    assert ranked["queries"] == [] and ranked["images"] == {} and PLOTS["ranked"]({"ranked": ranked}) is None


def test_queries_are_chosen_by_their_change():
    before, after = np.array([0.5, 0.5, 0.5, 0.5, 0.5]), np.array([0.5, 0.9, 0.4, 0.5, 0.6])
    chosen = examples.choose(after, before, each=2, seed=1)
    assert chosen[:3] == [(1, examples.GAINED), (4, examples.GAINED), (2, examples.LOST)]  # only one lost
    assert {index for index, _ in chosen[3:]} == {0, 3}
    assert {why for _, why in chosen[3:]} == {examples.RANDOM}
    nothing = np.full(50, 0.5)
    draws = {tuple(examples.choose(nothing, nothing, each=2, seed=seed)) for seed in range(5)}
    assert len(draws) > 1 and all(why == examples.RANDOM for draw in draws for _, why in draw)
    assert examples.choose(nothing, nothing, seed=3) == examples.choose(nothing, nothing, seed=3)


def test_large_pictures_become_small():
    with Image.open(io.BytesIO(base64.b64decode(examples.small(np.zeros((512, 256, 3), np.uint8))))) as image:
        assert image.size == (64, 128)


def test_arms_that_do_not_fit_together(arms):
    features, table = arms
    results = {name: evaluate(own, table, Protocol()) for name, own in features.items()}
    with pytest.raises(ConfigError, match="compare two arms"):
        examples.ranked({"none": features["none"]}, results, table, Protocol(), picture)
    results["ours"] = evaluate(features["ours"], table, Protocol(cross_camera=False, trials=2))
    with pytest.raises(DataError, match="scored on different queries"):
        examples.ranked(features, results, table, Protocol(), picture)
