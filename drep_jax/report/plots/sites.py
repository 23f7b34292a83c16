"""plots/sites.png: the relative change of the weights of every site."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from drep_jax.report.plots.canvas import BLUE, png, shortened, styled

MOST_BARS = 150
"""Most bars in the plot; of more slices, those that change most are shown."""


def plot_sites(report: Mapping[str, Any]) -> bytes | None:
    """Relative change of the weights of every site and slice, in execution order from the top."""
    bars = []
    for site in report["sites"]:
        for index, (t, change) in enumerate(zip(site["t"], site["relative_change"], strict=True)):
            name = f"{site['path']}[{index}]" if len(site["t"]) > 1 else site["path"]
            bars.append(
                (
                    f"{shortened(name, 44)}   t = {t}",
                    100 * (math.nan if change is None else change),
                )
            )
    if not bars:
        return None
    title = ""
    if len(bars) > MOST_BARS:
        title = f"the {MOST_BARS} largest changes of {len(bars)}"
        largest = sorted(np.argsort([-change for _, change in bars], kind="stable")[:MOST_BARS])
        bars = [bars[index] for index in largest]
    names, changes = zip(*bars, strict=True)
    figure = Figure(figsize=(8.5, 1.1 + 0.2 * len(bars)), layout="constrained")
    axes = styled(figure.add_subplot(), "x")
    drawn = axes.barh(range(len(bars)), np.nan_to_num(changes), color=BLUE, height=0.7)
    labels = ["unknown" if math.isnan(change) else f"{change:.3g}" for change in changes]
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * float(np.max(np.nan_to_num(changes))) or 1.0)
    axes.set_xlabel("relative change of the weights, ‖W′ − W‖ / ‖W‖ (%)")
    axes.set_title(title, fontsize=10)
    return png(figure)
