"""What every learner gets and gives."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from drep_jax import closed_form, weights
from drep_jax.builder import Setting
from drep_jax.closed_form import Moments, load_moments, passes, save_moments
from drep_jax.data.loader import evaluation_batches
from drep_jax.data.reading import read
from drep_jax.denoise_tree import init_denoise
from drep_jax.selection import Choice
from drep_jax.sites import Path, Site
from drep_jax.training import distributed, parallel
from drep_jax.training.checkpoint import folder_of
from drep_jax.training.logging import MetricWriter, lines_of
from drep_jax.training.moments import NEAR, collect_moments
from drep_jax.training.shared import open_checkpoints
from drep_jax.training.stages import LABELLED_STAGES, TRAINED, key_of, prepare, run_training

Tree = Any
Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Learned:
    """Denoisers and how to fuse them.

    Attributes:
      denoise: the `denoise` subtree.
      rule, steps: of the reverse process; "affine" and 1 for maps given directly.
      section: the report's on learning.
      choice: what was chosen on held-out images, or None.
      variables: the backbone they belong to where it was trained, too; None for the run's own.
      network: (variables, images) ↦ outputs of what cannot be fused and is evaluated as it is; None for fused weights.
    """

    denoise: Tree
    rule: str
    steps: int
    section: dict[str, Any]
    choice: Choice | None = None
    variables: Tree | None = None
    network: Callable[[Tree, Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """What every learner gets; `continued` is the control arm, if there is one, and the seconds that it was trained."""

    config: Config
    setting: Setting
    variables: Tree
    moments: Mapping[Path, Moments]
    moment_seconds: float
    directory: str
    writer: MetricWriter
    continued: tuple[Tree, float] | None = None


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


def train(
    task: Task, stage: str, loss_fn: Any, probe: Callable[[Tree], dict[str, float]] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Runs or resumes a stage; returns its final state, and what the report says of every stage that is trained.

    Args:
      task: of the learner.
      stage: its name.
      loss_fn, probe: see `run_training`.
    """
    config, setting = task.config, task.setting
    params, others = starting(config, setting, stage, task.variables)
    state, seconds = run_training(
        config, setting.train, stage, params, others, loss_fn, task.directory, task.writer, probe
    )
    return state, trained_section(task, stage, int(state.step), seconds)


def trained_section(task: Task, stage: str, steps: int, seconds: float) -> dict[str, Any]:
    """Returns what the report says of every stage that is trained."""
    return {"steps": steps, "seconds": seconds, "loss": logged(task, stage), "images": len(task.setting.train)}


def keep(name: str, task: Task, learned: Learned) -> None:
    """Writes what was solved, not trained, to `checkpoints/<name>`, in the form that a trained stage has there."""
    backbone, others = split_variables(learned.variables or task.variables)
    params = {"backbone": backbone, "denoise": learned.denoise}
    state, frozen, _ = prepare(task.config, name, params, others)
    checkpointer = open_checkpoints(folder_of(task.directory, name))
    try:
        checkpointer.save(state, frozen, {"stage": name})
    finally:
        checkpointer.close()


def logged(task: Task, stage: str) -> list[list[float]]:
    """Returns [step, loss] of every line that a stage has logged, on the process that writes the report."""
    lines = lines_of(task.directory, stage) if distributed.primary() else ()
    return [[line["step"], line["loss"]] for line in lines]


def moment_images(config: Config, setting: Setting) -> int:
    """Returns how many images moments are taken of."""
    return min(config["denoise"]["moment_images"] or len(setting.train), len(setting.train))


def against_optimum(task: Task, denoise: Tree) -> dict[str, Any]:
    """Returns the report's exact losses of denoisers of the run's backbone, beside the least possible."""
    sites, schedule = task.setting.sites, task.setting.schedule
    start = closed_form.expected_losses(task.moments, sites, schedule, init_denoise(sites))
    final = closed_form.expected_losses(task.moments, sites, schedule, denoise)
    return {
        "per_site": {name: [start[name], final[name]] for name in start},
        "optimum": closed_form.expected_losses(task.moments, sites, schedule),
        "moment_seconds": task.moment_seconds,
    }


def moments_of(
    config: Config, setting: Setting, variables: Tree, path: str, sites: Sequence[Site] | None = None
) -> dict[Path, Moments]:
    """Returns the moments of a backbone's features over the training images, from a file of the run if they are there.

    Args:
      config, setting: of the run.
      variables: the backbone.
      path: of the file.
      sites: where; None for the run's own.
    """
    sites = setting.sites if sites is None else tuple(sites)
    tokens = config["denoise"]["moment_tokens"]
    owner = owner_of(setting, variables)
    kept = distributed.from_primary(lambda: load_moments(path, sites, owner, tokens) if os.path.exists(path) else None)
    if kept is not None:
        return kept
    batch = config["denoise"]["batch_size"]
    count = -(-moment_images(config, setting) // batch)
    near = setting.inputs(read(setting.train, np.arange(min(NEAR, len(setting.train)))))
    limit = config["denoise"]["moment_gib"] * 2**30
    groups = passes(sites, limit) if limit else [sites]
    moments: dict[Path, Moments] = {}
    for number, group in enumerate(groups):
        first = itertools.islice(evaluation_batches(setting.train, batch, shard=parallel.host()), count)
        name = "moments" if len(groups) == 1 else f"moments, pass {number + 1} of {len(groups)}"
        bar = tqdm.tqdm(first, name, count, unit="batch", disable=not config["progress"])
        batches = ((setting.inputs(b), b["mask"].astype(np.float32)) for b in bar)
        slot = sum(site.stack or 1 for earlier in groups[:number] for site in earlier)
        sampling = {"tokens": tokens, "seed": config["seed"], "first_slot": slot}
        moments |= collect_moments(setting.backbone, variables, group, batches, near=near, **sampling)
    if distributed.primary():
        save_moments(path, moments, owner, tokens)
    return moments


def owner_of(setting: Setting, variables: Tree) -> str:
    """Names whose features moments describe: a convolutional backbone alone does not tell the image size."""
    height, width = setting.images.shape[1:3]
    return f"{weights.digest(variables)} {height}x{width}"
