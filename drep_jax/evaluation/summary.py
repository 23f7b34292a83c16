"""Scores of all arms as the report's `metrics`: means, paired differences, intervals, McNemar's test."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.errors import DataError
from drep_jax.evaluation.intervals import mcnemar, paired_interval
from drep_jax.typing import Scores


def summarize(
    results: Mapping[str, Mapping[str, Scores]],
    *,
    controls: Sequence[str],
    resamples: int,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Turns scores into the report's `metrics`: means in per cent, paired differences, 95 % intervals, McNemar.

    Args:
      results: {condition: {arm: {metric: (n,)}}}; arms other than `baseline` and the controls are denoised networks.
      controls: arms that show what comes about without denoising.
      resamples, seed: of the bootstrap.
      clusters: (n,) numbers of what is resampled as a whole, such as the persons of the queries; None for each item by itself.

    Returns:
      By condition, what docs/report.md describes. Every denoised arm is compared with the baseline and with every
      control, and every control with the baseline.

    Raises:
      DataError: where the baseline or a control has no scores.
    """
    table = {}
    for condition, arms in results.items():
        for name in ("baseline", *controls):
            if name not in arms:
                raise DataError(f"No scores of the arm {name!r} under {condition}; there are: {', '.join(arms)}.")
        percent = {name: {m: 100.0 * float(v.mean()) for m, v in scores.items()} for name, scores in arms.items()}
        entry: dict[str, Any] = {
            "n": len(next(iter(arms["baseline"].values()))),
            "baseline": percent["baseline"],
            "control": {name: percent[name] for name in controls},
            "denoised": {name: percent[name] for name in arms if name not in ("baseline", *controls)},
            "difference": {},
            "interval": {},
            "mcnemar": {},
        }
        for ours, theirs in pairs_of(entry):
            name = f"{ours} - {theirs}"
            found = {
                m: paired_interval(v, arms[theirs][m], resamples=resamples, seed=seed, clusters=clusters)
                for m, v in arms[ours].items()
            }
            entry["difference"][name] = {m: 100.0 * i.difference for m, i in found.items()}
            entry["interval"][name] = {m: [100.0 * i.low, 100.0 * i.high] for m, i in found.items()}
            for metric in TESTED & arms[ours].keys():
                values = arms[ours][metric], arms[theirs][metric]
                if clusters is None and np.isin(values, (0, 1)).all():  # not means over several galleries
                    entry["mcnemar"][name] = mcnemar(*values)
        table[condition] = entry
    return table


TESTED = frozenset({"acc@1", "rank1"})
"""Metrics of right or wrong that McNemar's test is for; no result has both."""


def arms_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Returns the scores of every arm by name: baseline, controls, denoised."""
    return {"baseline": result["baseline"], **result["control"], **result["denoised"]}


def pairs_of(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns which arms are compared: every denoised one with baseline and controls, every control with the baseline."""
    references = ["baseline", *result["control"]]
    pairs = [(arm, other) for arm in result["denoised"] for other in references]
    return pairs + [(arm, "baseline") for arm in result["control"]]
