"""A step of l-DAE's pre-training against a plain autoencoder of the same shape.

    PYTHONPATH=. python benchmarks/pretrain.py

Both networks have the same blocks and the same loss function; the plain one gets patches without noise,
is not told a time step, and has LayerNorms with parameters. Steps are interleaved, and the medians over
the rounds are compared: loss, gradients and AdamW's update.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax.models import create_model
from drep_jax.models.autoencoder import patches_of
from drep_jax.models.patch_pca import patch_pca
from drep_jax.pretraining.merge import autoencoder_of
from drep_jax.pretraining.objective import Objective


def stepper(vit: Any, objective: Objective, conditioned: bool, images: Any) -> Any:
    """Returns a function that takes one step."""
    net = autoencoder_of(vit, objective, conditioned=conditioned, gate=1.0)
    patches = patches_of(images, objective.pca.patch)
    params = jax.jit(net.init)(jax.random.key(0), patches[:1, :, : objective.input_width], jnp.zeros(1))["params"]
    tx = optax.adamw(1e-4, weight_decay=0.0)

    def loss(params: Any, images: Any, key: Any) -> Any:
        patches = patches_of(images, objective.pca.patch)
        keys = jax.random.split(key, len(images))
        t = jax.vmap(lambda each: jax.random.randint(each, (), 0, objective.timesteps))(keys)
        noisy, noise = objective.corrupted(patches, t, keys)
        return objective.loss(net.apply({"params": params}, noisy, t.astype(jnp.float32)), patches, t, noise)

    @jax.jit
    def step(params: Any, state: Any, images: Any, key: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, images, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    now = [params, tx.init(params), jnp.zeros(())]

    def run(number: int) -> None:
        now[:] = step(now[0], now[1], images, jax.random.fold_in(jax.random.key(1), number))
        now[2].block_until_ready()

    return run


def main(argv: list[str] | None = None) -> None:
    """Prints both medians and their ratio."""
    parser = Parser(__doc__, width=16, depth=1, heads=2, pixels=8, batch=4, rounds=2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the encoder, and of the decoder")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args(argv)
    sizes = {"patch_size": arguments.patch, "width": arguments.width, "depth": arguments.depth}
    sizes |= {"num_heads": arguments.heads, "mlp_dim": 4 * arguments.width, "class_token": False, "pool": "mean"}
    vit = create_model("vit", num_classes=0, image_size=(arguments.pixels,) * 2, activation="gelu_tanh", **sizes)
    images = jax.random.normal(jax.random.key(0), (arguments.batch, arguments.pixels, arguments.pixels, 3))
    numbers = 3 * arguments.patch**2
    root = np.random.default_rng(0).standard_normal((numbers, numbers))
    pca = patch_pca(10_000, np.zeros(numbers), root @ root.T, components=numbers // 3, patch=(arguments.patch,) * 2)
    steps = {
        "plain autoencoder": stepper(vit, Objective(pca, noise="none"), False, images),
        "l-DAE": stepper(vit, Objective(pca), True, images),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds + 1):
        for name, run in steps.items():
            began = time.perf_counter()
            run(number)
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    rows = [
        [name, f"{1000 * value:.1f}", f"{value / medians['plain autoencoder']:.3f}"] for name, value in medians.items()
    ]
    print(tabulate(rows, ["step", "median, ms", "ratio"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
