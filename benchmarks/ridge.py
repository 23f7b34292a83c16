"""Measured noise with a fixed ridge, the chosen one, and constants before BatchNorm: ResNet-20 on CIFAR-10.

    DREP_DATA=DIR PYTHONPATH=. python benchmarks/ridge.py [--images=20,60,500] [--test=1000]

The first training images are learned from, at noise 10…50 and a clean share of 0.8, and the first
test images tested on, at strength 1 (docs/method.md, "The ridge"). "constants" is the chosen ridge
with `batchnorm_bias`; the line below it is its gain over the chosen ridge without, with the 95 %
interval of paired bootstrap resamples.
"""

import io
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

import drep_jax
from benchmarks.common import Parser
from drep_jax import weights
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.core.measured import measuring
from drep_jax.models import create_model

LEVELS = (0, 10, 20, 40)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def images_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first 2,500 images of a file and their labels."""
    with np.load(os.path.join(os.environ["DREP_DATA"], name)) as file:
        grid = np.array(Image.open(io.BytesIO(file["webp_00"].tobytes())).convert("RGB"))
        return grid.reshape(50, 32, 50, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3), file["labels"][:2500]


def normalized(images: np.ndarray) -> np.ndarray:
    """Returns images as the weights expect them."""
    return ((images / 255.0 - MEAN) / STD).astype(np.float32)


def main(command: Sequence[str] | None = None) -> None:
    """Learns and tests, and prints a line for each number of images and each ridge."""
    parser = Parser(__doc__, images="4", test=20)
    parser.add_argument("--images", default="20,60,500")
    parser.add_argument("--test", type=int, default=1000)
    options = parser.parse_args(command)
    net = create_model("resnet20_cifar", num_classes=10, image_size=(32, 32))
    path = os.path.join(os.environ["DREP_DATA"], "weights", "resnet20_cifar10.npz")
    variables = weights.read(path, net, (32, 32)).variables
    train, _ = images_of("cifar10_train.npz")
    test, labels = (part[: options.test] for part in images_of("cifar10_test.npz"))
    plain, constants = (
        drep_jax.find_sites(net, normalized(train[:1]), batchnorm_bias=constants) for constants in (False, True)
    )
    rng = np.random.default_rng(3)
    noisy = [normalized(np.clip(test + level * rng.normal(size=test.shape), 0, 255)) for level in LEVELS]
    answers = jax.jit(lambda variables, x: net.apply(variables, x).argmax(-1))

    def correct(variables: Any) -> np.ndarray:
        rows = []
        for images in noisy:
            parts = [answers(variables, images[first : first + 250]) for first in range(0, len(images), 250)]
            rows.append(np.concatenate(parts) == labels)
        return np.stack(rows)

    def show(name: str, rows: np.ndarray) -> np.ndarray:
        print(name, " / ".join(f"{100 * row.mean():.1f}" for row in rows), flush=True)
        return rows

    show("backbone", correct(variables))
    for count in map(int, options.images.split(",")):
        clean, draw = train[:count].astype(np.float32), np.random.default_rng(1)
        level = draw.uniform(10, 50, size=(count, 1, 1, 1))
        corrupted = np.clip(clean + level * draw.normal(size=clean.shape), 0, 255)
        streams = np.stack([normalized(images) for images in (clean, clean, corrupted)])
        rows = {}
        for name, ridge, sites in (
            ("ridge 0.001", 1e-3, plain),
            ("ridge chosen", None, plain),
            ("constants", None, constants),
        ):
            solved = measuring(net, variables, sites, streams, ridge=ridge, outputs=False)([0.8, 0.2])
            fused = fuse_variables_exact(variables, solved.denoise, sites, drep_jax.Schedule(), rule="affine", steps=1)
            rows[name] = show(f"{count} images, {name}:", correct(fused))
        gains = rows["constants"].astype(float) - rows["ridge chosen"]
        draws = gains[:, np.random.default_rng(0).integers(0, len(labels), (2000, len(labels)))].mean(-1)
        spread = np.percentile(100 * draws, (2.5, 97.5), axis=1).T
        texts = [
            f"{100 * gain.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
            for gain, (low, high) in zip(gains, spread, strict=True)
        ]
        print(f"{count} images, gain of constants:", " / ".join(texts), flush=True)


if __name__ == "__main__":
    main()
