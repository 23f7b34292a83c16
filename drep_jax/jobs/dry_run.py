"""The time and memory of a full-size job, measured by two label-free steps on random images."""

import time
from typing import Any

import jax

from drep_jax.core.denoisers import init_denoise
from drep_jax.data.loader import training_batches
from drep_jax.errors import ConfigError
from drep_jax.evaluation import cost
from drep_jax.learners.losses import denoising_objective
from drep_jax.models import takes_classes
from drep_jax.parallel import devices
from drep_jax.run.backbone import fresh_variables
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.run.stages import prepare, starting
from drep_jax.tasks import DEFAULT
from drep_jax.training.state import make_step
from drep_jax.typing import Config, Tree


def dry_run(config: Config) -> str:
    """Takes two label-free steps on random images and returns the time and memory as text."""
    if config["dry_run_batch"] < 1:
        raise ConfigError(f"dry_run_batch={config['dry_run_batch']} must be at least 1.")
    # −1 is a backbone without a head. A backbone without `num_classes` has a fixed number of classes.
    default_classes = 1000 if takes_classes(config["model"]["name"]) else 1
    classes = max(0, config["model"].get("num_classes", 0)) or default_classes
    size = devices.device_count() * config["dry_run_batch"]
    data = {**config["data"], "source": f"random:{max(64, size)}:{classes}", "merge": ()}
    # Random images have no columns but a class. Without labels the task makes no difference.
    config = {**config, "data": data, "denoise": {**config["denoise"], "batch_size": size}, "task": DEFAULT}
    config["model"] = {name: value for name, value in config["model"].items() if name != "side_info"}
    setup = build(config)
    run = Run(config, setup, directory="")
    variables = fresh_variables(run)
    total = {n: sum(x.size for x in jax.tree_util.tree_leaves(t)) for n, t in dict(variables).items()}
    added = sum(x.size for x in jax.tree_util.tree_leaves(init_denoise(setup.sites)))
    lines = [
        f"Model {config['model']['name']}, {total['params']:,} parameters; {added:,} more in {len(setup.sites)} denoisers "
        f"while learning, none after fusion.",
        f"Sites cover {setup.covered.layers} of {setup.covered.candidates} linear layers, "
        f"{100 * setup.covered.kernel_share:.0f} % of the weights.",
        *setup.forms,
        "",
    ]
    lines += [
        f"  t={','.join(map(str, site.times)):>5s}  {site.kind:9s} d={site.width:<5d} "
        f"{site.name if site.layers[0].part else ', '.join(x.name for x in site.layers)}"
        for site in setup.sites
    ]
    text = "\n".join(lines)
    print(text, flush=True)

    options = config["denoise"]
    params, others = starting(run, "algorithm1", dict(variables))
    state, frozen, optimizers = prepare(run, "algorithm1", params, others)

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return denoising_objective(setup, options, params, others, batch, key)

    step = make_step(loss_fn, optimizers[("denoise",)], accumulate=options["accumulate"])
    state, frozen_params = devices.replicate(state), devices.replicate(frozen)
    seconds = []
    for number, batch in zip(range(2), training_batches(setup.train, size, seed=0, shard=devices.host()), strict=False):
        began = time.perf_counter()
        state, metrics = step(state, frozen_params, devices.shard(batch))
        loss = float(devices.unreplicate(metrics)["loss"])
        seconds.append(time.perf_counter() - began)
        print(
            f"  step {number + 1}: loss {loss:.3f}, {seconds[-1]:.2f} s{' (compiling included)' if not number else ''}"
        )
    more = (
        f"\nBatch {size} on {devices.device_count()} device(s): {seconds[1]:.2f} s a step, {size / seconds[1]:.1f} images/s; "
        f"peak memory {cost.peak_memory() / 2**30:.2f} GiB."
    )
    print(more)
    return text + more
