"""Sparse kernels, JPEG and fractal noise on arrays (h, w, c), for several corruptions."""

import io

import numpy as np
from PIL import Image


def correlate(image: np.ndarray, kernel: np.ndarray, border: str) -> np.ndarray:
    """Returns Σ kernel[u, v] · image[y + u − U, x + v − V], with (U, V) the kernel's center.

    Only non-zero entries cost time: the kernels of motion are lines.

    Args:
      image: (h, w, c).
      kernel: both sides odd.
      border: a mode of `numpy.pad`, for what is beyond the image.
    """
    height, width, _ = image.shape
    up, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(image, ((up, up), (left, left), (0, 0)), mode=border)  # type: ignore[call-overload]
    out = np.zeros(image.shape, image.dtype)
    for row, column in np.argwhere(kernel):
        out += kernel[row, column].astype(image.dtype) * padded[row : row + height, column : column + width]
    return out


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Returns the image, levels 0 to 255, after Pillow's JPEG (color at half resolution)."""
    stream = io.BytesIO()
    to_pillow(image).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as decoded:
        return np.asarray(decoded, np.float32).reshape(image.shape)


def to_pillow(image: np.ndarray) -> Image.Image:
    """Rounds levels to uint8: an L image of one channel, an RGB image of three."""
    levels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Returns fractal noise (height, width), 0 to 1, by the diamond-square algorithm on a torus.

    Each point is the mean of its four neighbors on the next coarser grid plus a uniform number,
    whose range falls by decay² from one grid to the next finer one: a larger decay is smoother.
    """
    size = 2
    while size < max(height, width):
        size *= 2
    field = np.zeros((size, size))
    spread, step = 1.0, size

    def mean(*neighbors: np.ndarray) -> np.ndarray:
        return sum(neighbors) / 4 + rng.uniform(-spread, spread, neighbors[0].shape)

    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        right, below = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=0)
        centers = mean(corners, right, below, np.roll(below, -1, axis=1))
        field[half::step, half::step] = centers
        field[::step, half::step] = mean(corners, right, centers, np.roll(centers, 1, axis=0))
        field[half::step, ::step] = mean(corners, below, centers, np.roll(centers, 1, axis=1))
        spread, step = spread / decay**2, half
    field -= field.min()
    return (field / field.max())[:height, :width]
