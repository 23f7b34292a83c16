"""plots/front.png: the Pareto front of the strengths, clean images against corrupted ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from drep_jax.report.plots.canvas import BLUE, GREY, NAME, RED, png, shortened, styled

MOST_LABELS = 16
"""Labels in the plot; of more points than that, only those on the front, the backbone and the chosen one have one."""


def plot_front(report: Mapping[str, Any]) -> bytes | None:
    """Clean score against the mean score of the other conditions; what no other point beats in both is joined."""
    front = report.get("front")
    if not front or len(front["conditions"]) < 2:
        return None
    clean, *others = front["conditions"]
    known = [index for index, point in enumerate(front["points"]) if None not in _scores(point, front["conditions"])]
    if len(known) < 2:
        return None
    points = [front["points"][index] for index in known]
    places = [(point["scores"][clean], sum(_scores(point, others)) / len(others)) for point in points]
    best = non_dominated(places)

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = styled(figure.add_subplot(), "both")
    edge = sorted(places[index] for index in best)
    axes.plot(*zip(*edge, strict=True), color=BLUE, linewidth=1.3, zorder=1, label="Pareto front")
    for index, (x, y) in enumerate(places):
        axes.plot(x, y, "o", color=BLUE, markerfacecolor=BLUE if index in best else "white", markersize=6)
    special = []
    for index, point in enumerate(points):
        if point["strength"] == 0:
            axes.plot(*places[index], "s", color=GREY, markersize=9, label="unchanged backbone")
            special.append(index)
        if known[index] == front["chosen"]:
            look = {"color": RED, "markerfacecolor": "none", "markeredgewidth": 2, "markersize": 13}
            axes.plot(*places[index], "o", linestyle="none", label="chosen", **look)
            special.append(index)
    for index, point in enumerate(points):
        if len(points) <= MOST_LABELS or index in special or index in best:
            options = {"textcoords": "offset points", "fontsize": 8, "parse_math": False}
            axes.annotate(shortened(point["label"], NAME), places[index], (9, 5), **options)
    axes.margins(0.12)
    axes.set_xlabel(f"{shortened(clean, NAME)} images (%)", parse_math=False)
    name = ", ".join(shortened(one, NAME) for one in others) if len(others) <= 3 else f"{len(others)} corruptions"
    axes.set_ylabel(f"{'mean of ' if len(others) > 1 else ''}{name} (%)", parse_math=False)
    axes.legend(frameon=False)
    return png(figure)


def _scores(point: Mapping[str, Any], conditions: Sequence[str]) -> list[Any]:
    return [point["scores"][condition] for condition in conditions]


def non_dominated(places: Sequence[tuple[float, float]]) -> set[int]:
    """Returns the indices of the points that no other point beats in one score without losing in the other."""
    return {
        index
        for index, (x, y) in enumerate(places)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in places)
    }
