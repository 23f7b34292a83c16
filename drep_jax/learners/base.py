"""What every learner gets and gives."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from drep_jax.core import closed_form
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.moments import Moments
from drep_jax.evaluation.selection import Choice
from drep_jax.parallel import processes
from drep_jax.run.setup import Setting
from drep_jax.run.stages import prepare, run_training, split_variables, starting
from drep_jax.training.checkpoint import folder_of, open_checkpoints
from drep_jax.training.logging import MetricWriter, lines_of
from drep_jax.typing import Config, Path, Tree


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


def train(
    task: Task, stage: str, loss_fn: Any, log_extra: Callable[[Tree], dict[str, float]] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Runs or resumes a stage; returns its final state, and what the report says of every stage that is trained.

    Args:
      task: of the learner.
      stage: its name.
      loss_fn, log_extra: see `run_training`.
    """
    config, setting = task.config, task.setting
    params, others = starting(config, setting, stage, task.variables)
    state, seconds = run_training(
        config, setting.train, stage, params, others, loss_fn, task.directory, task.writer, log_extra
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
    lines = lines_of(task.directory, stage) if processes.primary() else ()
    return [[line["step"], line["loss"]] for line in lines]


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
