"""A training stage from its configuration: state, optimiser, batches, checkpoints."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from drep_jax.data import Source
from drep_jax.data.loader import training_batches
from drep_jax.errors import ConfigError
from drep_jax.training.checkpoint import Checkpointer, folder_of
from drep_jax.training.logging import MetricWriter
from drep_jax.training.loop import run_stage
from drep_jax.training.profile import parse_profile
from drep_jax.training.state import create_state, make_optimizer, make_step, partitioned, split

Tree = Any
Config = Mapping[str, Any]

STAGES = ("backbone", "control", "algorithm1")
"""Training stages; each keeps its checkpoints in `checkpoints/<stage>` and draws from a key of its own."""

PURPOSES = ("init", *STAGES, "placebo", "noise", "closed_form", "wiener", "measured")


def section_of(stage: str) -> str:
    """Returns the name of the settings of a stage; every learner of denoisers has those of `denoise`."""
    return stage if stage in ("backbone", "control") else "denoise"


def training_steps(config: Config, stage: str) -> int:
    """Returns the optimiser steps of a stage; 0 for learners that solve instead of training."""
    if stage in ("backbone", "control"):
        return config[stage]["steps"]
    return config["denoise"]["train_steps"] if stage == "algorithm1" else 0


def key_of(config: Config, purpose: str) -> jax.Array:
    """Returns the random key of a purpose."""
    return jax.random.fold_in(jax.random.key(config["seed"]), PURPOSES.index(purpose))


def optimizer_of(config: Config, stage: str) -> Any:
    """Returns a stage's optimiser.

    Raises:
      ConfigError: naming the stage.
    """
    options, steps = config[section_of(stage)], training_steps(config, stage)
    try:
        return make_optimizer(
            options["optimizer"],
            learning_rate=options["learning_rate"],
            steps=steps,
            warmup=options["warmup"] if steps else 0,
            weight_decay=options["weight_decay"],
            clip=options["clip"],
        )
    except ConfigError as error:
        raise ConfigError(f"{section_of(stage)}: {error}") from error


def prepare(config: Config, stage: str, params: Tree, others: Tree, trainable: tuple[str, ...]) -> Any:
    """Returns the state before a stage's first step, its frozen parameters and its optimiser."""
    tx = partitioned(optimizer_of(config, stage), trainable)
    chosen, frozen = split(params, trainable)
    return create_state(chosen, others, tx, frozen, key_of(config, stage)), frozen, tx


def run_training(
    config: Config,
    source: Source,
    stage: str,
    params: Tree,
    others: Tree,
    trainable: tuple[str, ...],
    loss_fn: Any,
    directory: str,
    writer: MetricWriter,
    probe: Any = None,
) -> Any:
    """Runs or resumes a stage; returns its final state and the seconds it took."""
    options = config[section_of(stage)]
    state, frozen, tx = prepare(config, stage, params, others, trainable)
    seed = config["seed"] * len(STAGES) + STAGES.index(stage)
    augment = {name: config["data"][name] for name in ("flip", "shift")}

    def batches(start: int) -> Iterator[dict[str, Any]]:
        return training_batches(source, options["batch_size"], seed=seed, start_step=start, **augment)

    checkpointer = Checkpointer(folder_of(directory, stage))
    try:
        return run_stage(
            stage,
            state,
            frozen,
            make_step(loss_fn, tx),
            batches,
            steps=training_steps(config, stage),
            checkpointer=checkpointer,
            writer=writer,
            log_every=config["log_every"],
            checkpoint_every=config["checkpoint_every"],
            progress=config["progress"],
            probe=probe,
            profile=parse_profile(config["profile"], directory),
        )
    finally:
        checkpointer.close()
