"""The closed form against Algorithm 1: cost of the pass for the moments, and losses reached.

    PYTHONPATH=. python benchmarks/learn.py

One thread. First ViT-S/16, 224 px, every transformer linear a site, random weights: one batch of
the pass, of a step of Algorithm 1 and of the plain forward pass in turn, next to the *arithmetic
floor*: the forward pass plus the bare products FᵀF of every site's features, timed in the same
rounds. Then the small ViT of configs/digits.py, trained for `--backbone_steps` steps on the real
digits: the loss of the closed form and of 20 epochs at the paper's settings (learning rate 4e-4,
batches of 64), exactly (from the moments of all images and tokens), with the seconds taken without
compilation.
"""

from benchmarks import single_thread  # noqa: F401  isort: skip

import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tabulate import tabulate

from benchmarks.common import Parser, network
from benchmarks.step import LINEARS, make_step
from configs import digits
from drep_jax.core import closed_form, moments
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.moments import collect_moments, image_keys, initial_state, programs
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.data.augment import Augmentation
from drep_jax.data.loader import evaluation_batches, normalize, training_batches
from drep_jax.evaluation import cost
from drep_jax.parallel import devices
from drep_jax.run.setup import build
from drep_jax.tasks.losses import cross_entropy


def one_batch(model, variables, sites, images, tokens):
    """Returns a function that adds one batch to the moments, as every batch does."""
    center, add, _ = programs(model, tuple(sites), tokens)
    everywhere = devices.replicate(variables)
    mask, keys = jnp.ones(len(images)), image_keys(jax.random.key(0), np.arange(len(images)))
    batch = tuple(devices.shard(part) for part in (images, mask, keys))
    shifts = devices.replicate(center(variables, images[:8], mask[:8], keys[:8]))
    state = [initial_state(sites)]

    def run():
        state[0] = add(state[0], everywhere, shifts, *batch)
        return state[0]

    return run


def speed(arguments):
    """Times forward pass, moments, bare products and a step of Algorithm 1 in turn."""
    model, pixels = network("vit_s16", arguments.tiny)
    images = jax.random.normal(jax.random.key(0), (arguments.batch, pixels, pixels, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    sites = find_sites(model, images, pattern=LINEARS)
    forward = jax.jit(model.apply)
    keys = jax.random.split(jax.random.key(2), len(sites))
    vectors = [jax.random.normal(k, (arguments.batch * 197, s.width)) for k, s in zip(keys, sites, strict=True)]
    products = jax.jit(lambda all: [f.T @ f for f in all])
    some = [f[: round(arguments.tokens * len(f))] for f in vectors]
    share = f"{arguments.tokens:.0%} of the tokens"
    tx = optax.adam(4e-4)
    step, learning = make_step(model, variables, sites, tx, 1.0), [init_denoise(sites), tx.init(init_denoise(sites))]

    def advance():
        *learning[:], loss = step(*learning, images, jnp.arange(arguments.batch), jax.random.key(3))
        return loss

    times = cost.interleaved(
        {
            "forward": lambda: forward(variables, images),
            "moments, all tokens": one_batch(model, variables, sites, images, 1.0),
            f"moments, {share}": one_batch(model, variables, sites, images, arguments.tokens),
            "bare products": lambda: products(vectors),
            f"bare products, {share}": lambda: products(some),
            "step of Algorithm 1, all tokens": advance,
        },
        rounds=arguments.rounds,
    )
    ratio = cost.ratios(times, "forward")
    rows = []
    for name, values in times.items():
        bare = {"moments, all tokens": "bare products", f"moments, {share}": f"bare products, {share}"}.get(name)
        floor = 1 + ratio[bare] if bare else None
        rows.append([name, np.median(values), min(values), ratio[name], floor, ratio[name] / floor if bare else None])
    print(
        f"ViT-S/16, 224 px, batch {arguments.batch}, {len(sites)} sites, one thread, {arguments.rounds} interleaved rounds"
    )
    headers = ["", "median s", "least s", "forwards", "arithmetic floor", "over the floor"]
    print(tabulate(rows, headers, floatfmt=".2f", tablefmt="github"))
    epochs = 20 * ratio["step of Algorithm 1, all tokens"]
    for name in ("moments, all tokens", f"moments, {share}"):
        print(f"20 epochs of Algorithm 1 cost {epochs / ratio[name]:.0f} times what one pass does ({name}).")


def trained_backbone(setting, steps):
    """Trains the backbone on the labeled digits."""
    variables = setting.backbone.init(jax.random.key(0), jnp.zeros(setting.images.shape))
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, steps // 2), steps), weight_decay=0.05)

    @jax.jit
    def step(variables, state, images, labels):
        grads = jax.grad(lambda v: cross_entropy(setting.backbone.apply(v, images), {"label": labels}))(variables)
        updates, state = tx.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for _, batch in zip(
        range(steps), training_batches(setting.train, 64, seed=0, augmentation=Augmentation(shift=1)), strict=False
    ):
        images = normalize(batch["image"], setting.mean, setting.std)
        variables, state = step(variables, state, images, batch["label"])
    hits = [
        np.asarray(jnp.argmax(setting.backbone.apply(variables, normalize(b["image"], setting.mean, setting.std)), -1))
        == b["label"]
        for b in evaluation_batches(setting.test, 600)
    ]
    print(f"\nViT of configs/digits.py after {steps} steps: {100 * np.mean(hits):.1f} % of the test digits right")
    return variables


def reached(arguments):
    """Compares the closed form with 20 epochs of Algorithm 1 on the digits."""
    config = digits.get_config()
    if arguments.tiny:
        config.model.update({"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24})
    setting = build(config.to_dict())
    backbone, sites, schedule = (
        setting.backbone,
        find_sites(setting.backbone, setting.images, pattern=LINEARS),
        Schedule(),
    )
    variables = trained_backbone(setting, arguments.backbone_steps)

    def batches(images):
        for b in evaluation_batches(setting.train, 64):
            if (b["index"] < images).any():
                yield normalize(b["image"], setting.mean, setting.std), (b["mask"] & (b["index"] < images)).astype("f4")

    every = len(setting.train) if not arguments.tiny else 64
    truth = collect_moments(backbone, variables, sites, batches(every))

    def total(denoise):
        return sum(closed_form.expected_losses(truth, sites, schedule, denoise).values())

    least = total(None)
    rows: list[list] = [["no denoiser", 0, 0.0, total(init_denoise(sites))]]
    for name, images, fraction in (
        ("closed form", every, 1.0),
        (f"closed form, {arguments.tokens:.0%} of the tokens", every, arguments.tokens),
        (f"closed form, {arguments.tokens:.0%} of the tokens", every // 4, arguments.tokens),
    ):
        collect_moments(backbone, variables, sites, batches(64), tokens=fraction)  # compiles
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            moments = collect_moments(backbone, variables, sites, batches(images), tokens=fraction)
            denoise = closed_form.closed_form(moments, sites, schedule)
            seconds.append(time.perf_counter() - began)
        rows.append([name, images, np.median(seconds), total(denoise)])
    steps = arguments.epochs * every // 64
    for name, rate, tx in (
        (f"Algorithm 1, {arguments.epochs} epochs, SGD, rate 4e-4", 4e-4, lambda r: optax.sgd(r, momentum=0.9)),
        (f"Algorithm 1, {arguments.epochs} epochs, Adam, rate 4e-4", 4e-4, optax.adam),
        (f"Algorithm 1, {arguments.epochs} epochs, SGD, rate 1", 1.0, lambda r: optax.sgd(r, momentum=0.9)),
        (f"Algorithm 1, {arguments.epochs} epochs, Adam, rate 0.2", 0.2, optax.adam),
    ):
        optimizer = tx(optax.cosine_decay_schedule(rate, steps))
        step = make_step(backbone, variables, sites, optimizer, 1.0)
        for count in (1, steps):  # compiles; then the real run
            denoise = init_denoise(sites)
            state = optimizer.init(denoise)
            began = time.perf_counter()
            for number, batch in zip(range(count), training_batches(setting.train, 64, seed=0), strict=False):
                images = normalize(batch["image"], setting.mean, setting.std)
                denoise, state, _ = step(denoise, state, images, batch["index"], jax.random.key(number))
            jax.block_until_ready(denoise)
        rows.append([name, 64 * steps, time.perf_counter() - began, total(denoise)])
    reference = rows[2][2]
    for row in rows:
        row += [row[2] / reference, row[3] - least]
    headers = ["", "images seen", "s", "loss", f"times the closed form at {arguments.tokens:.0%}", "above the optimum"]
    print(f"{len(sites)} sites, {every} images, batches of 64; the loss of predicting no noise is {len(sites)}")
    print(tabulate(rows, headers, floatfmt=("", "", ".2f", ".4f", ".1f", ".4f"), tablefmt="github"))


def solving(widths):
    """Times the solution on the host in float64, at the widths of ViT-S, ViT-B and ResNet-50."""
    rows = []
    lone = find_sites(nn.Sequential([nn.Dense(1)]), jnp.zeros((1, 4)), pattern=".*")[0]
    for width in widths:
        x = np.random.default_rng(0).normal(size=(width, 64))
        known = moments.Moments(64, np.zeros(width), x @ x.T / 64)
        site = dataclasses.replace(lone, width=width, times=(10,))
        began = time.perf_counter()
        closed_form.minimizer(site, known, Schedule())
        rows.append([width, time.perf_counter() - began, 8 * width**2 / 2**20])
    print("\nSolving one site on the host (one core)")
    print(tabulate(rows, ["d", "s", "MiB of one d × d matrix"], floatfmt=("", ".2f", ".0f"), tablefmt="github"))


def main(command=None):
    """Runs and prints everything."""
    parser = Parser(__doc__, batch=8, rounds=1, backbone_steps=2, epochs=1, widths=[8])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=float, default=0.25, help="fraction of the tokens in the sampled variant")
    parser.add_argument("--backbone_steps", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=20, help="of Algorithm 1")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 1536, 3072, 4608], help="of sites to solve")
    parsed = parser.parse_args(command)
    speed(parsed)
    reached(parsed)
    solving(parsed.widths)


if __name__ == "__main__":
    main()
