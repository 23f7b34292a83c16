"""plots/loss.png: the total loss of every learner that takes steps."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from drep_jax.report.plots.canvas import COLORS, NAME, png, shortened, styled


def plot_loss(report: Mapping[str, Any]) -> bytes | None:
    """Total loss of every learner against its step, with the sum of the sites' optima if known.

    Each point is the mean over the steps since the point before it; the first is that of step 1
    alone.
    """
    curves = {}
    for name, learning in report["learning"].items():
        points = [(step, loss) for step, loss in (learning or {"loss": []})["loss"] if loss is not None]
        if len(points) > 1:
            curves[name] = tuple(zip(*points, strict=True))
    if not curves:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = styled(figure.add_subplot(), "both")
    for index, (name, (steps, losses)) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        axes.plot(steps, losses, color=color, linewidth=1.5, label=shortened(name, NAME))
        learning = report["learning"][name]
        optimum = learning["optimum"] or {}
        if optimum and optimum.keys() == learning["per_site"].keys() and None not in optimum.values():
            best = sum(optimum.values())
            label = f"optimum {best:.4g}" if len(curves) == 1 else f"optimum of {shortened(name, NAME)}, {best:.4g}"
            axes.axhline(best, color=color, linestyle="--", linewidth=1.5, label=label)
    for axis, most, scale in ((0, 100, axes.set_xscale), (1, 10, axes.set_yscale)):
        drawn = [value for curve in curves.values() for value in curve[axis]]
        if min(drawn) > 0 and max(drawn) > most * min(drawn):
            scale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, sum over the sites")
    axes.legend(frameon=False)
    return png(figure)
