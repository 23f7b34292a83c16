"""plots/accuracy.png: the score of every arm, and its difference from the baseline."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from drep_jax.evaluation.summary import arms_of
from drep_jax.report.comparisons import compare
from drep_jax.report.plots.canvas import COLORS, GRAY, MARKERS, NAME, png, shortened, styled

_CONTROLS = (("#E69F00", "s"), ("#999999", "^"), ("#B09060", "v"), ("#777777", "P"))


def plot_accuracy(report: Mapping[str, Any]) -> bytes | None:
    """The first metric of every arm, and its difference from the baseline with its interval.

    Filled where significant.
    """
    results = report["metrics"]
    if not results:
        return None
    metric = next(iter(next(iter(results.values()))["baseline"]))
    shown = {condition: entry for condition, entry in results.items() if metric in entry["baseline"]}
    looks = {"baseline": (GRAY, "o")}
    for kind, choices in (("control", _CONTROLS), ("denoised", tuple(zip(COLORS, MARKERS, strict=True)))):
        names = dict.fromkeys(arm for entry in shown.values() for arm in entry[kind])
        looks |= {arm: choices[index % len(choices)] for index, arm in enumerate(names)}
    offset = {arm: 0.7 * ((index + 0.5) / len(looks) - 0.5) for index, arm in enumerate(looks)}

    figure = Figure(figsize=(10, 1.6 + len(shown) * max(0.45, 0.17 * len(looks))), layout="constrained")
    values, gaps = figure.subplots(1, 2, sharey=True)
    for index, entry in enumerate(shown.values()):
        for arm, scores in arms_of(entry).items():
            color, marker = looks[arm]
            at = index + offset[arm]
            if scores.get(metric) is not None:
                values.plot(scores[metric], at, marker, color=color, markersize=6)
            for row in compare(entry, arm):
                if (row.metric, row.theirs) != (metric, "baseline") or math.isnan(row.interval.difference):
                    continue
                if math.isfinite(row.interval.low) and math.isfinite(row.interval.high):
                    gaps.hlines(at, row.interval.low, row.interval.high, color=color, linewidth=1.6)
                fill = color if row.direction else "white"
                gaps.plot(row.interval.difference, at, marker, color=color, markerfacecolor=fill, markersize=6)
    gaps.axvline(0, color="black", linewidth=0.8, zorder=1)
    for axes in (values, gaps):
        styled(axes, "x")
        for index in range(1, len(shown)):
            axes.axhline(index - 0.5, color="#DDDDDD", linewidth=0.6)
    values.set_yticks(range(len(shown)), [shortened(name, NAME) for name in shown], parse_math=False)
    values.set_ylim(len(shown) - 0.5, -0.5)
    values.set_xlabel(f"{shortened(metric, NAME)} (%)", parse_math=False)
    note = "95 % interval\n(filled: significant, hollow: not)"
    gaps.set_xlabel(f"difference from the baseline, points of {shortened(metric, NAME)}, {note}", parse_math=False)
    handles = [
        values.plot([], [], marker, color=color, label=shortened(arm, NAME))[0]
        for arm, (color, marker) in looks.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(looks), 6), frameon=False)
    return png(figure)
