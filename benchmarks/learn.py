"""Closed form: what the one pass for the moments costs, and what Algorithm 1 by gradient descent costs for less.

    PYTHONPATH=. python benchmarks/learn.py

First table: ViT-S/16, 224 px, every transformer linear a site, one thread. The arithmetic floor is the forward pass plus FᵀF
at every site (2·n·d² operations for n vectors), at the speed of the forward pass. Second table: a small ViT (random weights)
on the real digits; the closed form against 20 epochs at the paper's settings (Adam, 4e-4, batch 64), exact losses.
"""

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import single_thread  # noqa: F401, I001 (first of all)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from step import LINEARS, make_step
from tabulate import tabulate

from drep_jax import closed_form, cost
from drep_jax.closed_form import batch_sums
from drep_jax.data import open_source
from drep_jax.data.loader import evaluation_batches, normalize, training_batches
from drep_jax.denoise_tree import init_denoise
from drep_jax.models import create_model
from drep_jax.schedule import Schedule
from drep_jax.sites import find_sites
from drep_jax.training.moments import collect_moments


def speed(arguments):
    """Times the forward pass and the passes for the moments in turn."""
    model = create_model("vit_s16", num_classes=1000, image_size=(224, 224))
    images = jax.random.normal(jax.random.key(0), (arguments.batch, 224, 224, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    sites = find_sites(model, images, pattern=LINEARS)
    shifts = {site.name: jnp.zeros(site.denoiser_shape[:-1]) for site in sites}
    mask, keys = jnp.ones(arguments.batch), jax.random.split(jax.random.key(2), arguments.batch)
    forward = jax.jit(model.apply)
    sides = {"forward": lambda: forward(variables, images)}
    for tokens in (1.0, arguments.tokens):

        @jax.jit
        def collect(state, variables, images, tokens=tokens):
            total, lost = state  # compensated, as in `collect_moments`
            new = batch_sums(model, variables, sites, shifts, mask, images, tokens=tokens, keys=keys)
            new = jax.tree_util.tree_map(jnp.subtract, new, lost)
            after = jax.tree_util.tree_map(jnp.add, total, new)
            return after, jax.tree_util.tree_map(lambda a, t, n: (a - t) - n, after, total, new)

        sums = jax.eval_shape(lambda v: batch_sums(model, v, sites, shifts, mask, images), variables)
        zero = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape), sums)
        state = [(zero, zero)]

        def advance(collect=collect, state=state):
            state[0] = collect(state[0], variables, images)
            return state[0]

        sides[f"moments, {tokens:.0%} of the tokens"] = advance
    times = cost.interleaved(sides, rounds=arguments.rounds)
    ratio = cost.ratios(times, "forward")
    operations = cost.flops(model.apply, variables, images)
    vectors = arguments.batch * 197
    rows = [["forward", np.median(times["forward"]), 1.0, None, None]]
    for tokens in (1.0, arguments.tokens):
        name = f"moments, {tokens:.0%} of the tokens"
        floor = 1 + sum(2.0 * vectors * tokens * site.width**2 * site.groups for site in sites) / operations
        rows.append([name, np.median(times[name]), ratio[name], floor, ratio[name] / floor])
    print(
        f"ViT-S/16, 224 px, batch {arguments.batch}, {len(sites)} sites, one thread, {arguments.rounds} interleaved rounds"
    )
    print(tabulate(rows, ["", "median s", "forwards", "arithmetic floor", "over the floor"], floatfmt=".2f"))


def against_training(arguments):
    """Compares the closed form with training on the real digits."""
    source = open_source("digits", "train", image_size=(8, 8))
    model = create_model(
        "vit", num_classes=10, image_size=(8, 8), patch_size=2, width=64, depth=4, num_heads=4, mlp_dim=128
    )
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

    def prepare(images):
        return normalize(images, (0.3,) * 3, (0.38,) * 3)

    sites = find_sites(model, jnp.zeros((1, 8, 8, 3)), pattern=LINEARS)

    def solve(tokens):
        batches = ((prepare(b["image"]), b["mask"].astype(np.float32)) for b in evaluation_batches(source, 64))
        moments = collect_moments(model, variables, sites, batches, tokens=tokens)
        return moments, closed_form.closed_form(moments, sites, Schedule())

    tx = optax.adam(4e-4)
    step = make_step(model, variables, sites, tx, 1.0)

    def train(steps):
        denoise = init_denoise(sites)
        state = tx.init(denoise)
        for number, batch in zip(range(steps), training_batches(source, 64, seed=0), strict=False):
            denoise, state, _ = step(denoise, state, prepare(batch["image"]), batch["index"], jax.random.key(number))
        return jax.block_until_ready(denoise)

    moments, _ = solve(1.0)
    train(2)
    steps = arguments.epochs * len(source) // 64
    rows = []
    for name, run in (
        ("closed form", lambda: solve(1.0)[1]),
        (f"closed form, {arguments.tokens:.0%} of the tokens", lambda: solve(arguments.tokens)[1]),
        (f"Adam 4e-4, {arguments.epochs} epochs", lambda: train(steps)),
    ):
        run() if "closed" in name else None  # compiled before it is timed
        began = time.perf_counter()
        denoise = run()
        seconds = time.perf_counter() - began
        loss = sum(closed_form.expected_losses(moments, sites, Schedule(), denoise).values())
        rows.append([name, arguments.epochs if "Adam" in name else 1, seconds, loss])
    print(f"\nSmall ViT (random weights) on the digits, {len(sites)} sites; predicting nothing costs {len(sites)}")
    print(tabulate(rows, ["", "passes", "seconds", "exact loss"], floatfmt=("", "d", ".2f", ".4f")))
    more = rows[2][2] / rows[0][2]
    print(f"Training takes {more:.0f} times as long and does not reach it.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=float, default=0.25, help="share of the tokens in the sampled variant")
    parser.add_argument("--epochs", type=int, default=20)
    parsed = parser.parse_args()
    speed(parsed)
    against_training(parsed)
