"""The noise of your camera: measured from pairs of pictures, fused into a network, compared.

PYTHONPATH=. python examples/camera_noise/camera_noise.py

A pair is a clean picture (low ISO, or the mean of many shots) and a noisy one of the same scene. Here
the pictures are digits, and the camera is simulated: noise whose variance grows with the brightness,
alike in neighboring pixels. For pictures of your own put the pairs in DIR/clean/NAME and
DIR/corrupted/NAME, and leave out the first step. From the command line the same is

    python train.py --config.learner=measured --config.noise=pairs:DIR ...
"""

import os
import sys
import tempfile
from typing import Any

import numpy as np
from PIL import Image

import drep_jax
from drep_jax.data.loader import normalize
from drep_jax.data.pairs import open_pairs
from examples.own_model.make_checkpoint import MEAN, STD, digits, train
from examples.own_model.mynet import MyNet

CLEAN_SHARE = 0.5
"""Weight of the clean pictures, which keeps the accuracy on them."""


def camera(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 pictures with sensor-like noise."""
    white = rng.normal(size=images.shape)
    neighbors = 0.6 * (np.roll(white, 1, axis=1) + np.roll(white, 1, axis=2))
    deviation = np.sqrt(20.0**2 + 12.0 * images)  # gray levels: reading out, and counting photons
    noisy = images + deviation * (white + neighbors) / np.sqrt(1 + 2 * 0.6**2)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def save_pairs(directory: str, clean: np.ndarray, corrupted: np.ndarray) -> None:
    """Writes pictures as DIR/clean/NAME and DIR/corrupted/NAME."""
    for side, pictures in (("clean", clean), ("corrupted", corrupted)):
        os.makedirs(os.path.join(directory, side))
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(os.path.join(directory, side, f"{number:04d}.png"))


def fused_for(net: Any, variables: Any, directory: str, size: tuple[int, int]) -> Any:
    """Returns the network's variables with denoisers for the noise of a folder of pairs fused into its layers."""
    pairs = open_pairs(directory, size)
    clean, corrupted = (np.stack([pair[side] for pair in pairs]) for side in ("clean", "corrupted"))  # type: ignore[attr-defined]
    # The clean stream, the clean one again (its weight keeps clean accuracy), and the corrupted one.
    streams = np.stack([np.asarray(normalize(images, MEAN, STD)) for images in (clean, clean, corrupted)])
    sites = drep_jax.find_sites(net, streams[0, :1])
    measured = drep_jax.measure(net, variables, sites, streams, [CLEAN_SHARE, 1 - CLEAN_SHARE])
    params = {"backbone": variables["params"], "denoise": measured.denoise}
    fused = drep_jax.fuse_exact(params, sites, drep_jax.Schedule(), rule="affine", steps=1)
    return {**variables, "params": fused}


def main(directory: str) -> dict[str, float]:
    """Does all of it and prints the accuracy of both networks on clean and on noisy test pictures."""
    rng = np.random.default_rng(0)
    pictures, _ = digits("train")
    save_pairs(directory, pictures[:400], camera(pictures[:400], rng))

    net = MyNet(num_classes=10)
    variables = train(net)
    fused = fused_for(net, variables, directory, (8, 8))

    images, labels = digits("test")
    accuracy = {}
    for condition, shown in (("clean", images), ("noisy", camera(images, rng))):
        for name, network in (("baseline", variables), ("fused", fused)):
            logits = net.apply(network, normalize(shown, MEAN, STD))
            accuracy[f"{name}, {condition}"] = float(np.mean(np.argmax(logits, -1) == labels))
            print(f"{name:8s} on {condition} pictures: {100 * accuracy[f'{name}, {condition}']:.1f} %")
    return accuracy


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else folder)
