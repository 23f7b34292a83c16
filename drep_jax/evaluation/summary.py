"""The report's `metrics` from the items of all arms: percentages, differences, intervals, tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.errors import DataError
from drep_jax.evaluation.intervals import Bootstrap, mcnemar
from drep_jax.metrics.reducers import Metric
from drep_jax.tasks.base import Items


def summarize(
    results: Mapping[str, Mapping[str, Items]],
    metrics: Mapping[str, Metric],
    *,
    controls: Sequence[str],
    resamples: int,
    seed: int,
    exact_test: str | None = None,
) -> dict[str, Any]:
    """Turns the items of all arms into the report's `metrics`.

    Args:
      results: {condition: {arm: items}}; arms other than `baseline` and the controls are denoised
        networks. All arms of a condition have the same items in the same order.
      metrics: name ↦ metric, a fraction.
      controls: names of the control arms, such as the placebo.
      resamples, seed: of the bootstrap; one set of resamples serves all arms and metrics.
      exact_test: metric of 0 or 1 per item for McNemar's test, also the name of its statistic; None
        for no test.

    Returns:
      {condition: the entry that docs/report.md describes}. Every denoised arm is compared with the
      baseline and every control, and every control with the baseline.

    Raises:
      DataError: if the baseline or a control has no scores, arms differ in their items, or a metric
        is not finite.
    """
    return {
        condition: _entry(condition, arms, metrics, controls, resamples, seed, exact_test)
        for condition, arms in results.items()
    }


def _entry(
    condition: str,
    arms: Mapping[str, Items],
    metrics: Mapping[str, Metric],
    controls: Sequence[str],
    resamples: int,
    seed: int,
    exact_test: str | None,
) -> dict[str, Any]:
    for name in ("baseline", *controls):
        if name not in arms:
            raise DataError(f"No scores of the arm {name!r} under {condition}; there are: {', '.join(arms)}.")
    count = count_of(arms["baseline"])
    for name, items in arms.items():
        if count_of(items) != count:
            raise DataError(f"The arms baseline and {name} have {count} and {count_of(items)} items under {condition}.")
    values = {arm: {name: value_of(metric, items) for name, metric in metrics.items()} for arm, items in arms.items()}
    for arm, row in values.items():
        if bad := [name for name, value in row.items() if not np.isfinite(value)]:
            raise DataError(f"{bad[0]} of the arm {arm} under {condition} is {row[bad[0]]}; expected a finite number.")
    percent = {arm: {name: 100.0 * value for name, value in row.items()} for arm, row in values.items()}
    clusters = arms["baseline"].clusters
    bootstrap = Bootstrap(count, clusters=clusters, resamples=resamples, seed=seed)
    resampled = (
        bootstrap.values(
            {(arm, name): (metric, arms[arm].statistics) for arm in arms for name, metric in metrics.items()}
        )
        if bootstrap.conclusive
        else {}
    )
    entry: dict[str, Any] = {
        "n": count,
        "baseline": percent["baseline"],
        "control": {name: percent[name] for name in controls},
        "denoised": {name: percent[name] for name in arms if name not in ("baseline", *controls)},
        "difference": {},
        "interval": {},
        "mcnemar": {},
    }
    for first, second in pairs_of(entry):
        pair = f"{first} - {second}"
        intervals = {
            name: bootstrap.interval(
                values[first][name] - values[second][name],
                resampled[first, name] - resampled[second, name] if resampled else np.zeros(0),
            )
            for name in metrics
        }
        entry["difference"][pair] = {name: 100.0 * i.difference for name, i in intervals.items()}
        entry["interval"][pair] = {name: [100.0 * i.low, 100.0 * i.high] for name, i in intervals.items()}
        if exact_test in metrics and clusters is None:
            right = [np.asarray(arms[arm].statistics[exact_test], np.float64) for arm in (first, second)]
            if np.isin(right, (0, 1)).all():  # false for means over several galleries
                entry["mcnemar"][pair] = mcnemar(*right)
    if exact_test in metrics:
        entry["tested"] = exact_test
    if left_out := {reason: number for reason, number in arms["baseline"].left_out.items() if number}:
        entry["left_out"] = left_out
    return entry


def value_of(metric: Metric, items: Items) -> float:
    """Returns the value of a metric on all items, a fraction."""
    return float(metric(items.statistics, np.ones(count_of(items))))


def count_of(items: Items) -> int:
    """Returns the number of items."""
    leaf: Any = items.statistics
    while isinstance(leaf, Mapping):
        leaf = next(iter(leaf.values()))
    return len(leaf)


def arms_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Returns the scores of every arm by name: baseline, controls, denoised."""
    return {"baseline": result["baseline"], **result["control"], **result["denoised"]}


def pairs_of(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the pairs of arms to compare.

    They are every denoised arm with the baseline and every control, and every control with the
    baseline.
    """
    references = ["baseline", *result["control"]]
    pairs = [(arm, other) for arm in result["denoised"] for other in references]
    return pairs + [(arm, "baseline") for arm in result["control"]]
