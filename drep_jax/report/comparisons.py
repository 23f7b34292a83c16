"""Comparisons of two arms: differences with paired intervals, and a sentence on them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from drep_jax.evaluation.intervals import Interval
from drep_jax.evaluation.summary import pairs_of
from drep_jax.report.formatting import decimals_of, signed

ALPHA = 0.05
"""Level of McNemar's test; that of the 95 % intervals."""

ONCE_TESTED = ("acc@1", "rank1")
"""Metrics of right or wrong in reports that do not say which one McNemar's test is of."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The arm `ours` minus the arm `theirs` in one metric."""

    ours: str
    theirs: str
    metric: str
    interval: Interval
    p: float | None
    decimals: int

    @property
    def direction(self) -> str:
        """Returns "higher" or "lower" if the interval and McNemar's test, if made, agree on it.

        Else "".
        """
        if not self.interval.significant or (self.p is not None and self.p >= ALPHA):
            return ""
        return "higher" if self.interval.low > 0 else "lower"

    @property
    def word(self) -> str:
        """Returns the direction as the tables print it."""
        return self.direction or "not significant"

    def text(self, unit: str = "") -> str:
        """Returns the difference, its unit and its interval, such as "+0.2 points [−0.3, +0.7]"."""
        values = (self.interval.difference, self.interval.low, self.interval.high)
        difference, low, high = (signed(value, self.decimals) for value in values)
        return f"{difference} {unit}[{low}, {high}]"


def tested(result: Mapping[str, Any]) -> str | None:
    """Returns the metric that McNemar's test is of, or None."""
    return result.get("tested") or next((name for name in ONCE_TESTED if name in result["baseline"]), None)


def compare(result: Mapping[str, Any], ours: str) -> list[Comparison]:
    """Returns all comparisons of the arm `ours`, baseline first, in every metric."""
    return [
        _comparison(result, ours, theirs, metric)
        for arm, theirs in pairs_of(result)
        if arm == ours
        for metric in result["difference"][f"{ours} - {theirs}"]
    ]


def _comparison(result: Mapping[str, Any], ours: str, theirs: str, metric: str) -> Comparison:
    key = f"{ours} - {theirs}"
    difference = result["difference"][key][metric]
    low, high = result["interval"][key][metric]
    interval = Interval(
        math.nan if difference is None else difference,
        -math.inf if low is None else low,
        math.inf if high is None else high,
    )
    decimals = decimals_of(result["n"])
    # An end of the interval just off zero must not print as zero next to "higher".
    while interval.significant and decimals < 5 and min(abs(interval.low), abs(interval.high)) < 0.5 * 10**-decimals:
        decimals += 1
    p = result["mcnemar"].get(key) if metric == tested(result) else None
    return Comparison(ours, theirs, metric, interval, p, decimals)


def direction(result: Mapping[str, Any], arm: str) -> str:
    """Returns "higher", "lower" or "" for an arm against the baseline in the first metric."""
    return compare(result, arm)[0].direction


def verdict(condition: str, result: Mapping[str, Any], arm: str) -> str:
    """Returns a sentence on the first metric of an arm, which claims no more than the intervals.

    Args:
      condition: such as "clean" or "gaussian:50".
      result: its entry in report["metrics"].
      arm: a denoised one.
    """
    metric = next(iter(result["baseline"]))
    first, *controls = [row for row in compare(result, arm) if row.metric == metric]
    words = {"higher": "Significantly higher", "lower": "Significantly lower"}.get(
        first.direction, "No significant change"
    )
    sentence = f"{arm}: {words} on {condition} images: {metric} {first.text('points ')} against the unchanged backbone"
    phrases = {
        "higher": "significantly higher than",
        "lower": "significantly lower than",
        "": "no significant change from",
    }
    for outcome, phrase in phrases.items():
        if named := [row.theirs for row in controls if row.direction == outcome]:
            sentence += f"; {phrase} {', '.join(named)}"
    # Denoising is the cause only if the change also exceeds that of random maps, or of the same
    # training without it.
    if first.direction and not controls:
        sentence += "; no control arm ran, so denoising is not shown to be the cause"
    elif first.direction and any(row.direction != first.direction for row in controls):
        sentence += ", so denoising is not shown to be the cause"
    return sentence + "."
