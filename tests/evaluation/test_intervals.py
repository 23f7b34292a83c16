"""Paired statistics: coverage on simulated data, a brute-force bootstrap, and McNemar by hand."""

import math
import tracemalloc
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drep_jax.errors import ConfigError, DataError
from drep_jax.evaluation import intervals
from drep_jax.evaluation.intervals import Bootstrap, Interval, mcnemar, paired_interval
from drep_jax.evaluation.summary import summarize
from drep_jax.metrics.reducers import mean_of
from drep_jax.tasks import Items


def brute_force(ours, theirs, level, resamples, seed):
    """Resamples the pairs themselves, one resample at a time."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        picked = rng.integers(0, len(ours), len(ours))
        means.append(ours[picked].mean() - theirs[picked].mean())
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2])


def simulate(rng, n, shared=0.8, gain=0.1):
    """Correctness of two arms that agree on most items; the true difference is (1 − shared)·gain."""
    agree = rng.random(n) < shared
    same = rng.random(n) < 0.7
    ours = np.where(agree, same, rng.random(n) < 0.5 + gain / 2)
    theirs = np.where(agree, same, rng.random(n) < 0.5 - gain / 2)
    return ours, theirs, (1 - shared) * gain


@pytest.mark.parametrize("kind", ["normal", "correctness", "few"])
def test_interval_covers_the_truth_as_often_as_it_says(kind):
    rng, repetitions, level = np.random.default_rng(7), 400, 0.9
    covered = 0
    for seed in range(repetitions):
        if kind == "correctness":
            ours, theirs, truth = simulate(rng, 300)
        else:
            n, truth = (120, 0.3) if kind == "normal" else (10, 0.3)
            item = 5 * rng.normal(size=n)  # hard and easy items: large, and shared by both arms
            ours, theirs = item + truth + 0.4 * rng.normal(size=n), item + 0.4 * rng.normal(size=n)
        interval = paired_interval(ours, theirs, level=level, resamples=500, seed=seed)
        covered += interval.low <= truth <= interval.high
    spread = math.sqrt(level * (1 - level) / repetitions)
    assert abs(covered / repetitions - level) < 3 * spread


def test_interval_is_that_of_a_brute_force_bootstrap():
    rng = np.random.default_rng(3)
    ours, theirs, _ = simulate(rng, 400)
    interval = paired_interval(ours, theirs, level=0.9, resamples=20_000, seed=1)
    low, high = brute_force(ours.astype(float), theirs.astype(float), 0.9, 20_000, seed=2)
    width = high - low
    assert interval.difference == pytest.approx(ours.mean() - theirs.mean(), abs=1e-15)
    assert interval.low == pytest.approx(low, abs=0.04 * width)
    assert interval.high == pytest.approx(high, abs=0.04 * width)


def test_pairing_is_used():
    rng = np.random.default_rng(0)
    item = rng.normal(size=200)
    paired = paired_interval(item + 0.05 + 0.01 * rng.normal(size=200), item)
    shuffled = paired_interval(rng.permutation(item) + 0.05, item)
    assert paired.significant and not shuffled.significant
    assert shuffled.high - shuffled.low > 20 * (paired.high - paired.low)


def test_sign_and_scale_of_the_difference():
    ours, theirs, _ = simulate(np.random.default_rng(5), 250)
    one = paired_interval(ours, theirs)
    hundred = paired_interval(100 * ours, 100 * theirs)
    swapped = paired_interval(theirs, ours)
    np.testing.assert_allclose(
        [hundred.difference, hundred.low, hundred.high],
        [100 * v for v in (one.difference, one.low, one.high)],
        atol=1e-10,
    )
    assert swapped.difference == -one.difference
    assert swapped.low == pytest.approx(-one.high, abs=0.01)


def test_higher_level_is_wider():
    ours, theirs, _ = simulate(np.random.default_rng(5), 250)
    narrow, wide = (paired_interval(ours, theirs, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_deterministic_by_seed():
    ours, theirs, _ = simulate(np.random.default_rng(1), 300)
    assert paired_interval(ours, theirs, seed=4) == paired_interval(ours, theirs, seed=4)
    draws = {paired_interval(ours + np.arange(300) / 7, theirs, seed=seed).low for seed in range(4)}
    assert len(draws) == 4


def test_memory_is_bounded():
    ours, theirs, _ = simulate(np.random.default_rng(1), 20_000)
    tracemalloc.start()
    paired_interval(ours, theirs, resamples=2_000)  # 40 million draws: 640 MB at once
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("change", [0.0, 1.0, -0.25])
def test_equal_differences_have_an_interval_without_width(change):
    theirs = np.arange(20) / 4.0
    interval = paired_interval(theirs + change, theirs)
    assert interval == Interval(change, change, change)
    assert interval.significant == (change != 0.0)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_a_handful_of_items_is_no_evidence(n):
    interval = paired_interval(np.ones(n), np.zeros(n))
    assert interval.difference == 1.0
    assert interval.significant == (n >= 6)  # 2^(1−6) = 0.03 ≤ 0.05 < 2^(1−5)
    assert math.isinf(interval.low) == math.isinf(interval.high) == (n < 6)


def test_significant_means_zero_outside():
    assert Interval(1.0, 0.1, 2.0).significant
    assert Interval(-1.0, -2.0, -0.1).significant
    assert not Interval(0.5, -0.1, 1.0).significant
    assert not Interval(0.5, 0.0, 1.0).significant
    assert not Interval(0.0, 0.0, 0.0).significant


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),
        (12, 4, 2 * (1 + 16 + 120 + 560 + 1820) / 65536),
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    a = np.array([1] * only_a + [0] * only_b + [1] * 9 + [0] * 4, bool)
    b = np.array([0] * only_a + [1] * only_b + [1] * 9 + [0] * 4, bool)
    assert mcnemar(a, b) == pytest.approx(p, rel=1e-12)
    assert mcnemar(b, a) == mcnemar(a, b)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_sum_of_binomial_tails(pairs):
    a, b = (np.array(column) for column in zip(*pairs, strict=True))
    m, k = int(np.sum(a != b)), int(np.sum(a & ~b))
    smaller = min(k, m - k)
    tail = sum(comb(m, i) for i in range(smaller + 1)) / 2**m
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@pytest.mark.parametrize("compare", [paired_interval, mcnemar])
@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([1, 0, 1], [1, 0], "3 and 2 items"),
        ([], [], "no items"),
        ([1.0, np.nan, 1.0], [1.0, 0.0, 1.0], "item 1 in the first arm is nan"),
        ([1.0, 0.0], [1.0, np.inf], "item 1 in the second arm is inf"),
        ([[1, 0]], [[1, 0]], "shape"),
        (["a", "b"], ["a", "c"], "type"),
    ],
)
def test_unusable_scores_are_refused(compare, ours, theirs, message):
    with pytest.raises(DataError, match=message):
        compare(ours, theirs)


def test_unusable_settings_are_refused():
    with pytest.raises(DataError, match=r"second arm has the value 0\.5"):
        mcnemar([1, 0], [0.5, 1])
    with pytest.raises(ConfigError, match="level = 95"):
        paired_interval([1, 0], [1, 0], level=95)
    with pytest.raises(ConfigError, match="resamples = 0"):
        paired_interval([1, 0], [1, 0], resamples=0)


def test_clusters_are_resampled_whole():
    """Items of one cluster share most of their difference: the interval over items is too narrow, that over clusters not."""
    rng, repetitions, level, truth = np.random.default_rng(1), 200, 0.9, 0.2
    covered = {"items": 0, "clusters": 0}
    for seed in range(repetitions):
        clusters = np.repeat(np.arange(60), rng.integers(1, 8, 60))
        differences = truth + rng.normal(size=60)[clusters] + 0.3 * rng.normal(size=len(clusters))
        order = rng.permutation(len(clusters))
        for name, groups in (("items", None), ("clusters", clusters[order])):
            zero = np.zeros(len(order))
            interval = paired_interval(differences[order], zero, level=level, resamples=300, seed=seed, clusters=groups)
            covered[name] += interval.low <= truth <= interval.high
    spread = math.sqrt(level * (1 - level) / repetitions)
    assert abs(covered["clusters"] / repetitions - level) < 3 * spread
    assert covered["items"] / repetitions < level - 6 * spread


def test_clusters_of_one_item_are_items():
    ours, theirs, _ = simulate(np.random.default_rng(2), 80)
    plain = paired_interval(ours, theirs, resamples=500)
    alone = paired_interval(ours, theirs, resamples=500, clusters=[f"person {index:03d}" for index in range(80)])
    np.testing.assert_allclose([alone.low, alone.high], [plain.low, plain.high], atol=1e-12)
    few = paired_interval(ours, theirs, clusters=np.arange(80) % 5)
    assert math.isinf(few.low) and few.difference == plain.difference
    with pytest.raises(DataError, match=r"Clusters have shape \(3,\); expected one per item, \(80,\)"):
        paired_interval(ours, theirs, clusters=[1, 2, 3])


# ---- any metric ------------------------------------------------------------------------------------------------------


def iou(statistics, weights):
    """Returns the mean over classes of Σ w·intersection / Σ w·(predicted + true − intersection), of counts (n, C, 3)."""
    counts = np.tensordot(weights, statistics["counts"], axes=1)
    both, predicted, true = np.moveaxis(counts, -1, 0)
    return np.mean(both / (predicted + true - both), axis=-1)


def masks(rng, n, share, classes=2):
    """Counts of two arms on the same masks, of which a share is right; large masks are found better."""
    true = rng.integers(1, 100, (n, classes)).astype(float)
    arms = []
    for quality in share:
        both = np.floor(true * np.clip(quality + 0.002 * true + 0.2 * rng.normal(size=true.shape), 0, 1))
        predicted = both + rng.integers(0, 20, true.shape)
        arms.append({"counts": np.stack([both, predicted, true], axis=-1)})
    return arms


def test_a_metric_that_is_no_mean_is_resampled_as_by_a_loop():
    ours, theirs = masks(np.random.default_rng(0), 40, (0.6, 0.5))
    bootstrap = Bootstrap(40, resamples=400, seed=3)
    resampled = bootstrap.values({"ours": (iou, ours), "theirs": (iou, theirs)})
    drawn = np.random.default_rng(3).integers(0, 40, (400, 40))
    for name, arm in (("ours", ours), ("theirs", theirs)):
        expected = []
        for rows in drawn:
            ratios = []
            for label in range(2):
                both, predicted, true = (sum(arm["counts"][row, label, k] for row in rows) for k in range(3))
                ratios.append(both / (predicted + true - both))
            expected.append(np.mean(ratios))
        np.testing.assert_allclose(resampled[name], expected, rtol=1e-12)
    differences = resampled["ours"] - resampled["theirs"]
    assert np.ptp(differences) > 0
    difference = float(iou(ours, np.ones(40)) - iou(theirs, np.ones(40)))
    interval = bootstrap.interval(difference, differences)
    assert interval.difference == difference and interval.low < difference < interval.high
    low, high = np.quantile(differences, [0.025, 0.975])  # widened a little, for 40 images
    assert interval.low < low < high < interval.high and interval.high - interval.low < 1.15 * (high - low)


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    ours, _ = masks(np.random.default_rng(0), 30, (0.6, 0.5))
    for clusters in (None, np.arange(30) // 3):
        bootstrap = Bootstrap(30, clusters=clusters, resamples=150, seed=1)
        together = bootstrap.values({"iou": (iou, ours)})["iou"]
        assert all(np.all(weights.sum(axis=-1) == 30) for weights in bootstrap.weights())
        with monkeypatch.context() as patch:
            patch.setattr(intervals, "BATCH_NUMBERS", 7 * bootstrap.units)
            assert len(list(bootstrap.weights())) == 22
            np.testing.assert_allclose(bootstrap.values({"iou": (iou, ours)})["iou"], together, rtol=1e-12)


def test_interval_of_a_ratio_covers_the_truth():
    large = masks(np.random.default_rng(99), 200_000, (0.6, 0.5))
    truth = float(iou(large[0], np.ones(200_000)) - iou(large[1], np.ones(200_000)))
    assert truth > 0.05
    rng, repetitions, level, covered = np.random.default_rng(7), 300, 0.9, 0
    for seed in range(repetitions):
        ours, theirs = masks(rng, 50, (0.6, 0.5))
        bootstrap = Bootstrap(50, resamples=300, seed=seed, level=level)
        resampled = bootstrap.values({"ours": (iou, ours), "theirs": (iou, theirs)})
        difference = float(iou(ours, np.ones(50)) - iou(theirs, np.ones(50)))
        interval = bootstrap.interval(difference, resampled["ours"] - resampled["theirs"])
        covered += interval.low <= truth <= interval.high
    spread = math.sqrt(level * (1 - level) / repetitions)
    assert abs(covered / repetitions - level) < 3 * spread


def test_a_summary_of_such_a_metric_is_its_bootstrap():
    ours, theirs = masks(np.random.default_rng(0), 40, (0.6, 0.5))
    results = {"clean": {"baseline": Items(theirs), "measured": Items(ours)}}
    entry = summarize(results, {"mIoU": iou}, controls=[], resamples=400, seed=3, exact_test="acc@1")["clean"]
    assert entry["n"] == 40 and entry["mcnemar"] == {} and "tested" not in entry
    assert entry["denoised"]["measured"]["mIoU"] == pytest.approx(100 * iou(ours, np.ones(40)))
    bootstrap = Bootstrap(40, resamples=400, seed=3)
    resampled = bootstrap.values({"ours": (iou, ours), "theirs": (iou, theirs)})
    difference = float(iou(ours, np.ones(40)) - iou(theirs, np.ones(40)))
    interval = bootstrap.interval(difference, resampled["ours"] - resampled["theirs"])
    assert entry["difference"]["measured - baseline"]["mIoU"] == pytest.approx(100 * difference)
    np.testing.assert_allclose(
        entry["interval"]["measured - baseline"]["mIoU"], [100 * interval.low, 100 * interval.high], rtol=1e-12
    )


@pytest.mark.parametrize("clusters", [None, np.arange(60) % 7])
def test_a_mean_by_weights_is_the_interval_of_the_differences(clusters):
    """What summaries give for accuracies is what `paired_interval` gives for the differences of the hits."""
    ours, theirs, _ = simulate(np.random.default_rng(4), 60)
    results = {
        "clean": {name: Items({"hit": v.astype(float)}, clusters) for name, v in (("baseline", theirs), ("a", ours))}
    }
    entry = summarize(results, {"hit": mean_of("hit")}, controls=[], resamples=300, seed=2)["clean"]
    interval = paired_interval(100 * ours, 100 * theirs, resamples=300, seed=2, clusters=clusters)
    np.testing.assert_allclose(entry["interval"]["a - baseline"]["hit"], [interval.low, interval.high], atol=1e-9)
