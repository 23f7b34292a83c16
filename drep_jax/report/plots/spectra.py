"""plots/spectra.png: variance of the features of each site by direction, and denoising's gain."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from drep_jax.report.plots.canvas import BLUE, RED, png, shortened, styled

MOST_PANELS = 12
"""Most sites in the plot; of more, this many at even depths, first and last included."""
_COLUMNS = 4


def plot_spectra(report: Mapping[str, Any]) -> bytes | None:
    """One panel per site: eigenvalues of the features' covariance, and the gain on eigenvectors."""
    spectra = report.get("spectra")
    if not spectra:
        return None
    names = through_the_depth(list(spectra))
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    shown = {name: {key: np.array(spectra[name][key], float) for key in ("variance", "gain")} for name in names}
    gains = np.concatenate([[0.0, 1.0], *(values["gain"] for values in shown.values())])
    low, high = float(np.nanmin(gains)), float(np.nanmax(gains))
    margin = 0.05 * (high - low)

    figure = Figure(figsize=(max(4.5, 2.9 * columns), 0.7 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, axes in zip(names, panels, strict=False):
        styled(axes, "x").set_title(shortened(name, 36), fontsize=8, parse_math=False)
        variance = shown[name]["variance"]
        index = np.arange(1, len(variance) + 1)
        axes.set_xlim(0.5, len(variance) + 0.5)
        dots = {"marker": "."} if len(variance) == 1 else {}
        # Values at the rounding error of the largest are left off the log axis.
        known = np.where(variance > 1e-9 * np.nanmax(variance, initial=0.0), variance, np.nan)
        if not np.isnan(known).all():
            axes.plot(index, known, color=BLUE, linewidth=1.3, **dots)
            axes.set_yscale("log")
        axes.tick_params(axis="y", colors=BLUE, labelsize=7)
        axes.tick_params(axis="x", labelsize=7)
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.axhline(1.0, color=RED, linewidth=0.6, linestyle=":")
        right.plot(index, shown[name]["gain"], color=RED, linewidth=1.3, linestyle="--", **dots)
        right.set_ylim(low - margin, high + margin)
        right.tick_params(axis="y", colors=RED, labelsize=7)
    for axes in list(panels):  # unused panels
        axes.set_visible(False)
    figure.supxlabel("eigenvector of the features' covariance, by descending variance", fontsize=9)
    handles = [
        Line2D([], [], color=BLUE, label="variance (eigenvalue, left, log)"),
        Line2D([], [], color=RED, linestyle="--", label="gain (right; 1 = kept, 0 = removed)"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(2, columns), frameon=False, fontsize=9)
    return png(figure)


def through_the_depth(names: Sequence[str]) -> Sequence[str]:
    """Returns at most `MOST_PANELS` names, at even distances, first and last included."""
    if len(names) <= MOST_PANELS:
        return names
    return [names[index] for index in np.linspace(0, len(names) - 1, MOST_PANELS).round().astype(int)]
