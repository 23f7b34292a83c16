"""plots/front.png: the Pareto front of the strengths, score on clean against corrupted images."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from drep_jax.report.plots.canvas import BLUE, COLORS, GRAY, MARKERS, NAME, RED, png, shortened, styled

MOST_LABELS = 16
"""Most points that all get a label.

Of more, only those on the front, the backbone and the chosen one do.
"""


def plot_front(report: Mapping[str, Any]) -> bytes | None:
    """Clean score against the mean score of the other conditions.

    A line joins the points of the Pareto front.
    """
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
    axes.plot(*zip(*edge, strict=True), color="#BBBBBB", linewidth=5, zorder=0, label="Pareto front")
    looks = _looks(points)
    for label, (color, marker) in looks.items():
        series = sorted(
            (point["strength"], place) for point, place in zip(points, places, strict=True) if point["label"] == label
        )
        if len(series) > 1:
            line = [place for _, place in series]
            axes.plot(*zip(*line, strict=True), color=color, linewidth=0.7, alpha=0.6, zorder=1)
        axes.plot([], [], marker, color=color, label=shortened(label, NAME))
    for index, (x, y) in enumerate(places):
        if points[index]["strength"] != 0:
            color, marker = looks.get(points[index]["label"], (BLUE, "o"))
            axes.plot(x, y, marker, color=color, markerfacecolor=color if index in best else "white", markersize=6)
    special = []
    for index, point in enumerate(points):
        if point["strength"] == 0:
            axes.plot(*places[index], "s", color=GRAY, markersize=9, label="unchanged backbone")
            special.append(index)
        if known[index] == front["chosen"]:
            look = {"color": RED, "markerfacecolor": "none", "markeredgewidth": 2, "markersize": 13}
            axes.plot(*places[index], "o", linestyle="none", label="chosen", **look)
            special.append(index)
    for index, point in enumerate(points):
        if point["strength"] != 0 and (len(points) <= MOST_LABELS or index in special or index in best):
            axes.annotate(f"{point['strength']:g}", places[index], (6, 4), textcoords="offset points", fontsize=7)
    axes.margins(0.12)
    axes.set_xlabel(f"{shortened(clean, NAME)} images (%)", parse_math=False)
    name = ", ".join(shortened(one, NAME) for one in others) if len(others) <= 3 else f"{len(others)} corruptions"
    axes.set_ylabel(f"{'mean of ' if len(others) > 1 else ''}{name} (%)", parse_math=False)
    axes.legend(frameon=False, fontsize=8, title="numbers are strengths", title_fontsize=8)
    return png(figure)


def _looks(points: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Returns color and marker of each map, of the first few."""
    labels = list(dict.fromkeys(point["label"] for point in points if point["strength"] != 0))
    return dict(zip(labels, zip(COLORS, MARKERS, strict=True), strict=False))


def _scores(point: Mapping[str, Any], conditions: Sequence[str]) -> list[Any]:
    return [point["scores"][condition] for condition in conditions]


def non_dominated(places: Sequence[tuple[float, float]]) -> set[int]:
    """Returns the indices of the points that no other point dominates."""
    return {
        index
        for index, (x, y) in enumerate(places)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in places)
    }
