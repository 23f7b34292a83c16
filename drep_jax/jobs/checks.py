"""Checks before a run: settings against backbone, images and devices, and between processes."""

import hashlib
from typing import Any

import numpy as np

from drep_jax.core.algorithm1 import LOSSES
from drep_jax.core.recipes import check_grid
from drep_jax.core.reverse_map import site_steps
from drep_jax.data import Source
from drep_jax.data.corruptions import check_spec
from drep_jax.data.corruptions.latent import needs_a_run, open_latent
from drep_jax.data.labels import check_form, described, labeled_images
from drep_jax.errors import ConfigError, DataError, lookup
from drep_jax.evaluation.placebo import PLACEBOS
from drep_jax.exporting.statistics import Statistics
from drep_jax.jobs.scoring_checks import check_scoring
from drep_jax.learners import LEARNERS
from drep_jax.learners.checks import check_choosing, check_distilled, check_labeled
from drep_jax.learners.losses import check_computing
from drep_jax.learners.noise import noise_sources
from drep_jax.parallel import devices, processes
from drep_jax.run import workdir
from drep_jax.run.environment import environment
from drep_jax.run.inputs import check_sizes
from drep_jax.run.pretraining import check_pretraining
from drep_jax.run.setup import Setup
from drep_jax.run.stages import STAGES, Stage, optimizer_of
from drep_jax.tasks import StagePlan
from drep_jax.training.logging import check_wandb
from drep_jax.training.profile import parse_profile
from drep_jax.typing import Config

UNKNOWN_CLASSES = ("refuse", "score")
"""Values of `evaluate.unknown_classes`."""


LEARN_FROM_NOISE = {"measured", *(name for name, learner in LEARNERS.items() if learner.distills)}
"""Learners that learn from the pairs that `config.noise` may name."""


def check(config: Config, setup: Setup) -> dict[str, dict[str, Any]]:
    """Refuses settings that any stage cannot use, before the first stage and before writing files.

    Returns:
      The report's `data`: counts of every part of the images, and what its source has to say.

    Raises:
      DrepError: its subclasses name the setting.
    """
    denoise, evaluate = config["denoise"], config["evaluate"]
    for name in ("log_every", "checkpoint_every", "latency_rounds"):
        _at_least_one(name, config[name])
    for name in ("certificate_images", "latency_batch"):
        _at_least_one(f"evaluate.{name}", evaluate[name])
    check_sizes(config, setup)
    for learner in (config["learner"], *config["compare"]):
        lookup(LEARNERS, learner, "learner")
    lookup(dict.fromkeys(PLACEBOS), evaluate["placebo"], "evaluate.placebo")
    check_choosing(config, setup)
    sweep = {name: config["sweep"][name] for name in ("rules", "steps", "scales", "strengths")}
    check_grid(setup.schedule, **sweep)
    lookup(LOSSES, denoise["loss"], "loss")
    parse_profile(config["profile"], "")
    check_wandb(config["wandb"])
    for name in ("tokens", "moment_tokens"):
        if not 0.0 < denoise[name] <= 1.0:
            raise ConfigError(f"denoise.{name}={denoise[name]} is a fraction of the tokens and must lie in (0, 1].")
    site_steps(setup.sites, setup.schedule, denoise["rule"], denoise["steps"])
    trained = config["backbone"]["steps"] or config["pretrain"]["steps"]
    if not config["backbone"]["init_from"] and not trained:
        raise ConfigError(
            "There is no backbone: give trained weights with --config.backbone.init_from=FILE, or train one from labeled "
            "images with --config.backbone.steps=N."
        )
    check_pretraining(config, setup)
    _check_latent_noise(config)
    check_labeled(config, setup)
    check_distilled(config, setup)
    choosing = choosing_learners(config)
    if choosing and not len(setup.held_out):
        raise DataError(
            f'Learner "{choosing[0]}" chooses its strength on held-out images, and {setup.held_out.name} has none in its '
            "validation split. Hold some out, or take another learner."
        )
    for stage in STAGES.values():
        _check_stage(config, setup, stage)
    if not denoise["moment_gib"] >= 0:
        raise ConfigError(f"denoise.moment_gib={denoise['moment_gib']} is a memory in GiB, or 0 for no limit.")
    if not 0.0 <= denoise["ema"] < 1.0:
        raise ConfigError(f"denoise.ema={denoise['ema']} is the decay of a moving average and lies in [0, 1).")
    setup.task.check(config, setup, stage_plans(config), chooses=bool(choosing))
    if setup.test is not None or setup.others:
        check_evaluation(config)
    data = check_scoring(config, setup)
    if {config["learner"], *config["compare"]} & LEARN_FROM_NOISE:
        data |= described(noise_sources(config))
    return data


def _check_latent_noise(config: Config) -> None:
    """Refuses noise in the latents of the run's PCA where the run makes none."""
    specs = (config["noise"], *config["evaluate"]["conditions"], *config["select"]["conditions"])
    if config["pretrain"]["steps"] or not any(needs_a_run(spec) for spec in specs):
        return
    open_latent("", {})


def choosing_learners(config: Config) -> list[str]:
    """Returns the learners of a run that select the strength of fusion on held-out images."""
    requested = dict.fromkeys((config["learner"], *config["compare"]))
    return [name for name, learner in LEARNERS.items() if learner.chooses and name in requested]


def _check_stage(config: Config, setup: Setup, stage: Stage) -> None:
    """Refuses settings of a training stage, whether or not the run will train it."""
    section, name, train = stage.section, stage.name, setup.train
    if name == "backbone" and config["backbone"]["init_from"]:
        return
    steps, batch = _steps(config, stage), stage.batch_size(config)
    if steps < 0:
        raise ConfigError(f"{section}: the number of steps must be 0 or more, got {steps}.")
    optimizer_of(config, name)
    if steps or name == "algorithm1":  # whose batches serve for the moments, too
        devices.check_batch(batch, f"{section}.batch_size")
    if not steps:
        return
    check_computing(config[section], section, setup, batch)
    if stage.labeled and section == name and setup.features:
        raise ConfigError(
            f"Stage {name} trains with labels, but the backbone has no head. Set --config.{name}.steps=0."
        )
    if stage.labeled and section == name and train.num_classes is None:
        raise ConfigError(f"Stage {name} trains with labels, but {train.name} has none. Set --config.{name}.steps=0.")
    if stage.labeled:
        check_form(train, setup.task.columns)
    if stage.labeled and (labeled := labeled_images(train)) is not None and not labeled.any():
        raise DataError(
            f"Stage {name} trains with labels, but none of the {len(train):,} images of {train.name} has one."
        )
    if len(train) < batch:
        raise DataError(
            f"{train.name} has {len(train)} training images, fewer than one batch: {section}.batch_size is {batch}."
        )


def stage_plans(config: Config) -> list[StagePlan]:
    """Returns the labeled stages that a run will train."""
    return [
        StagePlan(
            name=stage.name,
            section=stage.section,
            batch_setting=f"{stage.batch_section}.batch_size",
            batch_size=stage.batch_size(config),
            parts=config[stage.section]["accumulate"],
            device_count=devices.device_count(),
            seed=config["seed"],
        )
        for stage in STAGES.values()
        if stage.labeled and _steps(config, stage)
    ]


def check_evaluation(config: Config) -> None:
    """Refuses invalid settings of the evaluation.

    Raises:
      ConfigError: naming the setting.
    """
    evaluate = config["evaluate"]
    devices.check_batch(evaluate["batch_size"], "evaluate.batch_size")
    if evaluate.get("unknown_classes", "refuse") not in UNKNOWN_CLASSES:
        raise ConfigError(
            f'evaluate.unknown_classes="{evaluate["unknown_classes"]}": expected {" or ".join(UNKNOWN_CLASSES)}.'
        )
    if evaluate["resamples"] < 100:
        raise ConfigError(f"evaluate.resamples={evaluate['resamples']}: at least 100 are needed for an interval.")
    if not evaluate["conditions"]:
        raise ConfigError('evaluate.conditions is empty; give at least "clean".')
    for condition in evaluate["conditions"]:
        check_spec(condition)
    for text in evaluate["statistics"]:
        Statistics.parse(text)


def agree(config: Config, setup: Setup) -> None:
    """Refuses a process whose settings, images, devices or versions differ from the first process.

    Raises:
      ConfigError: naming the process and what differs.
    """
    if processes.alone():
        return
    settings = {name: value for name, value in workdir.flatten(config).items() if name != "progress"}
    processes.check_same("configuration", settings)
    sources = {"train": setup.train, "validation": setup.held_out, "test": setup.test}
    images = {split: _described(source) for split, source in sources.items() if source is not None}
    processes.check_same("data", images)
    versions = environment()
    machine = {name: versions[name] for name in ("drep_jax", "jax", "flax", "device")}
    processes.check_same("environment", {**machine, "local devices": devices.local_device_count()})


def _described(source: Source) -> str:
    """Returns a description that distinguishes sources: name, size, and a digest of two images."""
    digest = hashlib.sha256()
    for index in dict.fromkeys((0, len(source) - 1)) if len(source) else ():
        item = source[index]
        digest.update(np.ascontiguousarray(item["image"]).tobytes() + str(item.get("label")).encode())
    return f"{source.name}, {len(source)} images, {source.num_classes} classes, {digest.hexdigest()[:12]}"


def _steps(config: Config, stage: Stage) -> int:
    """Returns the steps of a stage in a run; 0 if not requested or if the backbone is given."""
    pretrained = stage.name == "backbone" and config["backbone"]["init_from"]
    learners = (config["learner"], *config["compare"])
    requested = stage.section == stage.name or stage.name in {LEARNERS[name].stage or name for name in learners}
    return stage.steps(config) if requested and not pretrained else 0


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value} must be at least 1.")
