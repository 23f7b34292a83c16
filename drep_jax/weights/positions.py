"""Position embeddings of another grid of patches, resized the way their own project does it: P' = A_h P A_wᵀ.

Every interpolation is separable, so it is one small matrix of weights along each axis: row i holds
how much each old place contributes to the new place i. The grid that a file was made for is never
guessed: a format fixes it, or the user says it.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from drep_jax.errors import CheckpointError

Grid = tuple[int, int]
CLASS_TOKEN = "Whether the class token has a position, too, is --config.model.position_class_token."


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """How one project resizes.

    Attributes:
      name: for messages.
      weights: (old size, new size) of an axis ↦ matrix (new, old).
    """

    name: str
    weights: Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Positions:
    """Position embeddings (1, prefix + height·width, dim), row by row, of a backbone and of its format's files.

    Attributes:
      leaf: path of the parameter.
      prefix: number of positions before those of the patches; they are kept as they are.
      grid: (height, width) of the backbone's patches.
      interpolation: of the format's own project.
      source_grid: that all files of the format have, if the number of positions agrees with it.
    """

    leaf: str
    prefix: int
    grid: Grid
    interpolation: Interpolation
    source_grid: Grid | None = None


def source_grid(positions: Positions, shape: tuple[int, ...], given: Grid | None) -> Grid | None:
    """Returns the grid of a file's position embeddings, or None if that is not known.

    Args:
      positions: of the backbone.
      shape: of the file's tensor.
      given: what the user said.

    Raises:
      CheckpointError: if what the user said is not the number of positions in the file.
    """
    count = shape[1] - positions.prefix
    if given is not None:
        if len(given) != 2 or math.prod(given) != count:
            raise CheckpointError(
                f"--config.backbone.init_grid={given} is {math.prod(given)} patches, but of the file's {shape[1]} positions "
                f"this model takes {count} for patches ({positions.prefix} before them). Give (height, width) of the grid "
                f"of patches that the file was trained with. {CLASS_TOKEN}"
            )
        return given
    fixed = positions.source_grid
    if fixed is not None and math.prod(fixed) == count:
        return fixed
    return positions.grid if count == math.prod(positions.grid) else None


def resize(positions: Positions, tensor: np.ndarray, old: Grid) -> np.ndarray:
    """Returns position embeddings for the backbone's grid, float32.

    Args:
      positions: of the backbone.
      tensor: (1, prefix + height·width, dim) for the grid `old`.
      old: (height, width) of the tensor's patches.
    """
    prefix, patches = tensor[:, : positions.prefix], tensor[0, positions.prefix :]
    rows, columns = (positions.interpolation.weights(*sizes) for sizes in zip(old, positions.grid, strict=True))
    patches = patches.astype(np.float64).reshape(*old, -1)
    patches = np.einsum("ih,jw,hwd->ijd", rows, columns, patches, optimize=True)
    patches = patches.reshape(1, math.prod(positions.grid), -1)
    return np.concatenate([prefix.astype(np.float32), patches.astype(np.float32)], axis=1)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Returns Keys' convolution kernel, of support 2."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _gathered(places: np.ndarray, weights: np.ndarray, old: int) -> np.ndarray:
    """Returns the matrix that adds `weights` (new, taps) of the old `places` (new, taps); places beyond an end are the end."""
    matrix = np.zeros((len(places), old))
    np.add.at(matrix, (np.arange(len(places))[:, None], np.clip(places, 0, old - 1)), weights)
    return matrix


def _bicubic(old: int, new: int, scale: float) -> np.ndarray:
    """Returns cubic interpolation (a = -0.75) at the pixel centers (i + 1/2)·scale."""
    center = (np.arange(new) + 0.5) * scale - 0.5
    places = np.floor(center).astype(int)[:, None] + np.arange(-1, 3)
    return _gathered(places, _cubic(center[:, None] - places, -0.75), old)


def bicubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the weights of `torch.nn.functional.interpolate(mode="bicubic", size=new)`."""
    return _bicubic(old, new, old / new)


def bicubic_offset_weights(old: int, new: int) -> np.ndarray:
    """Returns those of DINOv2 without registers: it scales by (new + 0.1) / old, which shifts the places a little."""
    return _bicubic(old, new, old / (new + 0.1))


def bicubic_antialias_weights(old: int, new: int) -> np.ndarray:
    """Returns the weights of `interpolate(mode="bicubic", antialias=True)`: a = -0.5, the kernel as wide as a new pixel."""
    scale = old / new
    width = max(scale, 1.0)
    center = (np.arange(new)[:, None] + 0.5) * scale
    place = np.arange(old)[None] + 0.5
    weights = _cubic((place - center) / width, -0.5)
    return weights / weights.sum(1, keepdims=True)


def bilinear_weights(old: int, new: int) -> np.ndarray:
    """Returns the weights of `interpolate(mode="bilinear", align_corners=False)`."""
    return _linear(np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0), old)


def linear_corner_weights(old: int, new: int) -> np.ndarray:
    """Returns the weights of `scipy.ndimage.zoom(order=1)`: the first and the last place stay where they are."""
    return _linear(np.arange(new) * ((old - 1) / max(new - 1, 1)), old)


def _linear(center: np.ndarray, old: int) -> np.ndarray:
    first = np.floor(center).astype(int)
    part = center - first
    return _gathered(first[:, None] + np.arange(2), np.stack([1 - part, part], axis=1), old)


TIMM = Interpolation("bicubic, antialiased", bicubic_antialias_weights)
DINOV2 = Interpolation("bicubic with DINOv2's offset", bicubic_offset_weights)
TRANSREID = Interpolation("bilinear", bilinear_weights)
GOOGLE = Interpolation("linear between the corners", linear_corner_weights)
