"""Paired statistics: coverage on simulated data, a brute-force bootstrap, and McNemar by hand."""

import math
import tracemalloc
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drep_jax.errors import ConfigError, DataError
from drep_jax.evaluation.intervals import Interval, mcnemar, paired_interval


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
    with pytest.raises(DataError, match=r"Clusters have shape \(3,\); expected one an item, \(80,\)"):
        paired_interval(ours, theirs, clusters=[1, 2, 3])
