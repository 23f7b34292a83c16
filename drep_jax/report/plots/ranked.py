"""plots/ranked.png: for some queries, the first gallery images of the unchanged and of the denoised backbone."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from drep_jax.report.plots.canvas import COLORS, GRAY, NAME, RED, png, shortened

GREEN = COLORS[2]
_INCH = 0.66
"""Width of a picture's cell; its height follows from the pictures."""
_GAP, _TEXT, _HEAD, _LEFT = 0.12, 0.34, 0.42, 1.8
"""Between cells, under each picture, over each query, and left of them all, in widths of a picture."""


def plot_ranked(report: Mapping[str, Any]) -> bytes | None:
    """One row an arm: the query, then what it finds; ✓ and a whole green frame are right, ✗ and a dashed red one wrong."""
    ranked = report.get("ranked")
    if not ranked or not ranked["queries"]:
        return None
    pictures = {name: _decoded(image) for name, image in ranked["images"].items()}
    arms, queries = ranked["arms"], ranked["queries"]
    tall = float(np.clip(np.median([len(one) / one.shape[1] for one in pictures.values()]), 0.5, 2.5))
    columns = 1 + max(len(found) for query in queries for found in query["found"].values())
    row = tall + _TEXT
    width = _LEFT + columns * (1 + _GAP) + 3 * _GAP
    height = len(queries) * (_HEAD + len(arms) * row) + _HEAD

    figure = Figure(figsize=(_INCH * width, _INCH * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-_LEFT, width - _LEFT), ylim=(height, 0))
    axes.set_axis_off()
    note = {"euclidean": "Euclidean distance", "cosine": "1 − cosine"}.get(ranked["metric"], ranked["metric"])
    title = f"images: {shortened(ranked['condition'], NAME)}; below each, whether it is right and its {note}"
    axes.text(0.2 - _LEFT, 0.25, title, fontsize=8, va="center", parse_math=False)
    top = _HEAD
    for query in queries:
        scores = " → ".join(f"{100 * query['ap'][arm]:.1f}" for arm in arms)
        said = f"{query['why']}: average precision {scores} %"
        axes.text(0.2 - _LEFT, top + 0.24, said, fontsize=8, va="center", fontweight="bold", parse_math=False)
        axes.axhline(top, color="#DDDDDD", linewidth=0.8)
        top += _HEAD
        for arm in arms:
            name = shortened(arm, 16)
            axes.text(0.2 - _LEFT, top + tall / 2, name, fontsize=7, va="center", parse_math=False)
            _draw(axes, pictures[str(query["image"])], (0, top), tall, GRAY, "-", "query")
            for place, one in enumerate(query["found"][arm], start=1):
                left = place * (1 + _GAP) + 2 * _GAP
                color, line, mark = (GREEN, "-", "✓") if one["right"] else (RED, (0, (2, 1.2)), "✗")
                said = f"{mark} {one['distance']:.3g}"
                _draw(axes, pictures[str(one["image"])], (left, top), tall, color, line, said)
            top += row
    return png(figure)


def _draw(axes: Any, image: np.ndarray, at: tuple[float, float], tall: float, color: str, line: Any, said: str) -> None:
    """Draws an image in its shape into a cell of width 1, with its frame and what is said under it."""
    shape = len(image) / image.shape[1]
    wide, high = (1.0, shape) if shape < tall else (tall / shape, tall)
    left, top = at[0] + (1 - wide) / 2, at[1] + (tall - high) / 2
    axes.imshow(image, extent=(left, left + wide, top + high, top), aspect="auto", interpolation="antialiased")
    axes.add_patch(Rectangle((left, top), wide, high, fill=False, edgecolor=color, linewidth=1.8, linestyle=line))
    axes.text(at[0] + 0.5, at[1] + tall + 0.16, said, fontsize=6.5, ha="center", va="center", color=color)


def _decoded(image: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        return np.asarray(opened.convert("RGB"))
