"""What is checked before a run: its settings against the backbone, the images and the devices, and among its processes."""

import hashlib

import numpy as np

from drep_jax.core.algorithm1 import LOSSES
from drep_jax.core.recipes import check_grid
from drep_jax.core.reverse_map import site_steps
from drep_jax.data import Source
from drep_jax.data.corruptions import parse_spec
from drep_jax.data.metadata import table_of
from drep_jax.errors import ConfigError, DataError, lookup
from drep_jax.learners import CHOOSING, LEARNERS, check_labelled, check_measuring
from drep_jax.learners.losses import check_computing
from drep_jax.parallel import devices, processes
from drep_jax.run import workdir
from drep_jax.run.environment import environment
from drep_jax.run.setup import Setting
from drep_jax.run.stages import (
    LABELLED_STAGES,
    STAGES,
    batch_size_of,
    optimizer_of,
    order_of,
    section_of,
    training_steps,
)
from drep_jax.tasks import Retrieval
from drep_jax.training.logging import check_wandb
from drep_jax.training.profile import parse_profile
from drep_jax.typing import Config


def check(config: Config, setting: Setting) -> None:
    """Refuses what a later stage could not use, before hours are spent on the earlier ones and before anything is written.

    Raises:
      DrepError: its subclasses name the setting.
    """
    denoise, evaluate = config["denoise"], config["evaluate"]
    for name in ("log_every", "checkpoint_every", "latency_rounds"):
        _at_least_one(name, config[name])
    for name in ("certificate_images", "latency_batch"):
        _at_least_one(f"evaluate.{name}", evaluate[name])
    for learner in (config["learner"], *config["compare"]):
        lookup(LEARNERS, learner, "learner")
    check_measuring(config)
    sweep = {name: config["sweep"][name] for name in ("rules", "steps", "scales", "strengths")}
    check_grid(setting.schedule, **sweep)
    lookup(LOSSES, denoise["loss"], "loss")
    parse_profile(config["profile"], "")
    check_wandb(config["wandb"])
    for name in ("tokens", "moment_tokens"):
        if not 0.0 < denoise[name] <= 1.0:
            raise ConfigError(f"denoise.{name}={denoise[name]} is a share of the feature vectors and lies in (0, 1].")
    site_steps(setting.sites, setting.schedule, denoise["rule"], denoise["steps"])
    if not config["backbone"]["init_from"] and not config["backbone"]["steps"]:
        raise ConfigError(
            "There is no backbone: give trained weights with --config.backbone.init_from=FILE, or train one from labelled "
            "images with --config.backbone.steps=N."
        )
    check_labelled(config, setting)
    asked = (config["learner"], *config["compare"])
    if (choosing := [name for name in CHOOSING if name in asked]) and not len(setting.held_out):
        raise DataError(
            f'Learner "{choosing[0]}" chooses its strength on held-out images, and {setting.held_out.name} has none in its '
            "validation split. Hold some out, or take another learner."
        )
    by_identity = choosing and isinstance(setting.task, Retrieval) and config["select"]["labels"]
    if by_identity and len(set(table_of(setting.held_out).get("label", np.arange(2)).tolist())) < 2:
        raise DataError(
            f"{setting.held_out.name} holds out one identity only, which is found at once whatever the strength. Hold out "
            "more (?held_out=…), or choose without labels: --config.select.labels=False."
        )
    for stage in STAGES:
        if stage == "backbone" and config["backbone"]["init_from"]:
            continue
        section = section_of(stage)
        steps = _steps(config, stage)
        batch = batch_size_of(config, stage)
        if steps < 0:
            raise ConfigError(f"{section}: the number of steps must be 0 or more, got {steps}.")
        optimizer_of(config, stage)
        if steps or stage == "algorithm1":  # whose batches serve for the moments, too
            devices.check_batch(batch, f"{section}.batch_size")
        if steps:
            check_computing(config[section], section, setting, batch)
        if steps and section == stage and setting.features:
            raise ConfigError(
                f"Stage {stage} trains with labels, but the backbone has no head. Set --config.{stage}.steps=0."
            )
        if steps and section == stage and setting.train.num_classes is None:
            raise ConfigError(
                f"Stage {stage} trains with labels, but {setting.train.name} has none. Set --config.{stage}.steps=0."
            )
        if steps and len(setting.train) < batch:
            raise DataError(
                f"{setting.train.name} has {len(setting.train)} training images, fewer than one batch: {section}.batch_size is "
                f"{batch}."
            )
    if not denoise["moment_gib"] >= 0:
        raise ConfigError(f"denoise.moment_gib={denoise['moment_gib']} is a memory in GiB, or 0 for no limit.")
    if not 0.0 <= denoise["ema"] < 1.0:
        raise ConfigError(f"denoise.ema={denoise['ema']} is the decay of a moving average and lies in [0, 1).")
    if isinstance(setting.task, Retrieval):
        check_retrieval(config, setting, setting.task)
    if setting.test is not None or setting.others:
        check_evaluation(config)


def check_evaluation(config: Config) -> None:
    """Refuses settings that nothing can be evaluated with.

    Raises:
      ConfigError: naming the setting.
    """
    evaluate = config["evaluate"]
    devices.check_batch(evaluate["batch_size"], "evaluate.batch_size")
    if evaluate["resamples"] < 100:
        raise ConfigError(f"evaluate.resamples={evaluate['resamples']}: at least 100 are needed for an interval.")
    if not evaluate["conditions"]:
        raise ConfigError('evaluate.conditions is empty; give at least "clean".')
    for condition in evaluate["conditions"]:
        parse_spec(condition)


def check_retrieval(config: Config, setting: Setting, task: Retrieval) -> None:
    """Refuses settings, images or backbones that the labelled stages of task "retrieval" cannot use.

    Raises:
      DrepError: its subclasses name the setting.
    """
    backbone = setting.backbone
    branches = getattr(backbone, "branches", 1)
    if task.views != (branches == 2):
        raise ConfigError(
            f"retrieval.views={task.views}, but {config['model']['name']} has {branches} branch(es): triplets by view, and "
            "distances by view, go with a backbone that has one branch for the same view and one for different ones."
        )
    for stage in LABELLED_STAGES:
        section = section_of(stage)
        if not _steps(config, stage):
            continue
        if not hasattr(backbone, "outputs"):
            raise ConfigError(
                f"Stage {stage} trains with identities, and {config['model']['name']} has no neck for their losses. Take a "
                "backbone for re-identification (docs/reid.md), or learn without labels."
            )
        identities = setting.train.num_classes or 0
        if identities > getattr(backbone, "num_classes", identities):
            raise ConfigError(
                f"Stage {stage} trains with identities, of which {setting.train.name} has {identities} and the backbone's "
                f"classifier {backbone.num_classes}: set --config.model.num_classes={identities}, or learn without labels."
            )
        if config["data"]["mixup"] or config["data"]["cutmix"]:
            raise ConfigError(
                "data.mixup and data.cutmix mix identities, of which triplets can make nothing; set both to 0."
            )
        if task.views and np.min(table_of(setting.train)["view"]) < 0:
            raise ConfigError(
                f"retrieval.views needs the view of every image, which {setting.train.name} does not tell "
                "(veri:DIR?views=known leaves out the images without)."
            )
        batch, size = batch_size_of(config, stage), task.identities * task.instances
        where = f"{'control' if stage == 'alternating' else section}.batch_size"
        if task.instances and batch != size:
            raise ConfigError(
                f"{where}={batch}, but retrieval.identities={task.identities} of retrieval.instances={task.instances} images "
                f"are {size}. Make them equal, or set retrieval.instances=0 for batches of any images."
            )
        part = batch // devices.device_count() // config[section]["accumulate"]
        if config[section]["accumulate"] > 1 and task.instances and part % task.instances:
            raise ConfigError(
                f"{section}.accumulate={config[section]['accumulate']} cuts batches into parts of {part} images a device, "
                f"which hold no whole identities of {task.instances} images."
            )
        if task.instances and task.triplet_weight and part * devices.device_count() < 2 * task.instances:
            raise ConfigError(
                f"{section}.accumulate={config[section]['accumulate']} cuts batches into parts of one identity, where no "
                "triplet has a negative. Take fewer parts."
            )
        order_of(config, setting.train, stage, config["seed"])


def agree(config: Config, setting: Setting) -> None:
    """Refuses processes of one run that have other settings, images, devices or versions than the first.

    Raises:
      ConfigError: naming the process and what differs.
    """
    if processes.alone():
        return
    settings = {name: value for name, value in workdir.flatten(config).items() if name != "progress"}
    processes.check_same("configuration", settings)
    sources = {"train": setting.train, "validation": setting.held_out, "test": setting.test}
    images = {split: _described(source) for split, source in sources.items() if source is not None}
    processes.check_same("data", images)
    there = environment()
    machine = {name: there[name] for name in ("drep_jax", "jax", "flax", "device")}
    processes.check_same("environment", {**machine, "local devices": devices.local_device_count()})


def _described(source: Source) -> str:
    """Returns what tells two sources apart: their names, sizes, and the first and the last image."""
    digest = hashlib.sha256()
    for place in dict.fromkeys((0, len(source) - 1)) if len(source) else ():
        item = source[place]
        digest.update(np.ascontiguousarray(item["image"]).tobytes() + str(item.get("label")).encode())
    return f"{source.name}, {len(source)} images, {source.num_classes} classes, {digest.hexdigest()[:12]}"


def _steps(config: Config, stage: str) -> int:
    """Returns the steps that a run will train a stage for; 0 of a learner not asked for, and of a backbone that is given."""
    given = stage == "backbone" and config["backbone"]["init_from"]
    asked = section_of(stage) == stage or stage in (config["learner"], *config["compare"])
    return training_steps(config, stage) if asked and not given else 0


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value} must be at least 1.")
