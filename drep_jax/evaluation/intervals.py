"""Paired comparison of two arms on the same test items: a bootstrap interval of the difference, and McNemar's test."""

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import stats

from drep_jax.errors import ConfigError, DataError

BATCH_NUMBERS = 2**21
"""Numbers resampled at once; with their indices 32 MiB, whatever the number of items."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference of means with its confidence interval, in the unit of the scores.

    Attributes:
      difference: mean(ours) − mean(theirs).
      low, high: ends of the interval; −inf and +inf where there are too few items to say anything.
    """

    difference: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0.0 or self.high < 0.0


def paired_interval(
    ours: Any,
    theirs: Any,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    clusters: Any = None,
) -> Interval:
    """Returns the difference of the means of two arms with its bootstrap interval over the items, or over clusters of them.

    The items are resampled with replacement, both arms together, and the interval holds the middle `level` of the
    resampled differences, widened as Student's t and n/(n−1) ask for (the expanded percentile interval: without it ten
    items would cover 90 % instead of 95 %; from some hundred items on it changes nothing).

    Items that go together, as the queries of one person do, say less than as many independent ones: with `clusters` whole
    clusters are resampled, each with all its items, and n is their number.

    Args:
      ours, theirs: (n,) one score an item, in the same order; 100 × correct gives points of accuracy.
      level: confidence level, between 0 and 1.
      resamples: number of bootstrap resamples.
      seed: the same seed gives the same interval.
      clusters: (n,) which cluster each item belongs to, any values that can be compared; None for each its own.

    Returns:
      An `Interval`. It is unbounded where n items could not show a difference even if all agreed in sign, which has
      probability 2^(1−n) by chance (fewer than 6 items at 95 %), and has no width where all differences are equal.

    Raises:
      DataError: for arms or clusters of different length, no items, or scores that are not finite numbers.
      ConfigError: for a level outside (0, 1) or fewer than 100 resamples.
    """
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level = {level}: expected a number between 0 and 1, for example 0.95.")
    if resamples < 100:
        raise ConfigError(f"resamples = {resamples}: expected at least 100, for example 10000.")
    ours, theirs = _paired(ours, theirs)
    differences = ours - theirs
    mean = float(np.mean(differences))
    sums, sizes = _clustered(differences, clusters)
    items = len(sums)
    if 2.0 ** (1 - items) > 1.0 - level:
        return Interval(mean, -math.inf, math.inf)
    if np.all(differences == differences[0]):
        value = float(differences[0])
        return Interval(value, value, value)
    quantile = math.sqrt(items / (items - 1)) * stats.t.ppf((1 + level) / 2, items - 1)
    interval = stats.bootstrap(
        (sums,) if clusters is None else (sums, sizes),
        np.mean if clusters is None else _ratio,
        vectorized=True,
        paired=clusters is not None,
        n_resamples=resamples,
        batch=max(1, BATCH_NUMBERS // items),
        confidence_level=2 * stats.norm.cdf(quantile) - 1,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(interval.low), float(interval.high))


def mcnemar(correct_a: Any, correct_b: Any) -> float:
    """Returns the exact two-sided p of McNemar's test: are the items that only one arm gets right split evenly?

    p = P(|X − m/2| ≥ |a − m/2|) for X ~ Binomial(m, ½), where m items are discordant, a of them right in the first arm.

    Args:
      correct_a, correct_b: (n,) booleans or 0/1, one an item, in the same order.

    Returns:
      The p-value; 1.0 when the arms agree on every item.

    Raises:
      DataError: for arms of different length, no items, or values other than 0 and 1.
    """
    correct_a, correct_b = _paired(correct_a, correct_b)
    for name, values in (("first", correct_a), ("second", correct_b)):
        odd = values[(values != 0) & (values != 1)]
        if odd.size:
            raise DataError(
                f"McNemar's test: the {name} arm has the value {odd[0]:g}; expected True/False or 1/0 an item."
            )
    only_a = int(np.sum(correct_a > correct_b))
    discordant = only_a + int(np.sum(correct_b > correct_a))
    return float(stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def _clustered(differences: np.ndarray, clusters: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns sum and number of the differences of every cluster."""
    if clusters is None:
        return differences, np.ones(len(differences))
    clusters = np.asarray(clusters)
    if clusters.shape != differences.shape:
        raise DataError(f"Clusters have shape {clusters.shape}; expected one an item, {differences.shape}.")
    _, which, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    return np.bincount(which, differences), sizes.astype(np.float64)


def _ratio(sums: np.ndarray, sizes: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the mean over the items of the clusters drawn, which differ in size."""
    return np.sum(sums, axis=axis) / np.sum(sizes, axis=axis)


def _paired(ours: Any, theirs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns both arms as float64 vectors, or says what is wrong with them."""
    arms = []
    for name, values in (("first", ours), ("second", theirs)):
        array = np.asarray(values)
        if array.ndim != 1:
            raise DataError(f"Scores of the {name} arm have shape {array.shape}; expected one number an item, (n,).")
        if array.size == 0:
            raise DataError(f"The {name} arm has no items; a comparison needs the scores of at least one test item.")
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            raise DataError(f"Scores of the {name} arm have type {array.dtype}; expected real numbers or booleans.")
        array = array.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(array))
        if bad.size:
            raise DataError(
                f"The score of item {bad[0]} in the {name} arm is {array[bad[0]]}; expected finite numbers "
                f"({bad.size} of {array.size} are not)."
            )
        arms.append(array)
    if len(arms[0]) != len(arms[1]):
        raise DataError(
            f"The arms have {len(arms[0])} and {len(arms[1])} items; a paired comparison needs the same test items, "
            "in the same order, in both."
        )
    return arms[0], arms[1]
