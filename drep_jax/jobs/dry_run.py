"""The time and memory of a full-size job, measured by two steps of its label-free stages on random images."""

import time
from typing import Any

import jax

from drep_jax.core.denoisers import init_denoise
from drep_jax.data.loader import training_batches
from drep_jax.errors import ConfigError
from drep_jax.evaluation import cost
from drep_jax.learners.losses import denoising_objective
from drep_jax.models import takes_classes
from drep_jax.models.transformer import pair
from drep_jax.parallel import devices
from drep_jax.run.backbone import fresh_variables
from drep_jax.run.pretraining import (
    blank_pca,
    check_pretraining,
    fresh_autoencoder,
    pretraining_of,
    training_loss,
    vit_of,
)
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.run.stages import prepare, stage_of, starting
from drep_jax.tasks import DEFAULT
from drep_jax.training.state import make_step
from drep_jax.typing import Config, Tree


def dry_run(config: Config) -> str:
    """Takes two steps of Algorithm 1, and of pre-training if there is any, on random images.

    Returns:
      Time and memory as text.

    Raises:
      ConfigError: naming the setting that cannot be.
    """
    if config["dry_run_batch"] < 1:
        raise ConfigError(f"dry_run_batch={config['dry_run_batch']} must be at least 1.")
    # −1 is a backbone without a head. A backbone without `num_classes` has a fixed number of classes.
    default_classes = 1000 if takes_classes(config["model"]["name"]) else 1
    classes = max(0, config["model"].get("num_classes", 0)) or default_classes
    size = devices.device_count() * config["dry_run_batch"]
    data = {**config["data"], "source": f"random:{max(64, size)}:{classes}", "merge": ()}
    # Random images have no columns but a class. Without labels the task makes no difference.
    config = {**config, "data": data, "denoise": {**config["denoise"], "batch_size": size}, "task": DEFAULT}
    config["pretrain"] = {**config["pretrain"], "batch_size": size}
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

    params, others = starting(run, "algorithm1", dict(variables))

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return denoising_objective(setup, config["denoise"], params, others, batch, key)

    if config["pretrain"]["steps"]:
        check_pretraining(config, setup)
        text += _two_steps(run, "pretrain", *_pretraining(run))
    return text + _two_steps(run, "algorithm1", params, others, loss_fn)


def _pretraining(run: Run) -> tuple[Tree, Tree, Any]:
    """Returns (parameters, other collections, loss) of an autoencoder of the job's shapes."""
    pca = blank_pca(run.config["pretrain"], pair(vit_of(run.setup).patch_size))
    pretraining = pretraining_of(run, pca)
    return {"backbone": fresh_autoencoder(run, pretraining)}, {}, training_loss(run, pretraining)


def _two_steps(run: Run, name: str, params: Tree, others: Tree, loss_fn: Any) -> str:
    """Takes two steps of a stage, and returns what they cost as text; loss_fn as for `make_step`."""
    stage, source = stage_of(name), run.setup.train
    size, options = stage.batch_size(run.config), run.config[stage.section]
    state, frozen, optimizers = prepare(run, name, params, others)
    step = make_step(loss_fn, optimizers[stage.trains], active=stage.trains, accumulate=options["accumulate"])
    state, frozen = devices.replicate(state), devices.replicate(frozen)
    seconds = []
    for number, batch in zip(range(2), training_batches(source, size, seed=0, shard=devices.host()), strict=False):
        began = time.perf_counter()
        state, metrics = step(state, frozen, devices.shard(batch))
        loss = float(devices.unreplicate(metrics)["loss"])
        seconds.append(time.perf_counter() - began)
        including = " (compiling included)" if not number else ""
        print(f"  {name}, step {number + 1}: loss {loss:.3f}, {seconds[-1]:.2f} s{including}", flush=True)
    cost_line = (
        f"\n{name}, batch {size} on {devices.device_count()} device(s): {seconds[1]:.2f} s a step, "
        f"{size / seconds[1]:.1f} images/s; peak memory {cost.peak_memory() / 2**30:.2f} GiB."
    )
    print(cost_line, flush=True)
    return cost_line
