"""Measured noise with a fixed ridge and with the chosen one, by number of images: ResNet-20 on CIFAR-10.

    DREP_DATA=DIR PYTHONPATH=. python benchmarks/ridge.py [--images=20,60,500] [--test=1000]

The first training images are learned from, at noise 10…50 and a clean share of 0.8, and the first
test images tested on, at strength 1 (docs/method.md, "The ridge").
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
    sites = drep_jax.find_sites(net, normalized(train[:1]))
    rng = np.random.default_rng(3)
    noisy = [normalized(np.clip(test + level * rng.normal(size=test.shape), 0, 255)) for level in LEVELS]
    answers = jax.jit(lambda variables, x: net.apply(variables, x).argmax(-1))

    def accuracy(variables: Any) -> str:
        scores = []
        for images in noisy:
            parts = [answers(variables, images[first : first + 250]) for first in range(0, len(images), 250)]
            scores.append(100 * np.mean(np.concatenate(parts) == labels))
        return " / ".join(f"{score:.1f}" for score in scores)

    print("backbone", accuracy(variables), flush=True)
    for count in map(int, options.images.split(",")):
        clean, draw = train[:count].astype(np.float32), np.random.default_rng(1)
        level = draw.uniform(10, 50, size=(count, 1, 1, 1))
        corrupted = np.clip(clean + level * draw.normal(size=clean.shape), 0, 255)
        streams = np.stack([normalized(images) for images in (clean, clean, corrupted)])
        for ridge in (1e-3, None):
            solved = measuring(net, variables, sites, streams, ridge=ridge, outputs=False)([0.8, 0.2])
            params = {"backbone": variables["params"], "denoise": solved.denoise}
            fused = drep_jax.fuse_exact(params, sites, drep_jax.Schedule(), rule="affine", steps=1)
            name = "chosen" if ridge is None else f"{ridge:g}"
            print(f"{count} images, ridge {name}:", accuracy({**variables, "params": fused}), flush=True)


if __name__ == "__main__":
    main()
