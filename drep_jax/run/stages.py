"""A training stage from its configuration: state, optimiser, batches, checkpoints."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax

from drep_jax.core.denoisers import init_denoise
from drep_jax.data import Source
from drep_jax.data.augment import augmentation_of
from drep_jax.data.loader import Order, training_batches
from drep_jax.data.metadata import table_of
from drep_jax.data.reid.sampler import epoch_length, identity_order
from drep_jax.errors import ConfigError
from drep_jax.parallel import devices, processes
from drep_jax.run.setup import Setting
from drep_jax.training.checkpoint import folder_of, open_checkpoints
from drep_jax.training.logging import MetricWriter
from drep_jax.training.loop import run_stage
from drep_jax.training.profile import parse_profile
from drep_jax.training.state import (
    create_state,
    extra_params,
    frozen_state,
    make_optimizer,
    make_step,
    partitioned,
    split,
)
from drep_jax.typing import Config, Tree


def split_variables(variables: Tree) -> tuple[Tree, Tree]:
    """Returns a backbone's parameters and its other collections."""
    return variables["params"], {name: tree for name, tree in variables.items() if name != "params"}


def starting(config: Config, setting: Setting, stage: str, variables: Tree) -> tuple[Tree, Tree]:
    """Returns what a stage or learner starts from: {subtree: parameters}, and the backbone's other collections."""
    backbone, others = split_variables(variables)
    params = {"backbone": backbone}
    if TRAINED.get(stage) != ("backbone",):
        params["denoise"] = init_denoise(setting.sites)
    if stage in LABELLED_STAGES:
        key = key_of(config, "beside")
        params |= setting.task.start(setting.backbone, setting.abstract, setting.images, key)
    return params, others


STAGES = ("backbone", "control", "algorithm1", "label_augmented", "alternating")
"""Training stages; each keeps its checkpoints in `checkpoints/<stage>` and draws from a key of its own."""


TRAINED = {"backbone": ("backbone",), "control": ("backbone",), "alternating": ("denoise", "backbone")}
"""Names of the subtrees that a stage trains; the denoisers alone in those that are not listed. What a task trains beside
them, such as centres, is trained in every labelled stage."""


LABELLED_STAGES = ("backbone", "control", "label_augmented", "alternating")
"""Stages that see labels."""


PURPOSES = (
    *("init", "backbone", "control", "algorithm1", "placebo", "noise", "closed_form", "wiener", "measured"),
    *("label_augmented", "alternating", "continued", "beside"),
)
"""What random keys are drawn for; the place in the list decides the key, so new ones come last."""


STREAMS = {"backbone": 0, "control": 1, "algorithm1": 2, "label_augmented": 1, "alternating": 1}
"""Which order of the images a stage sees; all that train with labels beside the control arm see its images."""


def section_of(stage: str) -> str:
    """Returns the name of the settings of a stage; every learner of denoisers has those of `denoise`."""
    return stage if stage in ("backbone", "control") else "denoise"


def training_steps(config: Config, stage: str) -> int:
    """Returns the optimiser steps of a stage; 0 for learners that solve instead of training."""
    if stage in ("backbone", "control"):
        return config[stage]["steps"]
    if stage == "alternating":
        return config["alternate"]["steps"]
    return config["denoise"]["train_steps"] if stage in ("algorithm1", "label_augmented") else 0


def batch_size_of(config: Config, stage: str) -> int:
    """Returns the images a step of a stage; whole backbones are trained on batches of the control arm's size."""
    return config["control" if stage == "alternating" else section_of(stage)]["batch_size"]


def key_of(config: Config, purpose: str) -> jax.Array:
    """Returns the random key of a purpose."""
    return jax.random.fold_in(jax.random.key(config["seed"]), PURPOSES.index(purpose))


def phase(config: Config, number: int) -> str:
    """Returns which subtree step `number` (the first is 1) of alternating fine-tuning trains (appendix A)."""
    order = config["alternate"]["order"]
    return order[(number - 1) // config["alternate"]["period"] % len(order)]


def optimizer_of(config: Config, stage: str) -> Any:
    """Returns a stage's optimiser; of the alternating stage {subtree: optimiser}, each with its own number of steps.

    Raises:
      ConfigError: naming the stage.
    """
    steps, sharded = training_steps(config, stage), config[section_of(stage)]["divide_optimizer"]
    if stage != "alternating":
        return _optimizer(config[section_of(stage)], section_of(stage), steps, sharded)
    phases = [phase(config, number) for number in range(1, steps + 1)]
    sections = {"denoise": "denoise", "backbone": "control"}
    return {
        name: _optimizer(config[section], section, phases.count(name), sharded) for name, section in sections.items()
    }


def _optimizer(options: Config, section: str, steps: int, sharded: bool) -> Any:
    try:
        return make_optimizer(
            options["optimizer"],
            learning_rate=options["learning_rate"],
            steps=steps,
            warmup=options["warmup"] if steps else 0,
            weight_decay=options["weight_decay"],
            clip=options["clip"],
            sharded=sharded,
        )
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error


def prepare(config: Config, stage: str, params: Tree, others: Tree) -> Any:
    """Returns the state before a stage's first step, its frozen parameters and its steps by the subtrees they train.

    Args:
      config: of the run.
      stage: its name, or that of a learner that solves.
      params: {"backbone": tree}, or with "denoise" beside it, and what the task trains beside them.
      others: other variable collections of the backbone.

    Returns:
      (state, frozen, {active subtrees: optimiser}).
    """
    beside = {name: _plain_descent(config) for name in extra_params(params)}
    trainable = (*TRAINED.get(stage, ("denoise",)), *beside)
    chosen, frozen = split(params, trainable)
    optimizer = optimizer_of(config, stage)
    averaged = ("denoise",) if "denoise" in trainable and config["denoise"]["ema"] else ()
    key = key_of(config, stage)
    if stage != "alternating":
        own = {name: optimizer for name in trainable if name not in beside} | beside
        tx = partitioned(own if beside else optimizer, trainable)
        return create_state(chosen, others, tx, frozen, key, averaged=averaged), frozen, {trainable: tx}
    by_phase: dict[tuple[str, ...], Any] = {
        (name, *beside): partitioned(
            {n: tx if n == name else frozen_state(tx) for n, tx in optimizer.items()} | beside, trainable
        )
        for name in optimizer
    }
    tx = by_phase[(trainable[0], *beside)]
    return create_state(chosen, others, tx, frozen, key, averaged=averaged), frozen, by_phase


def _plain_descent(config: Config) -> optax.GradientTransformation:
    """Returns the optimiser of centres, whose rate does not depend on the weight of their loss."""
    options = config["retrieval"]
    return optax.chain(optax.scale(1.0 / options["center_weight"]), optax.sgd(options["center_lr"]))


def order_of(config: Config, source: Source, stage: str, seed: int) -> Order | None:
    """Returns the order in which a stage sees the images: for retrieval with labels, P identities of K images a batch.

    Raises:
      DrepError: its subclasses say which images make no such batches.
    """
    options = config["retrieval"]
    if config["task"] != "retrieval" or stage not in LABELLED_STAGES or not options["instances"]:
        return None
    labels = table_of(source)["label"]
    block = options["identities"], options["instances"]
    how: dict[str, Any] = {"lonely": options["singletons"], "names": source.class_names}
    length = epoch_length(labels, *block, **how)
    return Order(length, lambda epoch: identity_order(labels, *block, seed, epoch, **how))


def run_training(
    config: Config,
    source: Source,
    stage: str,
    params: Tree,
    others: Tree,
    loss_fn: Any,
    directory: str,
    writer: MetricWriter,
    log_extra: Any = None,
) -> Any:
    """Runs or resumes a stage; returns its final state and the seconds it took.

    `loss_fn` is as `make_step` takes it; of the alternating stage {subtree: loss_fn}.
    """
    options = config[section_of(stage)]
    state, frozen, optimizers = prepare(config, stage, params, others)
    seed = config["seed"] * 3 + STREAMS[stage]
    augmentation = augmentation_of(config["data"], labelled=stage != "algorithm1")
    order = order_of(config, source, stage, seed)

    def batches(start: int) -> Iterator[dict[str, Any]]:
        size, host = batch_size_of(config, stage), devices.host()
        return training_batches(
            source, size, seed=seed, start_step=start, augmentation=augmentation, shard=host, order=order
        )

    sharded = options["divide_optimizer"]
    steps = {
        active: make_step(
            loss_fn[active[0]] if isinstance(loss_fn, Mapping) else loss_fn,
            tx,
            active=active,
            accumulate=options["accumulate"],
            ema=config["denoise"]["ema"],
            sharded=sharded,
        )
        for active, tx in optimizers.items()
    }
    by_name = {active[0]: step for active, step in steps.items()}
    only = next(iter(steps.values()))
    checkpointer = open_checkpoints(folder_of(directory, stage))
    try:
        return run_stage(
            stage,
            state,
            frozen,
            (lambda number: by_name[phase(config, number)]) if stage == "alternating" else (lambda number: only),
            batches,
            steps=training_steps(config, stage),
            checkpointer=checkpointer,
            writer=writer,
            log_every=config["log_every"],
            checkpoint_every=config["checkpoint_every"],
            progress=config["progress"],
            log_extra=log_extra,
            sharded=sharded,
            profile=parse_profile(config["profile"], directory) if processes.primary() else None,
        )
    finally:
        checkpointer.close()
