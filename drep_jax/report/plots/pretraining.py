"""plots/probe_curve.png, reconstructions.png and filters.png: the pre-training over its epochs, and what it sees."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from drep_jax.report.plots.canvas import BLUE, RED, png, styled

_CELL = 1.0
"""Inches a picture."""
_COLUMNS = 8
"""Directions in a row."""


def plot_probe_curve(report: Mapping[str, Any]) -> bytes | None:
    """Loss against the epoch, and where it was measured the probe's accuracy."""
    section = report.get("pretraining") or {}
    loss = [point for point in section.get("loss", ()) if point[1] is not None]
    if len(loss) < 2:
        return None
    epochs = section["batch_size"] / max(section["images"], 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = styled(figure.add_subplot(), "both")
    steps, values = zip(*loss, strict=True)
    axes.plot([step * epochs for step in steps], values, color=BLUE, linewidth=1.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss", color=BLUE)
    if curve := section.get("curve"):
        steps, values = zip(*curve, strict=True)
        right = axes.twinx()
        right.plot([step * epochs for step in steps], values, color=RED, marker="o", markersize=4, linewidth=1.5)
        right.set_ylabel("linear probe, % right", color=RED)
        right.spines[["top"]].set_visible(False)
    return png(figure)


def plot_reconstructions(report: Mapping[str, Any]) -> bytes | None:
    """One column an image: as it is, then for each level with noise and as predicted."""
    pictures = (report.get("pretraining") or {}).get("pictures")
    if not pictures or not pictures["clean"]:
        return None
    rows: list[tuple[str, Sequence[str]]] = [("clean", pictures["clean"])]
    for level in pictures["levels"]:
        rows += [(f"σ = {level['sigma']:.2f}", level["noisy"]), ("prediction", level["predicted"])]
    return _grid([images for _, images in rows], [name for name, _ in rows])


def plot_filters(report: Mapping[str, Any]) -> bytes | None:
    """The directions of the PCA, row by row."""
    pictures = (report.get("pretraining") or {}).get("pictures")
    if not pictures or not pictures["filters"]:
        return None
    filters = pictures["filters"]
    return _grid([filters[first : first + _COLUMNS] for first in range(0, len(filters), _COLUMNS)], None)


def _grid(rows: Sequence[Sequence[str]], names: Sequence[str] | None) -> bytes:
    columns, label = max(len(row) for row in rows), 0.9 if names else 0.0
    width, height = columns * _CELL + label, len(rows) * _CELL
    figure = Figure(figsize=(width, height))
    for down, row in enumerate(rows):
        bottom = 1 - (down + 1) * _CELL / height
        if names:
            figure.text(
                0.05 / width, bottom + _CELL / height / 2, names[down], fontsize=8, va="center", parse_math=False
            )
        for across, image in enumerate(row):
            left = (label + across * _CELL) / width
            axes = figure.add_axes((left, bottom, 0.95 * _CELL / width, 0.95 * _CELL / height))
            axes.imshow(_decoded(image), interpolation="nearest")
            axes.set_axis_off()
    return png(figure)


def _decoded(image: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        return np.asarray(opened.convert("RGB"))
