"""plots/examples.png: test images as they are and corrupted, and what the unchanged and the denoised backbone answer."""

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
_COLUMNS = 4
"""Images side by side; each is drawn twice, clean and corrupted."""
_CELL = 0.95
"""Inches a picture."""
_HEAD, _LINE, _GAP = 0.3, 0.2, 0.25
"""Height of the line over a pair, of each answer under it, and the gap between pairs, in widths of a picture."""


def plot_examples(report: Mapping[str, Any]) -> bytes | None:
    """One pair an image, clean and corrupted; below it each arm's answer with its confidence, ✓ in green or ✗ in red."""
    examples = report.get("examples")
    if not examples or not examples["images"]:
        return None
    images, arms = examples["images"], examples["arms"]
    pictures = [(_decoded(one["clean"]), _decoded(one["corrupted"])) for one in images]
    tall = float(np.clip(np.median([len(clean) / clean.shape[1] for clean, _ in pictures]), 0.5, 2.0))
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    wide, high = 2.0 + _GAP, _HEAD + tall + _LINE * (len(arms) + 1) + _GAP
    width, height = columns * wide + _GAP, rows * high + _HEAD

    figure = Figure(figsize=(_CELL * width, _CELL * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    title = f"clean, and {shortened(examples['condition'], NAME)}; answers on the latter with their confidence"
    axes.text(_GAP, 0.2, title, fontsize=8, va="center", parse_math=False)
    for number, (one, pair) in enumerate(zip(images, pictures, strict=True)):
        left, top = _GAP + number % columns * wide, _HEAD + number // columns * high
        head = f"{one['why']}: {shortened(one['label'], 22)}"
        axes.text(left, top + _HEAD / 2, head, fontsize=7, va="center", fontweight="bold", parse_math=False)
        for place, image in enumerate(pair):
            extent = (left + place, left + place + 0.97, top + _HEAD + tall, top + _HEAD)
            axes.imshow(image, extent=extent, aspect="auto", interpolation="antialiased")
            axes.add_patch(
                Rectangle((left + place, top + _HEAD), 0.97, tall, fill=False, edgecolor=GRAY, linewidth=0.8)
            )
        for line, arm in enumerate(arms, start=1):
            answer = one["answers"][arm]
            right = answer["answer"] == one["label"]
            text = f"{'✓' if right else '✗'} {shortened(arm, 14)}: {shortened(answer['answer'], 18)}, "
            text += f"{100 * answer['confidence']:.0f} %"
            at = top + _HEAD + tall + _LINE * line
            axes.text(left, at, text, fontsize=6.5, va="center", color=GREEN if right else RED, parse_math=False)
    return png(figure)


def _decoded(image: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        return np.asarray(opened.convert("RGB"))
