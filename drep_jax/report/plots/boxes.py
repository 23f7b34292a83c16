"""plots/boxes.png: test images with the boxes of their objects and of two networks, and what was gained and lost."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from drep_jax.report.plots.canvas import BLUE, COLORS, GRAY, NAME, RED, png, shortened

BOTH = COLORS[2]
"""Color of an object that both networks find, or a box that is right."""

DASHED: Any = (0, (3, 1.5))
DOTTED: Any = (0, (1, 1.2))

_CELL = 2.4
"""Width of a picture in inches."""
_GAP, _HEAD = 0.04, 0.1
"""Between pictures, and above a row, in widths of a picture."""
_ROW = 0.2
"""Height of a row of the legend, in inches."""
_NAMED = 8
"""Boxes of a picture whose class is written beside them."""


def plot_boxes(report: Mapping[str, Any]) -> bytes | None:
    """One row an image: its objects, the boxes of both arms, and the objects that only one of them finds."""
    boxes = report.get("boxes")
    if not boxes or not boxes["images"]:
        return None
    arms = boxes["arms"]
    pictures = [_decoded(one["image"]) for one in boxes["images"]]
    tall = [len(picture) / picture.shape[1] for picture in pictures]
    heads = ("objects", *arms, "gained and lost")
    width = _CELL * (len(heads) * (1 + _GAP) + _GAP)
    height = _CELL * (sum(tall) + len(pictures) * (_HEAD + _GAP)) + 3 * _ROW

    figure = Figure(figsize=(width, height))
    top = height - _ROW
    for place, head in enumerate(heads):
        x = _CELL * (_GAP + place * (1 + _GAP) + 0.5) / width
        text = head if place else f"objects, {boxes['condition']}"
        figure.text(x, top / height, shortened(text, NAME), fontsize=8, ha="center", va="bottom", parse_math=False)
    for one, picture, shape in zip(boxes["images"], pictures, tall, strict=True):
        top -= _CELL * _HEAD
        figure.text(
            _CELL * _GAP / width,
            top / height,
            _said(one, arms),
            fontsize=7,
            va="bottom",
            fontweight="bold",
            parse_math=False,
        )
        top -= _CELL * shape
        truth: list[Any] = [
            (entry["box"], entry["class"], GRAY if entry["crowd"] else BLUE, "-") for entry in one["truth"]
        ]
        cells = [(picture, truth)]
        for arm in arms:
            found = [
                (entry["box"], entry["class"], *((BOTH, "-") if entry["object"] >= 0 else (RED, DASHED)))
                for entry in one["found"][arm]
            ]
            cells.append((picture, found))
        changed = [(one["truth"][place], BLUE, "-") for place in one["gained"]]
        changed += [(one["truth"][place], RED, DOTTED) for place in one["lost"]]
        faded = (128 + picture.mean(axis=2, keepdims=True) / 2).astype(np.uint8).repeat(3, axis=2)
        cells.append((faded, [(entry["box"], entry["class"], color, line) for entry, color, line in changed]))
        for place, (shown, entries) in enumerate(cells):
            left = _CELL * (_GAP + place * (1 + _GAP))
            axes = figure.add_axes((left / width, top / height, _CELL / width, _CELL * shape / height))
            _draw(axes, shown, entries, boxes["classes"])
        top -= _CELL * _GAP
    figure.legend(handles=_legend(boxes), loc="lower center", ncols=6, fontsize=7, frameon=False, borderaxespad=0.2)
    return png(figure)


def _decoded(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image.convert("RGB"))


def _said(one: Mapping[str, Any], arms: Sequence[str]) -> str:
    counts = []
    for arm in arms:
        right = {entry["object"] for entry in one["found"][arm] if entry["object"] >= 0}
        wrong = sum(entry["object"] < 0 for entry in one["found"][arm])
        counts.append(f"{len(right)} found, {wrong} wrong")
    objects = sum(not entry["crowd"] for entry in one["truth"])
    return f"image {one['index']}, {one['why']}: {objects} objects; {' → '.join(counts)}"


def _draw(axes: Any, picture: np.ndarray, entries: Sequence[Any], names: Sequence[str]) -> None:
    height, width = picture.shape[:2]
    axes.imshow(picture, interpolation="antialiased", aspect="auto", extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for number, ((x0, y0, x1, y1), label, color, line) in enumerate(entries):
        corner, sides = (x0 * width, y0 * height), ((x1 - x0) * width, (y1 - y0) * height)
        for edge, thick in (("#FFFFFF", 2.6), (color, 1.3)):  # a white rim is seen on any background
            axes.add_patch(
                Rectangle(
                    corner, *sides, fill=False, edgecolor=edge, linewidth=thick, linestyle="-" if thick > 2 else line
                )
            )
        if number < _NAMED and label < len(names):
            name = shortened(names[label], NAME)
            box = {"facecolor": color, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
            axes.text(
                *corner, name, fontsize=4.5, color="#FFFFFF", va="bottom", bbox=box, clip_on=True, parse_math=False
            )


def _legend(boxes: Mapping[str, Any]) -> list[Line2D]:
    score = f"score of {boxes['score']:g} or more"
    entries: list[tuple[str, Any, str]] = [
        (BLUE, "-", "object"),
        (GRAY, "-", "crowd"),
        (BOTH, "-", f"right box, {score}"),
        (RED, DASHED, "wrong box"),
        (BLUE, "-", "last column: only the second finds it"),
        (RED, DOTTED, "only the first"),
    ]
    return [Line2D([], [], color=color, linestyle=line, linewidth=1.5, label=text) for color, line, text in entries]
