"""Noise like that of a folder of noisy images, `like:PLACE`: a model of it, estimated without clean images.

The model is n_c(x) = √v_c(level at x) · g_c(x). Here v_c is the variance by channel and level, and g
is a stationary Gaussian field of variance 1 whose correlation among neighbors and channels is

    ρ_cc'(d) = E[g_c(x) g_c'(x + d)],  |d| ≤ R,  and 0 beyond.

Both are estimated from blocks of P × P pixels in which nothing but noise is to be seen, around a
fitted plane. The images are taken to have noise of one level. With M = I − Q Qᵀ, which takes
the plane away, the residuals of a block have the covariance M C Mᵀ. So their mean products at each
lag are a linear function of ρ, which is inverted exactly. Wavelet estimators of σ assume white
noise; the noise of a developed photograph is not white, and they find too little of it.
"""

import functools
from collections.abc import Sequence

import numpy as np
import scipy.fft
from jaxtyping import Float32, Float64, UInt8

from drep_jax.data.corruptions.bank import BINS, COUNTED, LUMA, by_level, resized
from drep_jax.data.corruptions.spec import parse_range
from drep_jax.data.stored import Stored, stored_images
from drep_jax.errors import DataError

MOST_BLOCKS = 30_000
"""Blocks used of all images; more of them are thinned evenly."""
LEAST_BLOCKS = 40
"""Blocks that a model needs."""
PART = 200
"""Blocks of like brightness, at least, whose noise has a level of its own."""
BANDS = (3, 5, 9)
"""Frequencies, in half periods a block, at which bands end."""
TURNS = 6
"""Turns of finding flat blocks and the spectrum of their noise."""
LEAST_STD = 0.05
"""Gray levels below which a block has no noise, but is black, white, or wiped out by compression."""
FLAT = 0.05
"""Fraction of the blocks of a brightness that is taken for flat at first."""
TOLERANCE = 1.3
"""Ratio to the noise up to which the whitened energy of a block counts as noise."""
CHUNK = 1000
"""Blocks whose spectra are held at once."""
ROUNDING = 1 / 12
"""Variance of rounding to whole gray levels."""
GRID = 32
"""The sides of the field that is drawn are multiples of it, so that few sizes need a spectrum."""


class NoiseModel:
    """Signal-dependent noise that is correlated among neighbors and colors.

    Attributes:
      name: as the user gave it.
      note: what was found, for the report.
      num_classes: None, since noise has no labels.
      variance: v, gray levels squared by channel and level at `CENTERS`, (3, 16).
      correlation: ρ, (3, 3, 2R + 1, 2R + 1), the lag 0 in the middle.
    """

    def __init__(
        self,
        name: str,
        variance: Float64[np.ndarray, "3 levels"],
        correlation: Float64[np.ndarray, "3 3 lags lags"],
        images: int,
        note: str | None = None,
    ) -> None:
        self.name, self._images = name, images
        self.num_classes: int | None = None
        self.variance, self.correlation = variance, correlation
        self._amplitude = functools.lru_cache(maxsize=8)(self._computed_amplitude)
        radius = correlation.shape[-1] // 2
        root = np.sqrt(variance.mean(axis=0))
        beside = correlation[range(3), range(3), radius, radius + 1].mean()
        colors = (correlation[0, 1, radius, radius] + correlation[1, 2, radius, radius]) / 2
        found = (
            f"{images:,} noisy images; noise of {root[1]:.1f} gray levels in the dark to {root[-2]:.1f} in the light, "
            f"correlated by {beside:.2f} with the next pixel and by {colors:.2f} among colors."
        )
        self.note: str | None = " ".join(filter(None, (found, note)))

    def __len__(self) -> int:
        return self._images

    def __call__(
        self, image: Float32[np.ndarray, "h w c"], rng: np.random.Generator, strength: float
    ) -> Float32[np.ndarray, "h w c"]:
        """Returns an image of 1 or 3 channels with `strength` times a draw of the noise."""
        height, width = image.shape[:2]
        noise = np.sqrt(by_level(self.variance, image)) * self.field(height, width, rng)
        if image.shape[-1] == 1:
            noise = (noise @ LUMA)[..., None]
        return (image + np.float32(strength) * noise).astype(np.float32)

    def field(self, height: int, width: int, rng: np.random.Generator) -> Float32[np.ndarray, "h w 3"]:
        """Returns a draw of the field g."""
        reach = self.correlation.shape[-1] - 1
        rows, columns = (-(-(side + reach) // GRID) * GRID for side in (height, width))
        white = scipy.fft.rfft2(rng.standard_normal((3, rows, columns), np.float32))
        colored = np.einsum("xycd,dxy->cxy", self._amplitude(rows, columns), white)
        return np.moveaxis(scipy.fft.irfft2(colored, (rows, columns)), 0, -1)[:height, :width].astype(np.float32)

    def _computed_amplitude(self, rows: int, columns: int) -> np.ndarray:
        """Returns the root of the spectral density by frequency, (rows, columns // 2 + 1, 3, 3)."""
        radius = self.correlation.shape[-1] // 2
        lags = np.zeros((3, 3, rows, columns))
        place = np.arange(-radius, radius + 1)
        lags[:, :, place[:, None] % rows, place % columns] = self.correlation
        # ρ_cc'(d) pairs c here with c' at +d, so that the density of c and c' is its conjugate transform.
        density = np.moveaxis(np.conj(scipy.fft.fft2(lags)), (0, 1), (2, 3))
        values, axes = np.linalg.eigh((density + np.conj(np.swapaxes(density, -1, -2))) / 2)
        root = (axes * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.conj(np.swapaxes(axes, -1, -2))
        power = np.square(np.abs(root)).sum(axis=-1).mean(axis=(0, 1))
        root = root / np.sqrt(np.maximum(power, 1e-12))[:, None]
        return root[:, : columns // 2 + 1].astype(np.complex64)


def open_like(place: str, filters: dict[str, str]) -> NoiseModel:
    """Estimates a model from noisy images.

    Args:
      place: a folder, with all images below it; or FILE.npz, whose noisy side is taken.
      filters: `scale`, a factor on the size of the images before the noise is estimated; and
        columns to choose images by.

    Raises:
      ConfigError: for an option that cannot be used.
      DataError: for files that are absent, too small, or without any flat part.
    """
    options = dict(filters)
    scale, most = parse_range(options.pop("scale", "1"), f"like:{place}: scale", 1 / 64, 1.0)
    if scale != most:
        raise DataError(f"like:{place}: the noise is estimated at one scale; got {scale:g}..{most:g}.")
    stored = stored_images(place).chosen(options)
    images = [_scaled(stored, index, scale) for index in _spread(len(stored), COUNTED)]
    return estimate(f"like:{place}", images, stored.note)


def estimate(name: str, images: Sequence[UInt8[np.ndarray, "h w 3"]], note: str | None = None) -> NoiseModel:
    """Estimates the noise of images that may all show something else.

    Args:
      name: of the model, for messages.
      images: uint8 (h, w, 3) of any sizes.
      note: what to say about the files.

    Raises:
      DataError: for images that are too small, or where too few blocks are flat.
    """
    side = min(min(image.shape[:2]) for image in images)
    size = 16 if side >= 64 else 8
    if side < size:
        raise DataError(
            f"{name}: an image has a side of {side} pixels; at least {size} are needed to estimate its noise."
        )
    most = max(1, MOST_BLOCKS // len(images))
    blocks = [_blocks(image, size, most) for image in images]
    levels, residuals = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    usable = (
        (levels.min(axis=1) > 4) & (levels.max(axis=1) < 251) & (residuals.std(axis=(1, 2)).min(axis=1) > LEAST_STD)
    )
    flat = _flat_blocks(residuals, levels @ LUMA, usable)
    if flat.sum() < LEAST_BLOCKS:
        raise DataError(
            f"{name}: only {flat.sum()} of {len(flat):,} blocks of {size} x {size} pixels show nothing but noise, and "
            f"{LEAST_BLOCKS} are needed. Give more images, some with plain surfaces, or use pairs (bank:DIR)."
        )
    levels, residuals = levels[flat], residuals[flat]
    cell = np.minimum(levels / (256 / BINS), BINS - 1).astype(int)
    curve = _curve(np.square(residuals, dtype=np.float64).mean(axis=(1, 2)), cell)
    scale = np.stack([curve[c, cell[:, c]] for c in range(3)], axis=1)
    correlation = _correlation(residuals / np.sqrt(scale)[:, None, None], lag_operator(size))
    radius = correlation.shape[-1] // 2
    variance = curve * correlation[range(3), range(3), radius, radius][:, None]
    root = np.sqrt(correlation[range(3), range(3), radius, radius])
    correlation = correlation / (root[:, None] * root)[:, :, None, None]
    return NoiseModel(name, variance, correlation, len(images), note)


@functools.lru_cache(maxsize=2)
def lag_operator(size: int) -> Float64[np.ndarray, "lags lags"]:
    """Returns the mean products of a block's residuals at each lag, as a linear map of ρ.

    Args:
      size: P, side of the blocks.

    Returns:
      (L, L) with L = (2R + 1)², R = P / 4 + 1; lags in row-major order of (down, right).
    """
    radius = size // 4 + 1
    rows, columns = np.divmod(np.arange(size**2), size)
    plane, _ = np.linalg.qr(np.stack([np.ones(size**2), rows, columns], axis=1).astype(np.float64))
    down, right = rows[None] - rows[:, None], columns[None] - columns[:, None]
    near = (np.abs(down) <= radius) & (np.abs(right) <= radius)
    number = np.where(near, (down + radius) * (2 * radius + 1) + right + radius, -1)
    count = (2 * radius + 1) ** 2
    pairs = np.bincount(number[near], minlength=count)
    operator = np.zeros((count, count))
    for lag in range(count):
        covariance = (number == lag).astype(np.float64)
        covariance -= plane @ (plane.T @ covariance)
        covariance -= (covariance @ plane) @ plane.T
        operator[:, lag] = np.bincount(number[near], covariance[near], count) / pairs
    return operator


def _correlation(residuals: np.ndarray, operator: np.ndarray) -> Float64[np.ndarray, "3 3 lags lags"]:
    """Returns ρ of blocks (n, P, P, 3) whose plane has been taken away."""
    size = residuals.shape[1]
    radius = size // 4 + 1
    cross = np.zeros((3, 3, 2 * size, 2 * size), np.complex64)
    for start in range(0, len(residuals), CHUNK):
        chunk = residuals[start : start + CHUNK].astype(np.float32)
        spectra = scipy.fft.fft2(chunk, (2 * size, 2 * size), axes=(1, 2))
        cross += np.einsum("nxyc,nxyd->cdxy", np.conj(spectra), spectra, optimize=True) / len(residuals)
    place = np.arange(-radius, radius + 1)
    products = scipy.fft.ifft2(cross).real[:, :, place[:, None], place]
    pairs = (size - np.abs(place))[:, None] * (size - np.abs(place))
    lags = (products / pairs).reshape(9, -1)
    return np.linalg.solve(operator, lags.T).T.reshape(3, 3, len(place), len(place))


def _flat_blocks(residuals: np.ndarray, luma: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Returns which blocks show nothing but noise, bool (n,).

    A block's energy is whitened, by frequency and among channels, with the covariance of the blocks
    that are taken for noise so far. What an image shows then stands out in one band of frequencies,
    as it has another spectrum, while the energy of noise hardly varies: it is a mean of many numbers.
    So a block has the energy of its worst band, less what chance adds to a band of few numbers. The
    level of noise is sought for each brightness among the lowest.
    """
    known = np.flatnonzero(usable)
    flat = np.zeros(len(usable), bool)
    if len(known) < LEAST_BLOCKS:
        return flat
    size = residuals.shape[1]
    waves = scipy.fft.dctn(residuals[known], axes=(1, 2), norm="ortho").reshape(len(known), size**2, 3)
    down, right = np.divmod(np.arange(size**2), size)
    number = np.where(down + right > 1, np.digitize(np.maximum(down, right), BANDS), -1)  # a plane takes −1
    bands = [(number == band).astype(np.float32) for band in range(number.max() + 1)]
    order = np.argsort(luma[known], kind="stable")
    parts = np.array_split(order, max(1, min(BINS, len(known) // PART)))  # equally many blocks of like brightness
    by_wave = np.square(waves).mean(axis=2)
    for _ in range(TURNS):
        energy = np.max(
            [by_wave @ band / band.sum() / (1 + np.sqrt(2 / (3 * band.sum()))) for band in bands if band.any()], axis=0
        )
        scale = np.empty(len(known))
        for part in parts:
            scale[part] = _noise_level(energy[part])
        relative = energy / scale
        # Only the lowest say what noise looks like: whatever else is in a few blocks must not.
        lowest = relative <= np.quantile(relative, min(1.0, max(FLAT, LEAST_BLOCKS / len(known))))
        level = np.square(waves[lowest]).mean(axis=(1, 2))[:, None, None]
        covariance = np.einsum("nfc,nfd->fcd", waves[lowest] / level, waves[lowest]) / lowest.sum()
        covariance += ROUNDING / np.mean(level) * np.eye(3)
        inverse = np.linalg.inv(covariance).astype(np.float32)
        by_wave = np.einsum("nfc,fcd,nfd->nf", waves, inverse, waves, optimize=True) / 3
    flat[known[relative <= TOLERANCE]] = True
    return flat


def _noise_level(values: np.ndarray) -> float:
    """Returns the mean of the values up to `TOLERANCE` times itself, found from the lowest; 0 of none."""
    if not len(values):
        return 0.0
    values = np.sort(values)
    mean = float(values[: max(1, int(FLAT * len(values)))].mean())
    for _ in range(50):
        last, mean = mean, float(values[: max(1, np.searchsorted(values, TOLERANCE * mean, "right"))].mean())
        if mean <= last * 1.001:
            break
    return mean


def _curve(variance: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Returns mean variances by channel and level, (3, levels), smoothed where few blocks were seen."""
    curve = np.zeros((3, BINS))
    for channel in range(3):
        count = np.bincount(cell[:, channel], minlength=BINS).astype(np.float64)
        sums = np.bincount(cell[:, channel], variance[:, channel], BINS)
        for distance in range(1, BINS):  # levels of too few blocks take those beside them in
            few = count < LEAST_BLOCKS / 4
            if not few.any():
                break
            level = np.arange(BINS)
            near = np.abs(level[:, None] - level) <= distance
            raw = (
                np.bincount(cell[:, channel], minlength=BINS),
                np.bincount(cell[:, channel], variance[:, channel], BINS),
            )
            count, sums = (np.where(few, near @ part, own) for part, own in zip(raw, (count, sums), strict=True))
        curve[channel] = sums / count
    return curve


def _blocks(image: np.ndarray, size: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean levels (n, 3) of an image's blocks, and the blocks without their planes (n, P, P, 3)."""
    rows, columns = (side // size for side in image.shape[:2])
    tiles = image[: rows * size, : columns * size].reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    tiles = tiles.reshape(-1, size, size, 3)[_spread(rows * columns, most)].astype(np.float32)
    slope = (np.arange(size) - (size - 1) / 2).astype(np.float32)
    slope /= np.sqrt(size * np.sum(slope**2))
    mean = tiles.mean(axis=(1, 2))
    down, right = (np.einsum(f"nxyc,{axis}->nc", tiles, slope) for axis in "xy")
    planes = down[:, None, None] * slope[:, None, None] + right[:, None, None] * slope[:, None]
    return mean, tiles - mean[:, None, None] - planes


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _scaled(stored: Stored, index: int, scale: float) -> np.ndarray:
    image = stored.image(index)
    if scale == 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.clip(np.rint(resized(image, (height, width))), 0, 255).astype(np.uint8)
