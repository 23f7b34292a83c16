"""Paired comparison of two arms on the same test items: bootstrap intervals of any metric, and McNemar's test.

The bootstrap draws weights: item i counts as often as it was drawn. A metric is a function of (statistics, weights), so one
set of resamples serves all arms and metrics, and the arms of a pair are resampled together.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import stats

from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.reducers import Metric, mean_of
from drep_jax.typing import Tree

BATCH_NUMBERS = 2**21
"""Weights drawn at once; with what they are made of 48 MiB, whatever the number of items."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference of two arms in a metric with its confidence interval, in the unit of the metric.

    Attributes:
      difference: metric(ours) − metric(theirs).
      low, high: ends of the interval; −inf and +inf where there are too few items to say anything.
    """

    difference: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0.0 or self.high < 0.0


class Bootstrap:
    """Resamples of n items with replacement, or of clusters of them, each with all its items.

    Items that go together, as the queries of one person do, say less than as many independent ones: with clusters, whole
    clusters are drawn, and the number of independent units is theirs.

    Args:
      items: n.
      clusters: (n,) which cluster each item belongs to, any values that can be compared; None for each its own.
      resamples: number of resamples.
      seed: the same seed gives the same resamples.
      level: confidence level of the intervals, between 0 and 1.

    Raises:
      DataError: for no items, or clusters that do not fit them.
      ConfigError: for a level outside (0, 1) or fewer than 100 resamples.
    """

    def __init__(
        self, items: int, *, clusters: Any = None, resamples: int = 10_000, seed: int = 0, level: float = 0.95
    ) -> None:
        if not 0.0 < level < 1.0:
            raise ConfigError(f"level = {level}: expected a number between 0 and 1, for example 0.95.")
        if resamples < 100:
            raise ConfigError(f"resamples = {resamples}: expected at least 100, for example 10000.")
        if not items:
            raise DataError("There are no items; a comparison needs the scores of at least one test item.")
        self.items, self.resamples, self.seed, self.level = items, resamples, seed, level
        self.units, self._unit_of = items, None
        if clusters is not None:
            clusters = np.asarray(clusters)
            if clusters.shape != (items,):
                raise DataError(f"Clusters have shape {clusters.shape}; expected one an item, {(items,)}.")
            values, self._unit_of = np.unique(clusters, return_inverse=True)
            self.units = len(values)

    @property
    def conclusive(self) -> bool:
        """Whether so many units could show a difference: if all agreed in sign, by chance with probability 2^(1−units)."""
        return 2.0 ** (1 - self.units) <= 1.0 - self.level

    def weights(self) -> Iterator[np.ndarray]:
        """Yields the weights of the items, float64 (resamples of a batch, n): how often each was drawn."""
        rng = np.random.default_rng(self.seed)
        batch = max(1, BATCH_NUMBERS // self.units)
        for first in range(0, self.resamples, batch):
            rows = min(batch, self.resamples - first)
            drawn = rng.integers(0, self.units, (rows, self.units))
            flat = (drawn + self.units * np.arange(rows)[:, None]).reshape(-1)
            counts = np.bincount(flat, minlength=rows * self.units).reshape(rows, self.units).astype(np.float64)
            yield counts if self._unit_of is None else counts[:, self._unit_of]

    def values(self, metrics: dict[Any, tuple[Metric, Tree]]) -> dict[Any, np.ndarray]:
        """Returns each metric on every resample, (resamples,), from one pass over the resamples.

        Args:
          metrics: any name ↦ (metric, statistics of the n items).
        """
        parts: dict[Any, list[np.ndarray]] = {name: [] for name in metrics}
        for weights in self.weights():
            for name, (metric, statistics) in metrics.items():
                parts[name].append(np.asarray(metric(statistics, weights)))
        return {name: np.concatenate(values) for name, values in parts.items()}

    def interval(self, difference: float, resampled: np.ndarray) -> Interval:
        """Returns the interval that holds the middle `level` of the resampled differences.

        It is widened as Student's t and n/(n−1) ask for (the expanded percentile interval: without that, ten items would
        cover 90 % instead of 95 %; from some hundred items on it changes nothing). It has no width where all resampled
        differences are equal.

        Args:
          difference: on all items.
          resampled: (resamples,).
        """
        if not self.conclusive:
            return Interval(difference, -math.inf, math.inf)
        quantile = math.sqrt(self.units / (self.units - 1)) * stats.t.ppf((1 + self.level) / 2, self.units - 1)
        outside = (1.0 - (2 * stats.norm.cdf(quantile) - 1)) / 2
        low, high = np.percentile(resampled, [100 * outside, 100 * (1 - outside)])
        return Interval(difference, float(low), float(high))


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

    Args:
      ours, theirs: (n,) one score an item, in the same order; 100 × correct gives points of accuracy.
      level, resamples, seed, clusters: see `Bootstrap`.

    Returns:
      An `Interval`. It is unbounded where n items could not show a difference even if all agreed in sign, which has
      probability 2^(1−n) by chance (fewer than 6 items at 95 %), and has no width where all differences are equal.

    Raises:
      DataError: for arms or clusters of different length, no items, or scores that are not finite numbers.
      ConfigError: for a level outside (0, 1) or fewer than 100 resamples.
    """
    ours, theirs = _paired(ours, theirs)
    bootstrap = Bootstrap(len(ours), clusters=clusters, resamples=resamples, seed=seed, level=level)
    differences = ours - theirs
    if bootstrap.conclusive and np.all(differences == differences[0]):
        value = float(differences[0])
        return Interval(value, value, value)
    statistics = {"difference": differences}
    resampled = bootstrap.values({"difference": (mean_of("difference"), statistics)}) if bootstrap.conclusive else {}
    return bootstrap.interval(float(np.mean(differences)), resampled.get("difference", np.zeros(0)))


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
