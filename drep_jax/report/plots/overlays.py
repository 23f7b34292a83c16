"""plots/overlays.png: test images, the classes of their labels and of two networks, and where the networks differ."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from drep_jax.report.plots.canvas import BLUE, NAME, RED, png, shortened

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#F0E442",
    "#552828",
    "#AA00FF",
    "#28D2FF",
    "#282855",
    "#FFAA82",
    "#822800",
    "#550082",
    "#AA5555",
    "#825582",
)
"""Colors of the most frequent classes that are shown, distinct with any color vision."""

OTHERS, VOID, BOTH_WRONG = "#B4B4B4", "#FFFFFF", "#F0E442"
"""Classes beyond the palette; pixels without a class; pixels that changed from one wrong class to another."""

_STRENGTH = 0.75
"""Of a class's color over the gray image."""

_CELL = 2.0
"""Width of a picture in inches."""
_GAP, _HEAD = 0.04, 0.12
"""Between pictures, and above a row, in widths of a picture."""
_ROW = 0.2
"""Height of a row of the legend, in inches."""
_COLUMNS = 6
"""Entries in a row of the legend."""


def plot_overlays(report: Mapping[str, Any]) -> bytes | None:
    """One row an image: as it is seen, with its labels, with the answers of both arms, and where these differ."""
    overlays = report.get("overlays")
    if not overlays or not overlays["images"]:
        return None
    arms, ignored = overlays["arms"], overlays["ignored"]
    rows = [_decoded(one, arms) for one in overlays["images"]]
    classes = _frequent([each for _, label, answers in rows for each in (label, *answers)], ignored)
    legend = _legend(classes, overlays["classes"], rows, ignored)
    tall = [len(image) / image.shape[1] for image, _, _ in rows]
    lines = -(-len(legend) // _COLUMNS) + 1
    width = _CELL * (5 * (1 + _GAP) + _GAP)
    height = _CELL * (sum(tall) + len(rows) * (_HEAD + _GAP)) + _ROW * (lines + 1)

    figure = Figure(figsize=(width, height))
    top = height - _ROW
    heads = (f"image, {overlays['condition']}", "labels", *arms, "where they differ")
    for place, head in enumerate(heads):
        x = _CELL * (_GAP + place * (1 + _GAP) + 0.5) / width
        figure.text(x, top / height, shortened(head, NAME), fontsize=8, ha="center", va="bottom", parse_math=False)
    for (image, label, answers), one, shape in zip(rows, overlays["images"], tall, strict=True):
        top -= _CELL * _HEAD
        scores = " → ".join(f"{100 * one['accuracy'][arm]:.1f}" for arm in arms)
        said = f"image {one['index']}, {one['why']}: {scores} % of the labeled pixels right"
        figure.text(
            _CELL * _GAP / width, top / height, said, fontsize=7, va="bottom", fontweight="bold", parse_math=False
        )
        top -= _CELL * shape
        gray = _gray(image)
        pictures = (image, *(_colored(gray, each, classes, ignored) for each in (label, *answers)))
        for place, picture in enumerate((*pictures, _differences(gray, label, (answers[0], answers[1]), ignored))):
            left = _CELL * (_GAP + place * (1 + _GAP))
            axes = figure.add_axes((left / width, top / height, _CELL / width, _CELL * shape / height))
            axes.imshow(picture, interpolation="antialiased", aspect="auto")
            axes.set_axis_off()
        top -= _CELL * _GAP
    figure.legend(handles=legend, loc="lower center", ncols=_COLUMNS, fontsize=7, frameon=False, borderaxespad=0.2)
    return png(figure)


def _decoded(one: Mapping[str, Any], arms: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Returns the image, uint8 (h, w, 3), its labels and the answers, (h, w)."""

    def opened(text: str, mode: str) -> np.ndarray:
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            return np.asarray(image.convert(mode))

    label, *answers = (opened(text, "L") for text in (one["label"], *(one["answers"][arm] for arm in arms)))
    image = Image.fromarray(opened(one["image"], "RGB")).resize(label.shape[::-1])
    return np.asarray(image), label, answers


def _frequent(maps: Sequence[np.ndarray], ignored: int) -> list[int]:
    """Returns the most frequent classes, as many as there are colors, in the order of their numbers."""
    counts = np.sum([np.bincount(each.reshape(-1), minlength=256) for each in maps], axis=0)
    counts[ignored] = 0
    order = np.argsort(-counts, kind="stable")[: len(PALETTE)]
    return sorted(int(label) for label in order if counts[label])


def _legend(classes: Sequence[int], names: Sequence[str], rows: Sequence[Any], ignored: int) -> list[Patch]:
    def name(label: int) -> str:
        return shortened(names[label], NAME) if label < len(names) else str(label)

    shown = {int(label) for _, *maps in rows for each in (maps[0], *maps[1]) for label in np.unique(each)}
    entries = [(PALETTE[place], name(label)) for place, label in enumerate(classes)]
    entries += [(OTHERS, "other classes")] if shown - {*classes, ignored} else []
    entries += [(VOID, "no class")] if ignored in shown else []
    entries += [
        (BLUE, "last column: only the second right"),
        (RED, "only the first right"),
        (BOTH_WRONG, "differently wrong"),
    ]
    return [Patch(facecolor=color, edgecolor="#555555", linewidth=0.5, label=text) for color, text in entries]


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)], np.float64)


def _gray(image: np.ndarray) -> np.ndarray:
    """Returns the luminance of an image, (h, w, 1)."""
    return (image.astype(np.float64) @ np.array([0.299, 0.587, 0.114]))[..., None]


def _painted(gray: np.ndarray, color: str) -> np.ndarray:
    return _STRENGTH * _rgb(color) + (1 - _STRENGTH) * gray


def _colored(gray: np.ndarray, labels: np.ndarray, classes: Sequence[int], ignored: int) -> np.ndarray:
    """Returns the classes in their colors over the gray image, uint8 (h, w, 3)."""
    picture = np.broadcast_to(_painted(gray, OTHERS), (*labels.shape, 3)).copy()
    for color, label in ((VOID, ignored), *zip(PALETTE, classes, strict=False)):
        picture = np.where((labels == label)[..., None], _painted(gray, color), picture)
    return np.rint(picture).astype(np.uint8)


def _differences(
    gray: np.ndarray, labels: np.ndarray, answers: tuple[np.ndarray, np.ndarray], ignored: int
) -> np.ndarray:
    """Returns where two maps differ, in colors over the faded image, uint8 (h, w, 3)."""
    before, after = answers
    picture = np.broadcast_to(128 + gray / 2, (*labels.shape, 3)).copy()
    differ = (before != after) & (labels != ignored)
    for color, where in ((BOTH_WRONG, differ), (BLUE, differ & (after == labels)), (RED, differ & (before == labels))):
        picture = np.where(where[..., None], _rgb(color), picture)
    return np.rint(picture).astype(np.uint8)
