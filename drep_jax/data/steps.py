"""The three kinds of steps that a `Transform` takes, each undone by one of the same kind.

`Orient` flips and turns; `Resize` scales; `Window` is a crop where it lies inside the image,
padding where it reaches beyond, and a shift where it does both. Each says what size it gives, where
points go and where pixels go.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from drep_jax.data.resampling import Part, Resample

Size = tuple[int, int]
"""(height, width) in pixels."""

Margins = list[tuple[int, int]]
"""Pixels of padding: (above, below), (left, right)."""

Pad = Callable[[np.ndarray, Sequence[tuple[int, int]]], np.ndarray]
"""(pixels (h, w, …), ((above, below), (left, right))) ↦ pixels with margins."""


@dataclasses.dataclass(frozen=True)
class Orient:
    """Turns and flips by multiples of a right angle: what an EXIF orientation asks for.

    Attributes:
      code: 1 nothing, 2 horizontal flip, 3 half turn, 4 vertical flip, 5 transpose, 6 quarter turn
        clockwise, 7 transpose along the other diagonal, 8 quarter turn counterclockwise.
    """

    code: int
    KIND: ClassVar[int] = 1

    @property
    def parts(self) -> tuple[bool, bool, bool]:
        """Whether the axes are swapped, and then whether rows and columns are reversed."""
        return self.code >= 5, self.code in (3, 4, 7, 8), self.code in (2, 3, 6, 7)

    def size(self, before: Size) -> Size:
        """Returns the size that an image of this size gets."""
        return before[::-1] if self.parts[0] else before

    def undo(self, before: Size) -> "Orient":
        """Returns the step back."""
        del before
        return Orient({6: 8, 8: 6}.get(self.code, self.code))

    def points(self, points: np.ndarray, before: Size) -> np.ndarray:
        """Returns where points (n, 2) go."""
        swap, flip_y, flip_x = self.parts
        height, width = self.size(before)
        x, y = (points[:, ::-1] if swap else points).T
        return np.stack([width - x if flip_x else x, height - y if flip_y else y], axis=1)

    def pixels(self, array: np.ndarray, resample: Resample, pad: Pad) -> np.ndarray:
        """Returns where the pixels (H, W, …) go."""
        del resample, pad
        swap, flip_y, flip_x = self.parts
        array = array.swapaxes(0, 1) if swap else array
        return array[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


@dataclasses.dataclass(frozen=True)
class Resize:
    """Scales both sides to this size; the scales are ratios of whole numbers of pixels."""

    height: int
    width: int
    KIND: ClassVar[int] = 2

    def size(self, before: Size) -> Size:
        """Returns the size that an image of this size gets."""
        del before
        return self.height, self.width

    def undo(self, before: Size) -> "Resize":
        """Returns the step back."""
        return Resize(*before)

    def points(self, points: np.ndarray, before: Size) -> np.ndarray:
        """Returns where points (n, 2) go."""
        return points * np.array([self.width, self.height], np.float64) / np.array([before[1], before[0]], np.float64)

    def pixels(self, array: np.ndarray, resample: Resample, pad: Pad) -> np.ndarray:
        """Returns where the pixels (H, W, …) go."""
        del pad
        return resample(array, (self.height, self.width))


@dataclasses.dataclass(frozen=True)
class Window:
    """What a window of the image shows: a crop, and padding where it reaches beyond the image.

    Attributes:
      top, left: of the window, in pixels of the image; negative above it and to its left.
      height, width: of the window.
    """

    top: int
    left: int
    height: int
    width: int
    KIND: ClassVar[int] = 3

    def size(self, before: Size) -> Size:
        """Returns the size that an image of this size gets."""
        del before
        return self.height, self.width

    def undo(self, before: Size) -> "Window":
        """Returns the step back."""
        return Window(-self.top, -self.left, *before)

    def points(self, points: np.ndarray, before: Size) -> np.ndarray:
        """Returns where points (n, 2) go."""
        del before
        return points - np.array([self.left, self.top], np.float64)

    def pixels(self, array: np.ndarray, resample: Resample, pad: Pad) -> np.ndarray:
        """Returns where the pixels (H, W, …) go."""
        del resample
        inside, margins = self.inside(array.shape[:2])
        shown = array[inside]
        return pad(shown, margins) if padding(margins) else shown

    def inside(self, before: Size) -> tuple[Part, Margins]:
        """Returns the part of an image of this size that is shown, and the padding around it."""
        margins, parts = [], []
        for start, length, old in zip((self.top, self.left), (self.height, self.width), before, strict=True):
            low, high = (min(max(edge, 0), old) for edge in (start, start + length))
            above = min(max(-start, 0), length)
            parts.append(slice(low, high))
            margins.append((above, length - above - (high - low)))
        return (parts[0], parts[1]), margins


Step = Orient | Resize | Window
KINDS: dict[int, type[Orient] | type[Resize] | type[Window]] = {kind.KIND: kind for kind in (Orient, Resize, Window)}


def padding(margins: Margins) -> bool:
    """Returns whether there is any padding."""
    return any(map(any, margins))


def pixels_of(steps: Sequence[Step], array: np.ndarray, resample: Resample, pad: Pad) -> np.ndarray:
    """Returns where the pixels (H, W, …) go in all steps.

    Of a resize that a window follows, only what the window shows is computed: an image of one by a
    thousand pixels, scaled to cover a square, would take as much memory as a thousand of them.
    """
    waiting: Resize | None = None
    for step in steps:
        if waiting is not None and isinstance(step, Window):
            part, margins = step.inside((waiting.height, waiting.width))
            array = resample(array, (waiting.height, waiting.width), part)
            array, waiting = pad(array, margins) if padding(margins) else array, None
            continue
        if waiting is not None:
            array, waiting = waiting.pixels(array, resample, pad), None
        if isinstance(step, Resize):
            waiting = step
        else:
            array = step.pixels(array, resample, pad)
    return array if waiting is None else waiting.pixels(array, resample, pad)
