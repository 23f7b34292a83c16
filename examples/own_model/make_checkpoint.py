"""Stands for your own training in PyTorch: a trained `MyNet` as a PyTorch state dict.

PYTHONPATH=. python examples/own_model/make_checkpoint.py net.pth
"""

import sys
from typing import Any

import jax
import numpy as np
import optax

from drep_jax import weights
from drep_jax.data import open_source
from drep_jax.data.collate import read
from drep_jax.data.loader import normalize
from examples.own_model.mynet import MyNet
from examples.own_model.names import FORMAT

MEAN, STD = (0.3,) * 3, (0.38,) * 3


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the embedded digits of a split, uint8 (n, 8, 8, 3), and their labels."""
    source = open_source("digits", split, image_size=(8, 8))
    batch = read(source, np.arange(len(source)))
    return batch["image"], batch["label"]


def train(net: MyNet, steps: int = 200) -> dict[str, Any]:
    """Returns the variables of a network trained on the digits."""
    images, labels = digits("train")
    pixels = np.asarray(normalize(images, MEAN, STD))
    variables = net.init(jax.random.key(0), pixels[:1])
    optimizer = optax.adam(1e-2)

    def loss(params: Any, stats: Any, x: Any, y: Any) -> Any:
        logits, new = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]

    @jax.jit
    def step(params: Any, stats: Any, state: Any, x: Any, y: Any) -> Any:
        gradient, stats = jax.grad(loss, has_aux=True)(params, stats, x, y)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), stats, state

    rng = np.random.default_rng(0)
    params, stats = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)
    for _ in range(steps):
        batch = rng.choice(len(images), 64, replace=False)
        params, stats, state = step(params, stats, state, pixels[batch], labels[batch])
    return {"params": params, "batch_stats": stats}


def main(path: str) -> None:
    """Trains, and writes the file."""
    net = MyNet(num_classes=10)
    variables = train(net)
    weights.write(path, variables, FORMAT, net)
    images, labels = digits("test")
    logits = net.apply(variables, normalize(images, MEAN, STD))
    print(f"{path}: {100 * np.mean(np.argmax(logits, -1) == labels):.1f} % of the test digits are right")


if __name__ == "__main__":
    main(sys.argv[1])
