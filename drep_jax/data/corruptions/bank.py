"""Noise that was photographed, `bank:PLACE`: residuals of real pairs, bursts or dark frames laid on other images.

A residual is what a camera added to a scene: noisy − clean. It is laid on an image of the user's own
at a random place, flipped at random. So it keeps the covariance of the noise among neighbors and
colors, which white noise does not have. Where the pairs show that the noise depends on the
brightness, the residual r of a pixel with the clean level b becomes r·√(c(b') / c(b)), where b' is
the level of the image it is laid on and c the variance by level.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import Image as Pillow

from drep_jax.data.corruptions.spec import parse_range
from drep_jax.data.folder import scan
from drep_jax.data.stored import SIDES, Stored, names_below, stored_pairs
from drep_jax.errors import ConfigError, DataError
from drep_jax.files import expanded

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
BINS = 16
CENTERS = (np.arange(BINS) + 0.5) * (256 / BINS) - 0.5
"""Gray levels in the middle of the bins of brightness."""
HELD = 512 * 2**20
"""Bytes of decoded frames that a bank holds at most."""
COUNTED = 200
"""Frames, evenly spaced, from which the dependence on the brightness is computed."""
LEAST_GAIN = 0.0025
"""Held-out log-likelihood, in nats a value, by which variances by level must beat one variance.

A relative spread s of the variances gains about s²/4, so that 10 % just count."""
MOST_FACTOR = 4.0
"""Largest factor by which a residual is scaled up or down for another brightness."""
CLIPPED = 0.25
"""Fraction of values at 0 from which on dark frames are refused."""

Frame = tuple[Float32[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"] | None]


@dataclasses.dataclass(frozen=True)
class Frames:
    """Residuals, computed on demand.

    Attributes:
      kind: "pairs", "shots" or "dark frames".
      names: of the frames.
      read: index ↦ (residual, clean image or None).
      note: what the user should know about the files, or None.
    """

    kind: str
    names: Sequence[str]
    read: Callable[[int], Frame]
    note: str | None = None


class Bank:
    """Residuals that are laid on images.

    Attributes:
      name: as the user gave it.
      note: what is in it, for the report.
      num_classes: None, since noise has no labels.
      variance: relative variance by channel and level at `CENTERS`, (3, 16), of mean 1 over what
        was seen; None where the noise does not depend on the brightness.
      deviation: root mean square of the residuals, gray levels.
    """

    def __init__(
        self, name: str, frames: Frames, scale: tuple[float, float] = (1.0, 1.0), brightness: str = "auto"
    ) -> None:
        self.name = name
        self.num_classes: int | None = None
        self._frames, self._scale = frames, scale
        first = frames.read(0)
        size = sum(part.nbytes for part in first if part is not None)
        self._frame = functools.lru_cache(maxsize=max(1, HELD // size))(frames.read)
        self.deviation, variance = self._measured()
        self.variance = None if brightness == "off" else variance
        depends = "alike at every brightness"
        if self.variance is not None:
            root = self.deviation * np.sqrt(self.variance.mean(axis=0))
            depends = f"depending on the brightness, {root[1]:.1f} in the dark to {root[-2]:.1f} in the light"
        note = f"{len(frames.names):,} {frames.kind}; noise of {self.deviation:.1f} gray levels, {depends}."
        self.note: str | None = " ".join(filter(None, (note, frames.note)))

    def __len__(self) -> int:
        return len(self._frames.names)

    def __call__(
        self, image: Float32[np.ndarray, "h w c"], rng: np.random.Generator, strength: float
    ) -> Float32[np.ndarray, "h w c"]:
        """Returns an image of 1 or 3 channels with `strength` times the noise of a random frame."""
        index, scale, down, across, *flips = rng.random(6).tolist()
        residual, clean = self._frame(int(index * len(self)))
        low, high = self._scale
        height, width = image.shape[:2]
        factor = low + (high - low) * scale
        rows, columns = (
            _window(length, max(1, round(wanted / factor)), place)
            for length, wanted, place in zip(residual.shape, (height, width), (down, across), strict=False)
        )
        steps = tuple(slice(None, None, -1 if flip < 0.5 else 1) for flip in flips)

        def laid(pixels: np.ndarray) -> np.ndarray:
            return resized(pixels[rows][:, columns][steps], (height, width))

        noise = laid(residual)
        if self.variance is not None and clean is not None:
            here, there = (by_level(self.variance, levels) for levels in (image, laid(clean)))
            noise = noise * np.sqrt(np.clip(here / there, MOST_FACTOR**-2, MOST_FACTOR**2))
        if image.shape[-1] == 1:
            noise = (noise @ LUMA)[..., None]
        return (image + np.float32(strength) * noise).astype(np.float32)

    def _measured(self) -> tuple[float, Float64[np.ndarray, "3 levels"] | None]:
        """Returns the root mean square of the residuals, and the relative variance by level if it matters."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), COUNTED)).round().astype(int))
        counts, sums = np.zeros((2, 2, len(chosen), 3, BINS))
        total, values = 0.0, 0
        for place, index in enumerate(chosen.tolist()):
            residual, clean = self._frame(index)
            total, values = total + float(np.square(residual, dtype=np.float64).sum()), values + residual.size
            if clean is not None:
                _count(residual, clean, counts[:, place], sums[:, place])
        deviation = float(np.sqrt(total / values))
        if not deviation > 0:
            raise DataError(f"{self.name}: the noisy and the clean images are equal, so there is no noise to lay.")
        return deviation, variance_by_level(counts, sums)


def open_bank(place: str, filters: dict[str, str]) -> Bank:
    """Opens a bank.

    Args:
      place: a folder with `clean` and `corrupted` (pairs of one name), with `burst` (shots of one
        scene, or a folder a scene), or with `dark` (dark frames); or FILE.npz with pairs.
      filters: `scale`, a factor on the size of the residuals or a range of them; `brightness=off`;
        and columns to choose frames by, such as `name` and `camera`.

    Raises:
      ConfigError: for an option that cannot be used.
      DataError: for files that are absent or no noise.
    """
    options = dict(filters)
    scale = parse_range(options.pop("scale", "1"), "scale", 1 / 64, 8.0)
    brightness = options.pop("brightness", "auto")
    if brightness not in ("auto", "off"):
        raise ConfigError(f'bank:{place}: brightness="{brightness}": expected auto or off.')
    return Bank(f"bank:{place}", _frames(place, options), scale, brightness)


def resized(pixels: np.ndarray, size: tuple[int, int]) -> Float32[np.ndarray, "h w c"]:
    """Returns an array (H, W, C) of any numbers in another size, antialiased, float32."""
    if pixels.shape[:2] == size:
        return np.asarray(pixels, np.float32)
    planes = [
        Pillow.fromarray(np.ascontiguousarray(pixels[..., channel], np.float32)).resize(
            (size[1], size[0]), Pillow.Resampling.BICUBIC
        )
        for channel in range(pixels.shape[-1])
    ]
    return np.stack([np.asarray(plane, np.float32) for plane in planes], axis=-1)


def by_level(table: Float64[np.ndarray, "3 levels"], image: Float32[np.ndarray, "h w c"]) -> np.ndarray:
    """Returns a table by channel and level, interpolated at the levels of an image, (h, w, 3)."""
    return np.stack(
        [np.interp(image[..., min(c, image.shape[-1] - 1)], CENTERS, table[c]).astype(np.float32) for c in range(3)],
        axis=-1,
    )


def variance_by_level(
    counts: Float64[np.ndarray, "2 frames 3 levels"], sums: Float64[np.ndarray, "2 frames 3 levels"]
) -> Float64[np.ndarray, "3 levels"] | None:
    """Returns the relative variance by channel and level, or None where it is no better than one variance.

    The variance of frame p at level b is s_p·c(b): frames differ in their level, and share the
    dependence. Half of each frame tells how well c from the other half explains it.

    Args:
      counts, sums: numbers of values and sums of their squares; first axis: the halves.
    """
    if not counts.any():
        return None
    gains = []
    for fitted, tested in ((0, 1), (1, 0)):
        curve = _fit(counts[fitted], sums[fitted])
        gains.append(_likelihood(counts[tested], sums[tested], curve) - _likelihood(counts[tested], sums[tested], 1.0))
    return _fit(counts.sum(axis=0), sums.sum(axis=0)) if min(gains) > LEAST_GAIN else None


def _fit(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Returns c of the variances s_p·c(b), (3, levels), of mean 1; levels without a value are interpolated.

    Logarithms of the variances are fitted by levels of frames and of the brightness, weighted by the
    number of values.
    """
    curves = []
    for channel in range(3):
        count, total = counts[:, channel], sums[:, channel]
        seen = count.sum(axis=0) > 1e-3 * count.sum()
        weight = count * seen
        mean = np.maximum(total.sum() / count.sum(), 1e-12)
        logs = np.log(np.maximum(total / np.maximum(count, 1), 1e-3 * mean))
        each = weight / np.maximum(weight.sum(axis=1, keepdims=True), 1)
        normal = np.diag(weight.sum(axis=0)) - each.T @ weight
        right = (weight * (logs - (each * logs).sum(axis=1, keepdims=True))).sum(axis=0)
        curve = np.linalg.lstsq(normal, right, rcond=1e-9)[0]  # up to a constant, which the levels take
        curve = np.exp(np.interp(CENTERS, CENTERS[seen], curve[seen]))
        curves.append(curve / ((curve * count.sum(axis=0)).sum() / count.sum()))
    return np.stack(curves)


def _level(counts: np.ndarray, sums: np.ndarray, curve: Any) -> np.ndarray:
    return ((sums / curve).sum(axis=-1) / np.maximum(counts.sum(axis=-1), 1))[..., None]


def _likelihood(counts: np.ndarray, sums: np.ndarray, curve: Any) -> float:
    """Returns the normal log-likelihood of one value under variances s_p·c(b), without its constant."""
    variance = np.maximum(_level(counts, sums, curve) * curve, 1e-6)
    return float(-0.5 * (counts * np.log(variance) + sums / variance).sum() / counts.sum())


def _count(residual: np.ndarray, clean: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> None:
    """Adds a frame's values and squares by half, channel and level; halves are opposite quadrants."""
    height, width = clean.shape[:2]
    half = (np.arange(height) < height // 2)[:, None] ^ (np.arange(width) < width // 2)
    for channel in range(3):
        cell = (half * BINS + clean[..., channel] // (256 // BINS)).ravel()
        square = np.square(residual[..., channel] - residual[..., channel].mean(), dtype=np.float64).ravel()
        counts[:, channel] += np.bincount(cell, minlength=2 * BINS).reshape(2, BINS)
        sums[:, channel] += np.bincount(cell, square, 2 * BINS).reshape(2, BINS)


def _window(length: int, wanted: int, place: float) -> np.ndarray:
    """Returns the indices of a random window of a line; it is mirrored at the ends if it is too short."""
    start = int(place * (length - wanted + 1 if length >= wanted else length))
    index = (start + np.arange(wanted)) % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def _frames(place: str, filters: dict[str, str]) -> Frames:
    if place.endswith(".npz"):
        return _of_pairs(stored_pairs(place).chosen(filters))
    root = Path(expanded(place))
    if not root.is_dir():
        raise DataError(f"There is no directory {root} (looked for {root.absolute()}).")
    layouts: dict[str, Callable[[], Frames]] = {
        "burst": lambda: _of_bursts(root / "burst", filters),
        "dark": lambda: _of_dark(root / "dark", filters),
        "clean": lambda: _of_pairs(stored_pairs(place).chosen(filters)),
    }
    present = [name for name in layouts if (root / name).is_dir()]
    if len(present) != 1:
        folders = ", ".join(folder.name for folder in scan(root).folders[:5]) or "none"
        raise DataError(
            f"{root} is no bank of noise: expected the folders {' and '.join(SIDES)} (pairs), or burst (shots of a scene), or "
            f"dark (dark frames), and one of these three only; there {'is' if folders == 'none' else 'are'} {folders}."
        )
    return layouts[present[0]]()


def _of_pairs(stored: Stored) -> Frames:
    def read(index: int) -> Frame:
        clean, corrupted = stored.pair(index)
        return corrupted.astype(np.float32) - clean, clean

    return Frames("pairs", stored.columns["name"].tolist(), read, stored.note)


def _of_bursts(base: Path, filters: dict[str, str]) -> Frames:
    """Residuals of n shots of a scene: (shot − mean)·√(n / (n − 1)), which has the noise's variance."""
    stored = _files(base, filters)
    names = stored.columns["name"].tolist()
    scenes: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        scenes.setdefault(str(Path(name).parent), []).append(index)
    single = [scene for scene, shots in scenes.items() if len(shots) < 2]
    if single:
        raise DataError(f"{base / single[0]} holds one shot; the noise of a burst is the difference of at least 2.")

    @functools.lru_cache(maxsize=2)
    def mean(scene: str) -> np.ndarray:
        total: Any = 0.0
        for index in scenes[scene]:
            shot = stored.image(index)
            if np.ndim(total) and total.shape != shot.shape:
                raise DataError(
                    f"{stored.where(index)} is {shot.shape[:2]}, but other shots of its scene {total.shape[:2]}."
                )
            total = total + shot.astype(np.float64)
        return (total / len(scenes[scene])).astype(np.float32)

    def read(index: int) -> Frame:
        scene = str(Path(names[index]).parent)
        count = len(scenes[scene])
        clean = mean(scene)
        residual = (stored.image(index) - clean) * np.float32(np.sqrt(count / (count - 1)))
        return residual, np.rint(clean).astype(np.uint8)

    return Frames("shots", names, read, stored.note)


def _of_dark(base: Path, filters: dict[str, str]) -> Frames:
    """Residuals of dark frames: what differs from the level of their channel, fixed patterns included."""
    stored = _files(base, filters)

    def read(index: int) -> Frame:
        frame = stored.image(index)
        clipped = float(np.mean(frame == 0))
        if clipped > CLIPPED:
            raise DataError(
                f"{stored.where(index)}: {100 * clipped:.0f} % of the values are 0, so the noise below black is lost. Save "
                "dark frames with a black level above 0, or take pairs."
            )
        pixels = frame.astype(np.float32)
        return pixels - pixels.mean(axis=(0, 1)), None

    return Frames("dark frames", stored.columns["name"].tolist(), read, stored.note)


def _files(base: Path, filters: dict[str, str]) -> Stored:
    names, _ = names_below(base)
    ordered = sorted(names)
    return Stored(str(base), {"corrupted": [base / name for name in ordered]}, {"name": np.array(ordered)}).chosen(
        filters
    )
