"""The plots of a report as PNG files in memory: accuracy, loss and the change of every site."""

import io
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from drep_jax.report.comparisons import arms_of, compare

# Okabe and Ito's colours, told apart with any colour vision; markers differ too.
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#555555"
_CONTROLS = (("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "P"), ("#D55E00", "X"))
MOST_BARS = 150
"""Bars in plots/sites.png; of more slices than that, those that change most."""


def _png(figure: Figure) -> bytes:
    """Draws with Agg and no global state; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a folder name in a script the font lacks is no fault
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _axes(axes: Any, grid: str) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _plot_loss(report: Mapping[str, Any]) -> bytes | None:
    """Total loss against step, with the sum of the sites' optima when it is known.

    Each point is the mean over the steps since the point before it; the first is that of step 1 alone.
    """
    learning = report["learning"] or {"loss": []}
    points = [(step, loss) for step, loss in learning["loss"] if loss is not None]
    if len(points) < 2:
        return None
    steps, losses = zip(*points, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = _axes(figure.add_subplot(), "both")
    axes.plot(steps, losses, color=_BLUE, linewidth=1.5, label=str(learning["learner"]))
    optimum = learning["optimum"] or {}
    if optimum and optimum.keys() == learning["per_site"].keys() and None not in optimum.values():
        best = sum(optimum.values())
        axes.axhline(best, color=_RED, linestyle="--", linewidth=1.5, label=f"optimum {best:.4g}")
    if min(losses) > 0 and max(losses) > 10 * min(losses):
        axes.set_yscale("log")
    if min(steps) > 0 and max(steps) > 100 * min(steps):
        axes.set_xscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, sum over {len(learning['per_site'])} sites")
    axes.legend(frameon=False)
    return _png(figure)


def _plot_sites(report: Mapping[str, Any]) -> bytes | None:
    """Relative change of the weights of every site and slice, in execution order from the top."""
    bars = []
    for site in report["sites"]:
        for index, (t, change) in enumerate(zip(site["t"], site["relative_change"], strict=True)):
            name = f"{site['path']}[{index}]" if len(site["t"]) > 1 else site["path"]
            bars.append(
                (
                    f"{name if len(name) <= 44 else '…' + name[-43:]}   t = {t}",
                    100 * (math.nan if change is None else change),
                )
            )
    if not bars:
        return None
    title = ""
    if len(bars) > MOST_BARS:
        title = f"the {MOST_BARS} largest changes of {len(bars)}"
        kept = sorted(np.argsort([-change for _, change in bars], kind="stable")[:MOST_BARS])  # NaN comes last
        bars = [bars[index] for index in kept]
    names, changes = zip(*bars, strict=True)
    figure = Figure(figsize=(8.5, 1.1 + 0.2 * len(bars)), layout="constrained")
    axes = _axes(figure.add_subplot(), "x")
    drawn = axes.barh(range(len(bars)), np.nan_to_num(changes), color=_BLUE, height=0.7)
    labels = ["unknown" if math.isnan(change) else f"{change:.3g}" for change in changes]
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * float(np.max(np.nan_to_num(changes))) or 1.0)
    axes.set_xlabel("relative change of the weights, ‖W′ − W‖ / ‖W‖ (%)")
    axes.set_title(title, fontsize=10)
    return _png(figure)


def _plot_accuracy(report: Mapping[str, Any]) -> bytes | None:
    """The first metric of every arm, and fused against each arm with its interval; filled where significant."""
    results = report["metrics"]
    if not results:
        return None
    metric = next(iter(next(iter(results.values()))["baseline"]))
    shown = {condition: entry for condition, entry in results.items() if metric in entry["baseline"]}
    controls = list(dict.fromkeys(arm for entry in shown.values() for arm in entry["control"]))
    looks = {"baseline": (_GREY, "o"), "fused": (_BLUE, "D")}
    looks |= {arm: _CONTROLS[index % len(_CONTROLS)] for index, arm in enumerate(controls)}
    arms = ["baseline", *controls, "fused"]
    offset = {arm: 0.7 * ((index + 0.5) / len(arms) - 0.5) for index, arm in enumerate(arms)}

    figure = Figure(figsize=(10, 1.6 + len(shown) * max(0.45, 0.17 * len(arms))), layout="constrained")
    values, gaps = figure.subplots(1, 2, sharey=True)
    for index, entry in enumerate(shown.values()):
        for arm, scores in arms_of(entry).items():
            if scores.get(metric) is not None:
                colour, marker = looks[arm]
                values.plot(scores[metric], index + offset[arm], marker, color=colour, markersize=6)
        for row in compare(entry):
            if row.metric != metric or math.isnan(row.interval.difference):
                continue
            colour, marker = looks[row.arm]
            at, fill = index + offset[row.arm], colour if row.direction else "white"
            if math.isfinite(row.interval.low) and math.isfinite(row.interval.high):
                gaps.hlines(at, row.interval.low, row.interval.high, color=colour, linewidth=1.6)
            gaps.plot(row.interval.difference, at, marker, color=colour, markerfacecolor=fill, markersize=6)
    gaps.axvline(0, color="black", linewidth=0.8, zorder=1)
    for axes in (values, gaps):
        _axes(axes, "x")
        for index in range(1, len(shown)):
            axes.axhline(index - 0.5, color="#DDDDDD", linewidth=0.6)
    values.set_yticks(range(len(shown)), list(shown), parse_math=False)
    values.set_ylim(len(shown) - 0.5, -0.5)
    values.set_xlabel(f"{metric} (%)", parse_math=False)
    gaps.set_xlabel(
        f"fused − arm, points of {metric}, 95 % interval\n(filled: significant, hollow: not)", parse_math=False
    )
    handles = [values.plot([], [], looks[arm][1], color=looks[arm][0], label=arm)[0] for arm in arms]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(arms), 6), frameon=False)
    return _png(figure)


PLOTS: dict[str, Callable[[Mapping[str, Any]], bytes | None]] = {
    "accuracy": _plot_accuracy,
    "loss": _plot_loss,
    "sites": _plot_sites,
}
"""By file name, what draws plots/NAME.png; None where there is nothing to show."""
