"""Training steps by mode, in time and memory: ViT-S/16, 224 px, one thread.

    PYTHONPATH=. python benchmarks/step.py                      # the label-free step, the forward pass
    PYTHONPATH=. python benchmarks/step.py --modes --batch=64   # every mode, plain fine-tuning

Every transformer linear is a site. The *arithmetic floor* is the cost of the multiplications alone
at the speed of the forward pass F. Label-free: F, D(X) and the gradient of W_D at every site
(2·2·n·d² operations for n feature vectors; no gradient goes to the input). Fine-tuning: 3 F.
Through fused weights: F, the gradient by the activations (F) and by the weights that are trained or
fused, and the fusion itself, 2·d²·m operations for a d×m kernel and each of k steps, and as many
again for the gradient by W_D or W. Eq. 12: that and the label-free step. Memory is the compiled
program's: arguments (state and batch) and temporaries. The first form also applies the label-free
variants to a small ViT on the real digits and prints the gap to the known optimum after as many
steps.
"""

from benchmarks import single_thread  # noqa: F401  isort: skip

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tabulate import tabulate

from benchmarks.common import TINY_PIXELS, Parser, network
from configs import vit_s_imagenet
from drep_jax.core import closed_form
from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.moments import collect_moments
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.data import open_source
from drep_jax.data.loader import evaluation_batches, normalize, training_batches
from drep_jax.evaluation import cost
from drep_jax.learners.losses import augmented_objective, denoising_objective, label_objective
from drep_jax.models import create_model
from drep_jax.parallel import devices
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.run.stages import prepare
from drep_jax.training.state import make_step as training_step

LINEARS = r".*(attn/(query|key|value|out)|mlp/fc[12])"


def make_step(model, variables, sites, tx, tokens):
    """Returns the jitted (denoise, opt_state, images, index, key) ↦ (denoise, opt_state, loss)."""

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
    """Returns the operations of D and of the gradient of W_D, 2·2·n·d² per site."""
    return sum(4.0 * vectors * site.width**2 * site.groups for site in sites)


def speed(arguments):
    """Times the forward pass and the steps in turn."""
    model, pixels = network("vit_s16", arguments.tiny)
    images = jax.random.normal(jax.random.key(0), (arguments.batch, pixels, pixels, 3))
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


def modes(arguments):
    """Times one step of every mode, and prints what the compiled programs hold."""
    rows, programs = [], {}
    forward_operations = None
    cases = {
        "plain fine-tuning": ("control", {}),
        "label-free (Algorithm 1)": ("algorithm1", {}),
        f"label-free, {arguments.tokens:.0%} of the tokens": ("algorithm1", {"tokens": arguments.tokens}),
        "backbone through fuse": ("backbone turn", {}),
        "denoisers through fuse, λ = 0": ("label_augmented", {"label_lambda": 0.0}),
        "denoisers by Eq. 12": ("label_augmented", {}),
        f"denoisers by Eq. 12, {arguments.tokens:.0%} of the tokens": ("label_augmented", {"tokens": arguments.tokens}),
        f"denoisers by Eq. 12, rank {arguments.rank}": ("label_augmented", {"rank": arguments.rank}),
        "backbone through fuse, recomputed": ("backbone turn", {"remat": True}),
    }
    sides = {}
    for name, (mode, changes) in cases.items():
        setup, step, state, frozen, batch, floor, operations = mode_step(arguments, mode, changes)
        if forward_operations is None:
            forward_operations = operations
            model, variables = setup.backbone, {"params": state.params["backbone"]}
            images = jnp.zeros((arguments.batch, arguments.pixels, arguments.pixels, 3))
            plain = jax.jit(model.apply)
            programs["forward"] = plain.lower(variables, images).compile().memory_analysis(), 1.0
            sides["forward"] = functools.partial(plain, jax.tree_util.tree_map(jnp.array, variables), images)
        compiled = step.lower(devices.replicate(state), devices.replicate(frozen), devices.shard(batch)).compile()
        programs[name] = compiled.memory_analysis(), floor / forward_operations
        held = [devices.replicate(state), devices.replicate(frozen), devices.shard(batch)]

        def advance(step=step, held=held):
            held[0], metrics = step(*held)
            return held[0].step, metrics

        sides[name] = advance
    times = cost.interleaved(sides, rounds=arguments.rounds, clock=time.process_time) if arguments.rounds else {}
    by_forward, by_tuning = (cost.ratios(times, name) if times else {} for name in ("forward", "plain fine-tuning"))
    tuning = _bytes(programs["plain fine-tuning"][0])
    for name, (analysis, floor) in programs.items():
        taken = by_forward.get(name)
        row = [name, np.median(times[name]) if times else None, taken, by_tuning.get(name), floor]
        rows.append([*row, taken and taken / floor, _bytes(analysis) / 2**30, _bytes(analysis) / tuning])
    print(
        f"ViT-S/16, {arguments.pixels} px, batch {arguments.batch}, one thread, {arguments.rounds} interleaved rounds"
    )
    headers = ["", "s", "forwards", "fine-tunings", "floor", "over it", "GiB", "× fine-tuning's"]
    print(tabulate(rows, headers, floatfmt=".2f"))


def _bytes(analysis):
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def mode_step(arguments, mode, changes):
    """Returns (setup, step, state, frozen, batch, floor, forward operations) of one mode."""
    config = vit_s_imagenet.get_config()
    config.data.update({"source": f"random:{arguments.batch}:1000", "image_size": (arguments.pixels,) * 2})
    if arguments.tiny:
        config.model.update({"name": "vit", "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24})
    config.sites.pattern = LINEARS
    config.denoise.update({name: value for name, value in changes.items() if name != "remat"})
    config.denoise.batch_size = config.control.batch_size = arguments.batch
    config.control.update(
        {"steps": 100, "optimizer": "adam", "weight_decay": 0.0, "remat": changes.get("remat", False)}
    )
    config.alternate.update({"steps": 100, "period": 50})
    config = config.to_dict()
    setup = build(config)
    variables = dict(jax.jit(setup.backbone.init)(jax.random.key(0), jnp.zeros(setup.images.shape)))
    params = {"backbone": variables["params"], "denoise": init_denoise(setup.sites)}
    tuning = {**config["control"], **{name: config["denoise"][name] for name in ("rule", "steps", "loss", "tokens")}}
    learning = {**config["denoise"], "label_smoothing": 0.0}

    def loss_fn(params, others, batch, key):
        if mode == "control":
            return label_objective(setup, tuning, params["backbone"], others, batch, key, train=True)
        if mode == "algorithm1":
            return denoising_objective(setup, learning, params, others, batch, key)
        options, weight = (tuning, 0.0) if mode == "backbone turn" else (learning, learning["label_lambda"])
        train = mode == "backbone turn"
        return augmented_objective(setup, options, params, others, batch, key, weight=weight, train=train)

    stage, active = {"backbone turn": ("alternating", ("backbone",)), "control": ("control", ("backbone",))}.get(
        mode, (mode, ("denoise",))
    )
    if mode == "control":
        del params["denoise"]
    state, frozen, optimizers = prepare(Run(config, setup, ""), stage, params, {})
    step = training_step(loss_fn, optimizers[active], active=active)
    batch = next(training_batches(setup.train, arguments.batch, seed=0))
    forward = cost.flops(setup.backbone.apply, variables, jnp.zeros((arguments.batch, *setup.images.shape[1:])))
    vectors = arguments.batch * ((arguments.pixels // 16) ** 2 + 1)
    return setup, step, state, frozen, batch, floor_of(mode, setup, learning, vectors, forward), forward


def floor_of(mode, setup, options, vectors, forward):
    """Operations that a step cannot do without, see above."""
    learned = forward
    for site in setup.sites:
        size = 2 * site.width * site.rank if site.rank else site.width**2
        learned += 4.0 * vectors * options["tokens"] * size
    if mode in ("control", "algorithm1"):
        return 3 * forward if mode == "control" else learned
    layers = [(site, layer) for site in setup.sites for layer in site.layers]
    kernels = sum(2.0 * vectors * layer.kernel_size for _, layer in layers)
    fusions = sum(2.0 * (2 * site.rank if site.rank else site.width) * layer.kernel_size for site, layer in layers)
    if mode == "backbone turn":
        return 3 * forward + 2 * options["steps"] * fusions
    through = 2 * forward + kernels + 2 * options["steps"] * fusions
    return through if not options["label_lambda"] else through + learned


def gap(arguments):
    """Trains denoisers on the real digits with all tokens and with a sample of them."""
    source = open_source("digits", "train", image_size=(8, 8))
    sizes = {"patch_size": 2, "width": 64, "depth": 4, "num_heads": 4, "mlp_dim": 128}
    if arguments.tiny:
        sizes = {"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24}
    model = create_model("vit", num_classes=10, image_size=(8, 8), **sizes)
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
    headers = ["tokens", "loss at the start", "optimum", "final loss", "gap", "fraction of the gap left"]
    print(tabulate(rows, headers, floatfmt=".3f"))


def main(command=None):
    """Runs and prints everything."""
    parser = Parser(__doc__, batch=8, rounds=1, steps=2, pixels=TINY_PIXELS, rank=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=float, default=0.25, help="fraction of the tokens in the sampled variant")
    parser.add_argument("--steps", type=int, default=1000, help="of the training that the gap is measured on")
    parser.add_argument("--modes", action="store_true", help="every mode against plain fine-tuning")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rank", type=int, default=32, help="of the low-rank variant of --modes")
    parsed = parser.parse_args(command)
    if parsed.modes:
        modes(parsed)
    else:
        speed(parsed)
        gap(parsed)


if __name__ == "__main__":
    main()
