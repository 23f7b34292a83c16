"""Masks of objects as COCO writes them: polygons, counts of runs, and those counts as text.

Runs go down the columns, alternately of 0 and of 1, beginning with 0. As text each count is a
number of 5 bits a character (from "0" on, bit 6: more follow, the last one's bit 5 is the sign);
from the fourth on, a count is given by its difference to the one two before. A polygon is drawn as
pycocotools draws it: its corners are rounded to fifths of a pixel, and a pixel belongs to it if the
line up from its center crosses an odd number of edges.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.data.steps import Size
from drep_jax.errors import DataError

FINER = 5
"""Steps a pixel of the grid that polygons are drawn on."""


def mask_of(outline: Any, size: Size, where: str = "the object") -> np.ndarray:
    """Returns the mask of an object, bool (height, width).

    >>> mask_of({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3)).astype(int).tolist()
    [[0, 1, 0], [1, 0, 0]]

    Args:
      outline: COCO's: polygons [[x, y, x, y, …], …], or {"size": [height, width], "counts":
        numbers or text}.
      size: (height, width) of the image.
      where: what to call it in messages.

    Raises:
      DataError: for anything else, and runs that do not fill the image.
    """
    if isinstance(outline, Mapping):
        counts = outline.get("counts")
        if isinstance(counts, str | bytes):
            counts = counts_of_text(counts)
        if not isinstance(counts, Sequence) or list(outline.get("size", ())) != list(size):
            raise DataError(
                f"{where}: runs of the size {outline.get('size')}; expected {list(size)} (height, width) and counts."
            )
        runs = np.array(counts, np.int64)
        if (runs < 0).any() or runs.sum() != size[0] * size[1]:
            raise DataError(f"{where}: its runs add up to {runs.sum()} pixels; the image has {size[0] * size[1]}.")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[1], size[0]).T
    if not isinstance(outline, Sequence) or isinstance(outline, str):
        raise DataError(f"{where}: its outline is a {type(outline).__name__}; expected polygons or runs.")
    mask = np.zeros(size, bool)
    for polygon in outline:
        points = np.asarray(polygon, np.float64).reshape(-1)
        if len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            raise DataError(f"{where}: a polygon of {len(points)} numbers; expected x and y of at least three corners.")
        mask |= drawn(points.reshape(-1, 2), size)
    return mask


def drawn(corners: np.ndarray, size: Size) -> np.ndarray:
    """Returns a polygon (n, 2), x and y, as a mask, bool (height, width)."""
    height, width = size
    grid = np.trunc(FINER * corners + 0.5).astype(np.int64)
    u, v = (np.concatenate(parts) for parts in zip(*map(_edge, grid, np.roll(grid, -1, axis=0)), strict=True))
    turns = np.flatnonzero(u[1:] != u[:-1])
    before, after = (u[turns], v[turns]), (u[turns + 1], v[turns + 1])
    column = (np.where(after[0] < before[0], after[0], after[0] - 1) + 0.5) / FINER - 0.5
    row = np.ceil(np.clip((np.minimum(after[1], before[1]) + 0.5) / FINER - 0.5, 0, height)).astype(np.int64)
    crossed = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    place = column[crossed].astype(np.int64) * height + row[crossed]
    odd = np.cumsum(np.bincount(place, minlength=height * width + 1))[: height * width] % 2 == 1
    return odd.reshape(width, height).T


def _edge(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points of the grid along an edge, both ends included, in its direction."""
    (x0, y0), (x1, y1) = start.tolist(), stop.tolist()
    wide, high = abs(x1 - x0), abs(y1 - y0)
    steep = wide < high
    backwards = y0 > y1 if steep else x0 > x1
    if backwards:
        x0, y0, x1, y1 = x1, y1, x0, y0
    steps = np.arange((high if steep else wide) + 1)
    slope = ((x1 - x0) if steep else (y1 - y0)) / max(len(steps) - 1, 1)
    along = steps + (y0 if steep else x0)
    across = np.trunc((x0 if steep else y0) + slope * steps + 0.5).astype(np.int64)
    points = (across, along) if steep else (along, across)
    return (points[0][::-1], points[1][::-1]) if backwards else points


def runs_of(mask: np.ndarray) -> dict[str, Any]:
    """Returns a mask as COCO's runs with counts as text, as files of results have them.

    Args:
      mask: bool (height, width).
    """
    flat = np.asarray(mask, bool).T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(np.concatenate([[0], changes, [len(flat)]]))
    return {"size": list(mask.shape), "counts": text_of_counts(counts.tolist())}


def text_of_counts(counts: Sequence[int]) -> str:
    """Returns counts of runs as text."""
    characters = []
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            done = value == (-1 if bits & 16 else 0)
            characters.append(chr(bits + 48 + (0 if done else 32)))
            if done:
                break
    return "".join(characters)


def counts_of_text(text: str | bytes) -> list[int]:
    """Returns the counts of runs that a text gives.

    Raises:
      DataError: if it breaks off inside a number, or has another character.
    """
    counts: list[int] = []
    value = shift = 0
    more = False
    for byte in text.encode() if isinstance(text, str) else text:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise DataError(f"Counts of runs as text have the character {chr(byte)!r}: the text is damaged.")
        value |= (bits & 31) << shift
        shift, more = shift + 5, bool(bits & 32)
        if not more:
            value -= (1 << shift) if bits & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if more:
        raise DataError("Counts of runs as text break off inside a number: the text is damaged.")
    return counts
