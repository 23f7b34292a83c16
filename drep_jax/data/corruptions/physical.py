"""Corruptions (image, rng, strength) -> image whose strength is a physical quantity, 0 for none."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32
from scipy import ndimage

from drep_jax.data.corruptions.filters import correlate, jpeg

Image = Float32[np.ndarray, "h w c"]

WHITE = 255.0
# The sensor of low_light, as in a phone: electrons at white with the right exposure, and the
# standard deviation of reading one pixel, in electrons.
WHITE_ELECTRONS = 4000.0
READ_ELECTRONS = 2.5


def gaussian(image: Image, rng: np.random.Generator, std: float) -> Image:
    """Returns image + std · z with z ~ N(0, 1) for each value; std in gray levels."""
    return image + np.float32(std) * rng.standard_normal(image.shape, np.float32)


def shot(image: Image, rng: np.random.Generator, std_at_white: float) -> Image:
    """Poisson noise of standard deviation std_at_white · √(level / 255) gray levels."""
    # White is a count of (255 / std)², whose deviation is its root. Below a thousandth of a level
    # the counts get too large.
    photons = (WHITE / max(std_at_white, 1e-3)) ** 2
    return (rng.poisson(image.astype(np.float64) / WHITE * photons) * (WHITE / photons)).astype(np.float32)


def blur(image: Image, rng: np.random.Generator, sigma: float) -> Image:
    """Gaussian blur of sigma pixels; beyond its border the image is mirrored."""
    del rng
    return ndimage.gaussian_filter(image, sigma, axes=(0, 1), mode="reflect")


def motion(image: Image, rng: np.random.Generator, distance: float) -> Image:
    """Averages over a steady straight motion of that many pixels in a random direction."""
    angle = rng.uniform(0, math.pi)
    # Points along the path, four a pixel, by the trapezoidal rule; each is spread over its four
    # nearest pixels.
    places = np.linspace(-distance / 2, distance / 2, math.ceil(4 * distance) + 1)
    weights = np.ones(len(places))
    weights[[0, -1]] = 0.5
    reach = math.ceil(distance / 2)
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3))
    rows, columns = (places * side + reach + 1 for side in (math.sin(angle), math.cos(angle)))
    for down in (0, 1):
        for across in (0, 1):
            row, column = np.floor(rows).astype(int) + down, np.floor(columns).astype(int) + across
            weight = (1 - np.abs(rows - row)) * (1 - np.abs(columns - column))
            np.add.at(kernel, (row, column), weights / weights.sum() * weight)
    return correlate(image, kernel, "symmetric")


def compress(image: Image, rng: np.random.Generator, loss: float) -> Image:
    """JPEG of quality 100 − loss, rounded to a whole number, with color at half the resolution."""
    del rng
    return jpeg(image, round(100 - loss))


def low_light(image: Image, rng: np.random.Generator, stops: float) -> Image:
    """Takes the photograph again with 2^stops times less light and no amplification.

    Light is halved on a linear scale: levels are decoded and encoded by the sRGB curve. The sensor
    catches 4,000 electrons where the well-exposed photograph is white, and reads each value with a
    standard deviation of 2.5 electrons.
    """
    electrons = _linear(image.astype(np.float64) / WHITE) * WHITE_ELECTRONS / 2**stops
    read = rng.poisson(electrons) + READ_ELECTRONS * rng.standard_normal(image.shape)
    return (WHITE * _encoded(np.maximum(read, 0) / WHITE_ELECTRONS)).astype(np.float32)


def impulse(image: Image, rng: np.random.Generator, percent: float) -> Image:
    """Sets that percentage of the pixels to black or white, with equal probability."""
    struck = rng.random((*image.shape[:2], 1)) < percent / 100
    white = rng.random((*image.shape[:2], 1)) < 0.5
    return np.where(struck, np.where(white, np.float32(WHITE), np.float32(0)), image)


def brightness(image: Image, rng: np.random.Generator, levels: float) -> Image:
    """Adds that many gray levels to the whole image or subtracts them, with equal probability."""
    return image + np.float32(levels if rng.random() < 0.5 else -levels)


def contrast(image: Image, rng: np.random.Generator, percent: float) -> Image:
    """Brings every value nearer to the mean of its channel by that percentage, as haze does."""
    del rng
    mean = image.mean(axis=(0, 1), keepdims=True)
    return mean + np.float32(1 - percent / 100) * (image - mean)


def _linear(encoded: np.ndarray) -> np.ndarray:
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _encoded(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One kind of corruption.

    Attributes:
      function: (image float32 (h, w, c) of levels 0 to 255, generator, strength above 0) -> image;
        need not clip.
      default: (low, high), range of strengths when none is given.
      unit: of the strength, for messages and documentation.
      largest: largest strength that makes sense or that the function can compute.
    """

    function: Callable[[np.ndarray, np.random.Generator, float], np.ndarray]
    default: tuple[float, float]
    unit: str
    largest: float


# Another corruption is one function and one line here.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian": Corruption(gaussian, (0.0, 40.0), "standard deviation in gray levels", 1000),
    "shot": Corruption(shot, (0.0, 40.0), "standard deviation at white in gray levels", 255),
    "blur": Corruption(blur, (0.0, 2.0), "standard deviation in pixels", 100),
    "motion": Corruption(motion, (0.0, 8.0), "length in pixels minus 1", 200),
    "jpeg": Corruption(compress, (0.0, 85.0), "100 minus the JPEG quality", 99),
    "low_light": Corruption(low_light, (0.0, 5.0), "stops of exposure lost", 16),
    "impulse": Corruption(impulse, (0.0, 20.0), "percent of the pixels", 100),
    "brightness": Corruption(brightness, (0.0, 60.0), "gray levels, up or down", 255),
    "contrast": Corruption(contrast, (0.0, 80.0), "percent of the contrast lost", 100),
}
