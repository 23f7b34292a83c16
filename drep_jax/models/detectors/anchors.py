"""Anchors and points of feature maps, as the public detectors place them.

Order: rows of cells, cells, then the anchors of a cell. mmdetection's anchors ("v2") have their
centers at multiples of the stride, without half a cell and without rounding; torchvision rounds the
base anchors to whole pixels, which makes another network; YOLO's lie at half a cell. All are NumPy
arrays: they are constants of a program.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from drep_jax.errors import ConfigError, lookup

Shape = tuple[int, int]
Stride = float | tuple[float, float]


def base_anchors(
    base: float, ratios: Sequence[float], scales: Sequence[float], *, rounded: bool = False, center: float = 0.0
) -> np.ndarray:
    """Returns the anchors of one cell, (ratios · scales, 4), ratios outermost.

        w = base·scale/√r, h = base·scale·√r, with r = h/w

    >>> base_anchors(4, (1.0,), (8.0,)).tolist()
    [[-16.0, -16.0, 16.0, 16.0]]

    Args:
      base: side in pixels of scale 1; the stride, in mmdetection.
      ratios: h/w.
      scales: of the side.
      rounded: whether coordinates are rounded to whole pixels, half to even, as in torchvision.
      center: of the anchors, x and y.
    """
    root = np.sqrt(np.asarray(ratios, np.float64))
    sides = base * np.asarray(scales, np.float64)
    width, height = (factor[:, None] * sides[None] for factor in (1 / root, root))
    half = np.stack([width.reshape(-1), height.reshape(-1)], axis=1) / 2
    anchors = np.concatenate([-half, half], axis=1)
    return (np.round(anchors) if rounded else anchors) + center


def grid_points(shape: Shape, stride: Stride, *, offset: float = 0.5) -> np.ndarray:
    """Returns the point of each cell of a map, ((column + offset)·stride, (row + offset)·stride), float32 (h·w, 2).

    >>> grid_points((1, 2), 8).tolist()
    [[4.0, 4.0], [12.0, 4.0]]
    """
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    y, x = np.meshgrid((np.arange(shape[0]) + offset) * down, (np.arange(shape[1]) + offset) * right, indexing="ij")
    return np.stack([x.reshape(-1), y.reshape(-1)], axis=1).astype(np.float32)


def grid_anchors(shape: Shape, stride: Stride, base: np.ndarray) -> np.ndarray:
    """Returns the anchors of each cell of a map, float32 (h·w·a, 4).

    Args:
      shape: (height, width) of the map.
      stride: pixels a cell, or (down, right).
      base: anchors of cell (0, 0), (a, 4).
    """
    points = grid_points(shape, stride, offset=0.0).astype(np.float64)
    return (np.tile(points, 2)[:, None] + base[None]).reshape(-1, 4).astype(np.float32)


def yolo_anchors(shape: Shape, stride: Stride, sizes: Sequence[Sequence[float]]) -> np.ndarray:
    """Returns YOLO's anchors, float32 (h·w·a, 4): at the center of each cell, of the given widths and heights."""
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    half = np.asarray(sizes, np.float64).reshape(-1, 2) / 2
    middle = np.array([right / 2, down / 2])
    return grid_anchors(shape, stride, np.concatenate([middle - half, middle + half], axis=1))


@dataclasses.dataclass(frozen=True)
class AnchorKind:
    """How one detector lays anchors over its levels.

    Attributes:
      strides: pixels a cell, one a level.
      bases: anchors of cell (0, 0), one (a, 4) a level.
      floor_stride: whether the stride of a map is ⌊image / map⌋, as in torchvision, instead of that
        of its level.
    """

    strides: tuple[int, ...]
    bases: tuple[np.ndarray, ...]
    floor_stride: bool = False

    def __call__(self, shapes: Sequence[Shape], image: Shape | None = None) -> list[np.ndarray]:
        """Returns the anchors of each level, float32 (h·w·a, 4).

        Args:
          shapes: (height, width) of the maps, finest first for all but YOLO.
          image: (height, width) of the padded image, where strides follow from it.

        Raises:
          ConfigError: for another number of maps than levels, or a missing image size.
        """
        if len(shapes) != len(self.strides):
            raise ConfigError(f"These anchors are of {len(self.strides)} pyramid levels; got {len(shapes)} maps.")
        if self.floor_stride and image is None:
            raise ConfigError("The strides of these anchors follow from the image's size: give it.")
        anchors = []
        for shape, level_stride, base in zip(shapes, self.strides, self.bases, strict=True):
            stride: Stride = level_stride
            if self.floor_stride and image is not None:
                stride = (image[0] // shape[0], image[1] // shape[1])
            anchors.append(grid_anchors(shape, stride, base))
        return anchors


_RATIOS = (0.5, 1.0, 2.0)


def _pyramid(strides: Sequence[int], ratios: Sequence[float], scales: Sequence[float]) -> AnchorKind:
    return AnchorKind(tuple(strides), tuple(base_anchors(stride, ratios, scales) for stride in strides))


def _yolo(strides: Sequence[int], sizes: Sequence[Sequence[tuple[float, float]]]) -> AnchorKind:
    bases = tuple(yolo_anchors((1, 1), stride, level) for stride, level in zip(strides, sizes, strict=True))
    return AnchorKind(tuple(strides), bases)


YOLOV3_SIZES = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
"""Widths and heights of YOLOv3's anchors at strides 32, 16 and 8."""

ANCHORS: Mapping[str, AnchorKind] = {
    "faster": _pyramid((4, 8, 16, 32, 64), _RATIOS, (8.0,)),
    "torchvision": AnchorKind(
        (4, 8, 16, 32, 64),
        tuple(base_anchors(side, _RATIOS, (1.0,), rounded=True) for side in (32, 64, 128, 256, 512)),
        floor_stride=True,
    ),
    "retinanet": _pyramid((8, 16, 32, 64, 128), _RATIOS, tuple(4 * 2 ** (third / 3) for third in range(3))),
    "atss": _pyramid((8, 16, 32, 64, 128), (1.0,), (8.0,)),
    "yolov3": _yolo((32, 16, 8), YOLOV3_SIZES),
}
"""Anchors of the region proposals of Faster and Mask R-CNN (mmdetection's and torchvision's), RetinaNet, ATSS, YOLOv3."""


def anchors_of(kind: str, shapes: Sequence[Shape], image: Shape | None = None) -> list[np.ndarray]:
    """Returns the anchors of each level of a detector in `ANCHORS`.

    Raises:
      ConfigError: for an unknown detector, or another number of maps than it has levels.
    """
    return lookup(ANCHORS, kind, "kind of anchors")(shapes, image)


def level_shapes(image: Shape, strides: Sequence[int]) -> list[Shape]:
    """Returns (height, width) of the maps of an image, ⌈side / stride⌉.

    >>> level_shapes((100, 64), (32, 64))
    [(4, 2), (2, 1)]
    """
    return [(math.ceil(image[0] / stride), math.ceil(image[1] / stride)) for stride in strides]
