"""The 15 corruptions × 5 severities of the CIFAR-10-C protocol (Hendrycks & Dietterich 2019).

They are implemented from the protocol's description.

Every function takes an image float64 (h, w, c) from 0 to 1, a generator and the constants of one
severity, and returns an image that need not be clipped. The constants are meant for 32 × 32 pixels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image as Pillow
from scipy import ndimage

from drep_jax.data.corruptions.filters import correlate, jpeg, plasma, to_pillow

Image = np.ndarray
Generator = np.random.Generator

# Mean color and spread, in gray levels, of the photographs behind the published files (one of them
# is used twice).
PANES = (
    ((78, 149, 165), 14),
    ((198, 202, 212), 18),
    ((198, 202, 212), 18),
    ((143, 158, 171), 26),
    ((103, 114, 126), 34),
)
LUMA = (0.299, 0.587, 0.114)


def at_severity(
    image: np.ndarray, rng: Generator, name: str, severity: int, table: "Table | None" = None
) -> np.ndarray:
    """Applies one of `CIFAR10C`, or of another protocol.

    Args:
      image: float32 (h, w, c), levels 0 to 255.
      rng: of this image.
      name: of the corruption.
      severity: 1 to 5.
      table: of the protocol; None for `PROTOCOL`.

    Returns:
      float32 (h, w, c), whole levels 0 to 255, rounded downwards as in the published files.
    """
    function, constants = (PROTOCOL if table is None else table)[name]
    out = function(image.astype(np.float64) / 255, rng, *constants[severity - 1])
    # A thousandth more, so that the rounding of /255 · 255 does not lower an unchanged level.
    return np.floor(np.clip(out, 0, 1) * 255 + 1e-3).astype(np.float32)


def gaussian_noise(image: Image, rng: Generator, std: float) -> Image:
    """Adds normal noise."""
    return image + rng.normal(0, std, image.shape)


def shot_noise(image: Image, rng: Generator, photons: float) -> Image:
    """Counts that many photons at white."""
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Image, rng: Generator, fraction: float) -> Image:
    """Sets a fraction of the values, channel by channel, to 0 or 1."""
    struck = rng.random(image.shape) < fraction
    return np.where(struck, rng.integers(0, 2, image.shape), image)


def defocus_blur(image: Image, rng: Generator, radius: float, smoothing: float) -> Image:
    """Averages over a disk whose edge is smoothed by a Gaussian of 3 × 3 pixels."""
    del rng
    reach = np.arange(-math.floor(radius) - 1, math.floor(radius) + 2)
    disk = (reach[:, None] ** 2 + reach**2 <= radius**2).astype(float)
    line = np.exp(-(np.array([-1.0, 0.0, 1.0]) ** 2) / (2 * smoothing**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, line, axis=axis, mode="constant")
    return correlate(image, disk / disk.sum(), "reflect")


def glass_blur(image: Image, rng: Generator, sigma: float, reach: int, rounds: int) -> Image:
    """Blurs, gives each pixel in turn the value of one nearby, and blurs again."""
    height, width, channels = image.shape
    blurred = np.floor(_gaussian(image, sigma) * 255) / 255
    rows, columns = (np.arange(side - reach, reach, -1) for side in (height, width))
    targets = (rows[:, None] * width + columns).ravel()
    came_from = list(range(height * width))
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, len(targets)))
        # One after another: a pixel takes what its neighbor holds by then.
        for target, origin in zip(targets.tolist(), (targets + down * width + right).tolist(), strict=True):
            came_from[target] = came_from[origin]
    return _gaussian(blurred.reshape(-1, channels)[came_from].reshape(image.shape), sigma)


def motion_blur(image: Image, rng: Generator, radius: int, sigma: float) -> Image:
    """Smears by half a Gaussian, in a direction within 45° of the horizontal."""
    return _smear(image, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(image: Image, rng: Generator, end: float, step: float = 0.01) -> Image:
    """Averages the image with its magnifications `numpy.arange(1, end, step)`."""
    del rng
    height, width, channels = image.shape
    vertical, horizontal = _zooms(height, end, step), _zooms(width, end, step)
    count = len(vertical)
    tall = (vertical.reshape(-1, height) @ image.reshape(height, -1)).reshape(count, height, width, channels)
    pairs = tall.transpose(1, 3, 0, 2).reshape(height * channels, count * width)
    total = pairs @ horizontal.transpose(0, 2, 1).reshape(count * width, width)
    return (image + total.reshape(height, channels, width).transpose(0, 2, 1)) / (count + 1)


def snow(
    image: Image,
    rng: Generator,
    mean: float,
    std: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    weight: float,
) -> Image:
    """Whitens the image and adds flakes from two sides, smeared within 45° of the vertical."""
    height, width, channels = image.shape
    layer = _zoom_matrix(height, zoom) @ rng.normal(mean, std, (height, width)) @ _zoom_matrix(width, zoom).T
    flakes = np.floor(np.clip(np.where(layer < threshold, 0, layer), 0, 1) * 255) / 255
    flakes = _smear(flakes[..., None], radius, sigma, rng.uniform(-135, -45))
    luma = image @ np.array(LUMA)[:, None] if channels == 3 else image
    whitened = weight * image + (1 - weight) * np.maximum(image, 1.5 * luma + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def frost(image: Image, rng: Generator, weight: float, added: float) -> Image:
    """Mixes the image with a frozen pane."""
    return weight * image + added * _pane(image.shape, rng)


def fog(image: Image, rng: Generator, amount: float, decay: float) -> Image:
    """Adds fractal noise and scales back to the image's own brightest value."""
    brightest = image.max()
    height, width, _ = image.shape
    mist = amount * plasma(height, width, decay, rng)[..., None]
    return (image + mist) * brightest / (brightest + amount)


def brightness(image: Image, rng: Generator, added: float) -> Image:
    """Raises the value of HSV, which scales all channels of a pixel alike."""
    del rng
    value = image.max(axis=2, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, image * (raised / np.where(value > 0, value, 1)), raised)


def contrast(image: Image, rng: Generator, factor: float) -> Image:
    """Scales the differences from the mean of each channel."""
    del rng
    mean = image.mean(axis=(0, 1), keepdims=True)
    return mean + factor * (image - mean)


def elastic_transform(image: Image, rng: Generator, amplitude: float, sigma: float, jitter: float) -> Image:
    """Moves three points, the image with them, and then each pixel by a smooth random field.

    The three constants are fractions of the image's side, as in the protocol.
    """
    height, width, _ = image.shape
    side = min(height, width)
    center, arm = np.array([height // 2, width // 2], float), side // 3
    points = center + arm * np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])
    moved = points + rng.uniform(-jitter * side, jitter * side, points.shape)
    # Backwards: the point of the image that comes to this one. (row, column, 1) @ back = (row',
    # column').
    back = np.linalg.lstsq(np.column_stack([moved, np.ones(3)]), points, rcond=None)[0]
    rows, columns = np.mgrid[:height, :width].astype(float)
    origins = np.stack([rows, columns, np.ones_like(rows)], axis=-1) @ back
    image = _sample(image, origins[..., 0], origins[..., 1], "mirror")
    field = rng.uniform(-1, 1, (2, height, width))
    if amplitude == 0:
        return image
    down, right = (
        amplitude * side * ndimage.gaussian_filter(part, sigma * side, mode="reflect", truncate=3) for part in field
    )
    return _sample(image, rows + down, columns + right, "reflect")


def pixelate(image: Image, rng: Generator, fraction: float) -> Image:
    """Shrinks both sides to a fraction by averaging, and enlarges again."""
    del rng
    height, width, _ = image.shape
    small = to_pillow(image * 255).resize((int(width * fraction), int(height * fraction)), Pillow.Resampling.BOX)
    return np.asarray(small.resize((width, height), Pillow.Resampling.BOX), float).reshape(image.shape) / 255


def jpeg_compression(image: Image, rng: Generator, quality: int) -> Image:
    """Compresses by JPEG."""
    del rng
    return jpeg(image * 255, quality) / 255


Table = dict[str, tuple[Callable[..., Image], tuple[tuple[Any, ...], ...]]]
"""Name ↦ its function and its constants for the severities 1 to 5."""

PROTOCOL: Table = {
    "gaussian_noise": (gaussian_noise, ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,))),
    "shot_noise": (shot_noise, ((500,), (250,), (100,), (75,), (50,))),
    "impulse_noise": (impulse_noise, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, ((1.06,), (1.11,), (1.16,), (1.21,), (1.26,))),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,))),
    "contrast": (contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))),
    "jpeg_compression": (jpeg_compression, ((80,), (65,), (58,), (50,), (40,))),
}
CIFAR10C: tuple[str, ...] = tuple(PROTOCOL)


def _gaussian(image: Image, sigma: float) -> Image:
    return ndimage.gaussian_filter(image, sigma, axes=(0, 1), mode="nearest")


def _smear(image: Image, radius: int, sigma: float, degrees: float) -> Image:
    """Averages over 2 · radius pixels in one direction, weighted by exp(−distance² / 2σ²)."""
    distance = np.arange(2 * radius + 1)
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    angle = math.radians(degrees)
    rows, columns = (np.ceil(distance * part - 0.5).astype(int) for part in (math.sin(angle), math.cos(angle)))
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    np.add.at(kernel, (2 * radius + rows, 2 * radius + columns), weights / weights.sum())
    return np.rint(correlate(image, kernel, "edge") * 255) / 255  # to whole levels, as in the protocol


def _sample(image: Image, rows: np.ndarray, columns: np.ndarray, border: str) -> Image:
    return np.stack(
        [ndimage.map_coordinates(plane, (rows, columns), order=1, mode=border) for plane in np.moveaxis(image, 2, 0)],
        axis=2,
    )


@functools.lru_cache(maxsize=64)
def _zooms(side: int, end: float, step: float) -> np.ndarray:
    return np.stack([_zoom_matrix(side, factor) for factor in np.arange(1, end, step).tolist()])


@functools.lru_cache(maxsize=64)
def _zoom_matrix(side: int, factor: float) -> np.ndarray:
    """Returns the matrix (side, side) that magnifies a line of pixels about its center."""
    cut = math.ceil(side / factor)
    grown = max(round(cut * factor), 2)
    places = (np.arange(side) + (grown - side) // 2) * (cut - 1) / (grown - 1)
    before = np.minimum(places.astype(int), max(cut - 2, 0))
    matrix = np.zeros((side, side))
    start = (side - cut) // 2
    np.add.at(matrix, (np.arange(side), start + before), 1 - (places - before))
    np.add.at(matrix, (np.arange(side), start + np.minimum(before + 1, cut - 1)), places - before)
    return matrix


def _pane(shape: tuple[int, ...], rng: Generator) -> np.ndarray:
    """Returns a synthetic frozen pane, 0 to 1: needles of ice over slow changes, tinted."""
    height, width, channels = shape
    color, spread = PANES[rng.integers(len(PANES))]
    needles = correlate(rng.standard_normal((height, width, 1)), _needle(rng.uniform(0, math.pi)), "edge")
    slow = plasma(height, width, 1.5, rng)[..., None]
    pattern = sum(math.sqrt(weight) * _standard(part) for weight, part in ((0.75, needles), (0.25, slow)))
    tint = np.array(color if channels == 3 else [np.dot(LUMA, color)])
    return np.clip(tint + 10 * rng.standard_normal() + spread * pattern, 0, 255) / 255


def _needle(angle: float) -> np.ndarray:
    across = np.arange(-2, 3)
    along = across[:, None] * math.sin(angle) + across * math.cos(angle)
    aside = across[:, None] * math.cos(angle) - across * math.sin(angle)
    return np.exp(-(along**2) / 2 - 4 * aside**2)


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-12)
