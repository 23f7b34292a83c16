"""`Transform`: where every pixel of an image goes, as one value for the image and its labels.

Conventions:
- Sizes are (height, width) in pixels.
- The pixel in row i and column j covers [i, i + 1) × [j, j + 1); its center is at (i + ½, j + ½).
- Boxes are (x0, y0, x1, y1) and points (x, y), in the same continuous coordinates: pixel j alone is
  the span [j, j + 1].
- An image is the upright one that `drep_jax.data.decode` returns; labels belong to that.

A transform is a list of steps, see `drep_jax.data.steps`; its inverse is the list of the steps
back.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from drep_jax.data.resampling import INTERPOLATIONS, bilinear, nearest_place
from drep_jax.data.steps import KINDS, Margins, Orient, Resize, Size, Step, Window, padding, pixels_of
from drep_jax.errors import DataError, lookup

MOST_STEPS = 8
STEP_NUMBERS = 5
ROW = 2 + MOST_STEPS * STEP_NUMBERS
"""Numbers of a transform as a row of a batch."""

IGNORED = 255
"""Label of pixels that show nothing: they are neither learned from nor counted."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Where the pixels of an image go: steps, made once an image, for it and for its labels.

    >>> t = Transform((4, 6)).resize((8, 12)).crop(0, 2, 8, 8).flip()
    >>> t.size_out
    (8, 8)
    >>> boxes, keep = t.boxes(np.array([[1.0, 0.0, 2.0, 4.0]]))
    >>> boxes, t.inverse().boxes(boxes)[0]
    (array([[6., 0., 8., 8.]]), array([[1., 0., 2., 4.]]))

    Attributes:
      size_in: (height, width) of the image that it is made for.
      steps: what is done, in turn; none leaves an image as it is.
    """

    size_in: Size
    steps: tuple[Step, ...] = ()

    @property
    def size_out(self) -> Size:
        """(height, width) of what comes out."""
        size = self.size_in
        for step in self.steps:
            size = step.size(size)
        return size

    # Made -------------------------------------------------------------------------------------------------------------

    def orient(self, code: int) -> "Transform":
        """Adds a flip or turn; `code` as in `Orient`.

        Raises:
          DataError: for a code that is not 1 to 8.
        """
        if code not in range(1, 9):
            raise DataError(f"Orientations are numbered 1 to 8, as in EXIF; got {code}.")
        return self if code == 1 else self._and(Orient(code))

    def flip(self) -> "Transform":
        """Adds a horizontal flip."""
        return self.orient(2)

    def resize(self, size: Size) -> "Transform":
        """Adds a resize to (height, width).

        Raises:
          DataError: for a side below 1.
        """
        return self if tuple(size) == self.size_out else self._and(Resize(*_checked(size)))

    def window(self, top: int, left: int, height: int, width: int) -> "Transform":
        """Adds a window; see `Window`.

        Raises:
          DataError: for a side below 1.
        """
        same = (top, left, height, width) == (0, 0, *self.size_out)
        return self if same else self._and(Window(int(top), int(left), *_checked((height, width))))

    def crop(self, top: int, left: int, height: int, width: int) -> "Transform":
        """Adds a crop, a window inside the image.

        Raises:
          DataError: for a box that reaches beyond the image.
        """
        rows, columns = self.size_out
        if min(top, left) < 0 or top + height > rows or left + width > columns:
            raise DataError(
                f"The crop (top, left, height, width) = {(top, left, height, width)} reaches beyond the image of "
                f"{rows} x {columns} pixels (height x width). Crop inside, or use `window`."
            )
        return self.window(top, left, height, width)

    def pad(self, top: int, left: int, bottom: int, right: int) -> "Transform":
        """Adds margins, in pixels.

        Raises:
          DataError: for a negative margin.
        """
        if min(top, left, bottom, right) < 0:
            raise DataError(f"Margins are at least 0; got {(top, left, bottom, right)}.")
        height, width = self.size_out
        return self.window(-top, -left, height + top + bottom, width + left + right)

    def shift(self, down: int, right: int) -> "Transform":
        """Adds a shift by whole pixels; what leaves the image is lost, what comes in is fill."""
        return self.window(-down, -right, *self.size_out)

    def then(self, other: "Transform") -> "Transform":
        """Returns this transform followed by another one.

        Raises:
          DataError: for one that is made for another size.
        """
        if other.size_in != self.size_out:
            raise DataError(
                f"A transform made for {other.size_in} (height, width) cannot follow one that gives {self.size_out}."
            )
        return Transform(self.size_in, self.steps + other.steps)

    def inverse(self) -> "Transform":
        """Returns the way back, from what comes out to the image as it was.

        Points and boxes come back exactly, up to the rounding of float64. Of maps, what a crop has
        cut away shows nothing and gets the fill value; what a resize has taken is interpolated.
        """
        back, size = [], self.size_in
        for step in self.steps:
            back.append(step.undo(size))
            size = step.size(size)
        return Transform(size, tuple(reversed(back)))

    # Applied ----------------------------------------------------------------------------------------------------------

    def image(self, array: np.ndarray, *, interpolation: str = "bicubic", fill: int | Sequence[int] = 0) -> np.ndarray:
        """Applies it to an image.

        Args:
          array: uint8 (H, W) or (H, W, 3), of `size_in`.
          interpolation: a key of `drep_jax.data.resampling.INTERPOLATIONS`.
          fill: value of pixels that show nothing, or their color.

        Returns:
          uint8 of `size_out`; where possible a view of `array`.
        """
        self._check(array)

        def constant(shown: np.ndarray, margins: Sequence[tuple[int, int]]) -> np.ndarray:
            (above, below), (left, right) = margins
            height, width = shown.shape[:2]
            out = np.empty((above + height + below, left + width + right, *shown.shape[2:]), shown.dtype)
            out[...] = fill
            out[above : above + height, left : left + width] = shown
            return out

        return pixels_of(self.steps, array, lookup(INTERPOLATIONS, interpolation, "interpolation"), constant)

    def mask(self, array: np.ndarray, *, fill: float = IGNORED) -> np.ndarray:
        """Applies it to a map of labels (H, W, …), nearest; pixels that show nothing get `fill`."""
        self._check(array)
        rows, columns, swapped = self._read()
        array = array.swapaxes(0, 1) if swapped else array
        if not array.size:
            return np.full((len(rows), len(columns), *array.shape[2:]), fill, array.dtype)
        read = array[rows[:, None], columns]
        if min(rows.min(), columns.min()) < 0:
            read[(rows[:, None] < 0) | (columns < 0)] = fill
        return read

    def _read(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Returns what `mask` reads, from the last step back, so that nothing is larger than the result.

        Returns:
          For each row and each column of what comes out the one that it shows, -1 for none; and
          whether they are those of the image with its axes swapped.
        """
        sizes = [self.size_in]
        for step in self.steps:
            sizes.append(step.size(sizes[-1]))
        places = [np.arange(side) for side in sizes[-1]]
        axes = [0, 1]  # axis of the image before the step that the rows and columns run along
        for step, before in zip(reversed(self.steps), reversed(sizes[:-1]), strict=True):
            after = step.size(before)
            swap = False
            for end, axis in enumerate(axes):
                place = places[end]
                if isinstance(step, Orient):
                    swap = step.parts[0]
                    place = np.where(place < 0, -1, after[axis] - 1 - place) if step.parts[1 + axis] else place
                elif isinstance(step, Resize):
                    place = np.where(place < 0, -1, nearest_place(place, before[axis], after[axis]))
                else:
                    moved = place + (step.top, step.left)[axis]
                    place = np.where((place < 0) | (moved < 0) | (moved >= before[axis]), -1, moved)
                places[end] = place
            axes = axes[::-1] if swap else axes
        return places[0], places[1], axes == [1, 0]

    def dense(self, array: np.ndarray, *, fill: float = float("nan")) -> np.ndarray:
        """Applies it to a map of numbers, such as predictions, bilinear.

        Args:
          array: (H, W, …) of `size_in`; integers become float32.
          fill: value of pixels that show nothing. It is never blended with others.

        Returns:
          Floating point, (height, width, …) of `size_out`.
        """

        self._check(array)
        values = array if array.dtype.kind == "f" else array.astype(np.float32)
        margins: Margins = NO_MARGINS
        steps = list(self.steps)
        while steps and values.size:
            step = steps.pop(0)
            if isinstance(step, Resize):
                size, part, around = (step.height, step.width), None, NO_MARGINS
                if steps and isinstance(following := steps[0], Window):
                    part, around = following.inside(size)
                    steps.pop(0)
                values, margins = bilinear(values, size, part, margins), around
                continue
            values, margins = _edge_repeated(values, margins), NO_MARGINS
            if isinstance(step, Window):
                part, margins = step.inside(values.shape[:2])
                values = values[part]
            else:
                values = step.pixels(values, bilinear, _edge_repeated)
        if not values.size:
            return np.full((*self.size_out, *values.shape[2:]), fill, values.dtype)
        values = _edge_repeated(values, margins)
        shows = self.shows()
        return values if shows.all() else np.where(shows.reshape(shows.shape + (1,) * (values.ndim - 2)), values, fill)

    def shows(self) -> np.ndarray:
        """Returns which pixels of what comes out show a part of the image, bool (height, width)."""
        return self.mask(np.ones(self.size_in, bool), fill=False)

    def points(self, points: np.ndarray) -> np.ndarray:
        """Returns where points go, without clipping.

        Args:
          points: (n, 2), x and y.

        Returns:
          float64 (n, 2).
        """
        points, size = np.asarray(points, np.float64).reshape(-1, 2), self.size_in
        for step in self.steps:
            points, size = step.points(points, size), step.size(size)
        return points

    def boxes(self, boxes: np.ndarray, *, clip: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Returns where boxes go, and which of them are not empty.

        Args:
          boxes: (m, 4), x0, y0, x1, y1 with x0 ≤ x1 and y0 ≤ y1.
          clip: whether boxes are cut at the borders of the image before and after each step; with
            False, what lies outside stays, as `points` does it.

        Returns:
          float64 (m, 4), all boxes; and bool (m,), true for those of positive width and height.
          What else is known of the same objects is to be kept by the same mask.
        """
        boxes, size = np.asarray(boxes, np.float64).reshape(-1, 4), self.size_in
        boxes = _clipped(boxes, size) if clip else boxes
        for step in self.steps:
            corners = step.points(boxes.reshape(-1, 2), size).reshape(-1, 2, 2)
            boxes, size = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1), step.size(size)
            boxes = _clipped(boxes, size) if clip else boxes
        return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])

    # As a row of a batch ----------------------------------------------------------------------------------------------

    def row(self) -> np.ndarray:
        """Returns it as int32 (42,), which travels in a batch; `from_row` is the way back.

        Whole numbers, since all of a transform's parameters are: a float64 column would be rounded
        to float32 on the way through JAX. The first two are `size_in`; each step has five: its kind
        and its parameters.

        Raises:
          DataError: for more steps than fit.
        """
        if len(self.steps) > MOST_STEPS:
            raise DataError(f"A transform of {len(self.steps)} steps does not fit into a batch: at most {MOST_STEPS}.")
        row = np.zeros(ROW, np.int32)
        row[:2] = self.size_in
        for step, numbers in zip(self.steps, row[2:].reshape(MOST_STEPS, STEP_NUMBERS), strict=False):
            values = (step.KIND, *dataclasses.astuple(step))
            numbers[: len(values)] = values
        return row

    @classmethod
    def from_row(cls, row: Sequence[int] | np.ndarray) -> "Transform":
        """Returns the transform of a row; of zeros, which are padding, that of a (0, 0) image.

        Raises:
          DataError: for numbers that `row` does not give.
        """
        numbers = np.asarray(row).astype(np.int64)
        kinds = set(numbers[2::STEP_NUMBERS].tolist()) if numbers.shape == (ROW,) else {-1}
        if not kinds <= {0, *KINDS}:
            raise DataError(
                f"Expected {ROW} numbers, as `Transform.row` gives them; got an array of shape {numbers.shape}."
            )
        steps = []
        for kind, *values in numbers[2:].reshape(MOST_STEPS, STEP_NUMBERS).tolist():
            if kind:
                step = KINDS[kind]
                steps.append(step(*values[: len(dataclasses.fields(step))]))
        return cls((int(numbers[0]), int(numbers[1])), tuple(steps))

    def _and(self, step: Step) -> "Transform":
        return Transform(self.size_in, (*self.steps, step))

    def _check(self, array: np.ndarray) -> None:
        if array.shape[:2] != tuple(self.size_in):
            raise DataError(
                f"This transform is made for {self.size_in[0]} x {self.size_in[1]} pixels (height x width); got an array "
                f"of shape {array.shape}."
            )


NO_MARGINS: Margins = [(0, 0), (0, 0)]


def _edge_repeated(shown: np.ndarray, margins: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.pad(shown, [*margins, *[(0, 0)] * (shown.ndim - 2)], mode="edge") if padding(list(margins)) else shown


def _clipped(boxes: np.ndarray, size: Size) -> np.ndarray:
    height, width = size
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float64))


def _checked(size: Size) -> Size:
    height, width = map(int, size)
    if min(height, width) < 1:
        raise DataError(f"Sizes are (height, width), both at least 1; got {tuple(size)}.")
    return height, width
