"""How well `bank:` and `like:` reproduce noise that is known (docs/corruptions.md).

    PYTHONPATH=. python benchmarks/real_noise.py --photographs=PHOTOGRAPHS.npz --pairs=PAIRS.npz

The first file holds clean photographs, to which known noise is added; the second real pairs of
several cameras. By default they are those of DREP_DATA.
"""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from benchmarks.common import Parser
from drep_jax.data.corruptions import check_spec
from drep_jax.data.corruptions.bank import CENTERS
from drep_jax.data.corruptions.like import estimate
from drep_jax.data.stored import stored_pairs

COLORS = np.array([[0.8, 0.2, 0.1], [0.2, 0.8, 0.2], [0.1, 0.2, 0.8]])
CASES = (("white", 0.0, 16.0, 0.0), ("white", 0.0, 100.0, 0.0), ("fine", 0.7, 9.0, 55.0), ("coarse", 1.0, 100.0, 300.0))
"""Name, σ of the blur in pixels, variance at black, and by how much more it is at white."""


def synthetic(path: str, count: int) -> None:
    """Prints estimated over true deviations, and correlations, for noise added to photographs."""
    with np.load(path) as file:
        encoded, ends = file["webp"], file["webp_offsets"]
    photographs = [
        np.array(Image.open(io.BytesIO(encoded[ends[i] : ends[i + 1]].tobytes())).convert("RGB")) for i in range(count)
    ]
    plain = [np.full((128, 128, 3), level, np.uint8) for level in np.linspace(25, 230, count)]
    rng = np.random.default_rng(0)
    for name, blur, black, more in CASES:
        for kind, images in (("photographs", photographs), ("plain", plain)):
            noisy = [_noisy(image, blur, black, more, rng) for image in images]
            model = estimate(kind, noisy)
            ratio = np.sqrt(model.variance.mean(axis=0) / (black + more * CENTERS / 255))[1:14:2]
            middle = model.correlation.shape[-1] // 2
            beside = model.correlation[1, 1, middle, middle + 1 : middle + 4]
            print(f"{name:7} {kind:12} σ / true {ratio.round(2)}, neighbors {beside.round(2)}", end=", ")
            print(f"colors {model.correlation[0, 1, middle, middle]:.2f}")


def _noisy(image: np.ndarray, blur: float, black: float, more: float, rng: np.random.Generator) -> np.ndarray:
    field = rng.standard_normal(image.shape)
    if blur:
        field = ndimage.gaussian_filter(field, (blur, blur, 0)) * 2 * np.sqrt(np.pi) * blur
        field = field @ COLORS.T / np.sqrt((COLORS**2).sum(axis=1))
    deviation = np.sqrt(black + more * image.astype(float) / 255)
    return np.clip(np.rint(image + deviation * field), 0, 255).astype(np.uint8)


def real(path: str, cameras: int) -> None:
    """Prints deviations and correlations of real residuals, of the bank and of the model, by camera."""
    pairs = stored_pairs(path)
    for camera in sorted(set(pairs.columns["camera"].tolist()))[:cameras]:
        chosen = pairs.chosen({"camera": camera})
        (bank,), (model,) = (check_spec(f"{kind}:{path}?camera={camera}") for kind in ("bank", "like"))
        rows: dict[str, list[Any]] = {"real": [], "bank": [], "like": []}
        for index in range(len(chosen)):
            clean, noisy = chosen.pair(index)
            image = clean.astype(np.float32)
            rows["real"].append(_moments(noisy - image))
            for name, noise in (("bank", bank), ("like", model)):
                rows[name].append(_moments(noise(image, np.random.default_rng(index), 1.0) - image))
        for name, values in rows.items():
            variance, right, down, colors = np.mean(values, axis=0)
            print(
                f"{camera:10} {name} σ {np.sqrt(variance):.2f}, neighbors {right:.2f} {down:.2f}, colors {colors:.2f}"
            )


def _moments(noise: np.ndarray) -> tuple[float, float, float, float]:
    noise = noise - noise.mean(axis=(0, 1))
    variance = (noise**2).mean(axis=(0, 1))
    right, down = ((a * b).mean(axis=(0, 1)) for a, b in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])))
    colors = (noise[..., 0] * noise[..., 1]).mean() / np.sqrt(variance[0] * variance[1])
    return float(variance.mean()), float((right / variance).mean()), float((down / variance).mean()), float(colors)


def main(command: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    folder = os.environ.get("DREP_DATA", "")
    parser = Parser(__doc__, count=8, cameras=1)
    parser.add_argument("--photographs", default=os.path.join(folder, "imagenet_nips17.npz"))
    parser.add_argument("--pairs", default=os.path.join(folder, "noise_polyu100.npz"))
    parser.add_argument("--count", type=int, default=60, help="photographs, and plain images")
    parser.add_argument("--cameras", type=int, help="of the pairs, the first by name; all by default")
    options = parser.parse_args(command)
    synthetic(options.photographs, options.count)
    real(options.pairs, options.cameras)


if __name__ == "__main__":
    main()
