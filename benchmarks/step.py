"""Label-free training step relative to the plain forward pass: ViT-S/16, 224 px, every transformer linear a site, one thread.

    PYTHONPATH=. python benchmarks/step.py

The floor is what the arithmetic alone costs: the forward pass, D(X) and the gradient of W_D at every site (2·2·n·d²
operations for n feature vectors; no gradient goes to the input), at the speed of the forward pass. The second table takes both
variants to a small ViT on the real digits and gives the gap to the known optimum that the same number of steps leaves.
"""

import argparse
import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import single_thread  # noqa: F401, I001 (first of all)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tabulate import tabulate

from drep_jax import closed_form, cost
from drep_jax.data import open_source
from drep_jax.data.loader import evaluation_batches, normalize, training_batches
from drep_jax.denoise_tree import init_denoise
from drep_jax.denoiser import algorithm1_losses
from drep_jax.models import create_model
from drep_jax.schedule import Schedule
from drep_jax.sites import find_sites
from drep_jax.training.moments import collect_moments

LINEARS = r".*(attn/(query|key|value|out)|mlp/fc[12])"


def make_step(model, variables, sites, tx, tokens):
    """Returns the jitted step (denoise, opt_state, images, index, key) ↦ (denoise, opt_state, loss)."""

    @functools.partial(jax.jit, donate_argnums=(1, 2))  # as the training loop does
    def step(variables, denoise, opt_state, images, index, key):
        def objective(d):
            losses = algorithm1_losses(model, variables, d, sites, Schedule(), key, index, images, tokens=tokens)
            return sum(jnp.sum(v) for v in losses.values())

        loss, grads = jax.value_and_grad(objective)(denoise)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(denoise, updates), opt_state, loss

    return lambda *args: step(variables, *args)


def site_operations(sites, vectors):
    """Operations of D and of the gradient of W_D: a multiplication and an addition each, n·d² times, twice."""
    return sum(4.0 * vectors * site.width**2 * site.groups for site in sites)


def speed(arguments):
    """Times the forward pass and the steps in turn."""
    model = create_model("vit_s16", num_classes=1000, image_size=(224, 224))
    images = jax.random.normal(jax.random.key(0), (arguments.batch, 224, 224, 3))
    index = jnp.arange(arguments.batch)
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    sites = find_sites(model, images, pattern=LINEARS)
    forward = jax.jit(model.apply)
    sides = {"forward": lambda: forward(variables, images)}
    denoise = init_denoise(sites)
    tx = optax.adam(4e-4)
    for tokens in (1.0, arguments.tokens):
        state = [init_denoise(sites), tx.init(denoise)]
        step = make_step(model, variables, sites, tx, tokens)

        def advance(step=step, state=state):
            *state[:], loss = step(*state, images, index, jax.random.key(2))
            return state, loss

        sides[f"step, {tokens:.0%} of the tokens"] = advance
    times = cost.interleaved(sides, rounds=arguments.rounds)
    ratio = cost.ratios(times, "forward")
    operations = cost.flops(model.apply, variables, images)
    vectors = arguments.batch * 197
    rows = [["forward", np.median(times["forward"]), 1.0, None, None]]
    for tokens in (1.0, arguments.tokens):
        name = f"step, {tokens:.0%} of the tokens"
        floor = 1 + site_operations(sites, vectors * tokens) / operations
        rows.append([name, np.median(times[name]), ratio[name], floor, ratio[name] / floor])
    print(
        f"ViT-S/16, 224 px, batch {arguments.batch}, {len(sites)} sites, one thread, {arguments.rounds} interleaved rounds"
    )
    headers = ["", "median s", "forwards", "arithmetic floor", "over the floor"]
    print(tabulate(rows, headers, floatfmt=".2f"))


def gap(arguments):
    """Trains denoisers on the real digits with all tokens and with a sample of them."""
    source = open_source("digits", "train", image_size=(8, 8))
    model = create_model(
        "vit", num_classes=10, image_size=(8, 8), patch_size=2, width=64, depth=4, num_heads=4, mlp_dim=128
    )
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

    def prepare(images):
        return normalize(images, (0.3,) * 3, (0.38,) * 3)

    sites = find_sites(model, jnp.zeros((1, 8, 8, 3)), pattern=LINEARS)
    batches = ((prepare(b["image"]), b["mask"].astype(np.float32)) for b in evaluation_batches(source, 64))
    moments = collect_moments(model, variables, sites, batches)
    optimum = sum(closed_form.expected_losses(moments, sites, Schedule()).values())
    rows = []
    for tokens in (1.0, arguments.tokens):
        tx = optax.adam(optax.cosine_decay_schedule(0.2, arguments.steps))
        step, denoise = make_step(model, variables, sites, tx, tokens), init_denoise(sites)
        opt_state = tx.init(denoise)
        for number, batch in zip(range(arguments.steps), training_batches(source, 64, seed=0), strict=False):
            key = jax.random.key(number)
            denoise, opt_state, _ = step(denoise, opt_state, prepare(batch["image"]), batch["index"], key)
        final = sum(closed_form.expected_losses(moments, sites, Schedule(), denoise).values())
        rows.append(
            [f"{tokens:.0%}", len(sites), optimum, final, final - optimum, (final - optimum) / (len(sites) - optimum)]
        )
    print(f"\nSmall ViT (random weights) on the digits, {arguments.steps} steps of 64 images, exact expected losses")
    headers = ["tokens", "loss at the start", "optimum", "final loss", "gap", "share of the gap left"]
    print(tabulate(rows, headers, floatfmt=".3f"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=float, default=0.25, help="share of the tokens in the sampled variant")
    parser.add_argument("--steps", type=int, default=1000, help="of the training that the gap is measured on")
    parsed = parser.parse_args()
    speed(parsed)
    gap(parsed)
