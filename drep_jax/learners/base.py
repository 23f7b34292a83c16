"""The interface of learners: their inputs, their results, and the steps that they share."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from drep_jax.core import closed_form
from drep_jax.core.denoisers import Denoisers, init_denoise
from drep_jax.core.moments import Moments
from drep_jax.core.sites import Site
from drep_jax.evaluation.selection import Candidate, Choice, Selection
from drep_jax.parallel import processes
from drep_jax.run.moments import run_moments
from drep_jax.run.run import Run
from drep_jax.run.stages import prepare, run_training, split_variables, starting
from drep_jax.training.checkpoint import folder_of, open_checkpoints
from drep_jax.training.logging import lines_of
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Batch, Config, Path, Tree


@dataclasses.dataclass(frozen=True)
class Learned:
    """Denoisers and how to fuse them.

    Attributes:
      denoisers: with their rule and steps; rule "affine" for maps given directly.
      section: the learner's section of the report.
      choice: the selection on held-out images, or None.
      variables: the backbone, if it was trained together with the denoisers; None for the run's
        own.
      network: (variables, images) ↦ outputs, for a result that cannot be fused; None for fused
        weights.
    """

    denoisers: Denoisers
    section: dict[str, Any]
    choice: Choice | None = None
    variables: Tree | None = None
    network: Callable[[Tree, Any], Any] | None = None


class LearnerInputs:
    """The inputs of every learner.

    Attributes:
      run: configuration, setup, directory and log.
      variables: of the frozen backbone.
      continued: the control arm and its seconds of training, or None.
    """

    def __init__(self, run: Run, variables: Tree, continued: tuple[Tree, float] | None = None) -> None:
        self.run, self.variables, self.continued = run, variables, continued

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.run.config

    @property
    def setup(self) -> Any:
        """Images, backbone, sites, schedule and task of the run."""
        return self.run.setup

    @property
    def moments(self) -> Mapping[Path, Moments]:
        """The moments of the features at the sites, computed or read on first use."""
        return self._moments[0]

    @property
    def moment_seconds(self) -> float:
        """Seconds that computing or reading the moments took."""
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[Mapping[Path, Moments], float]:
        began = time.perf_counter()
        return run_moments(self.run, self.variables), time.perf_counter() - began


@dataclasses.dataclass(frozen=True)
class Learner:
    """A method of learning denoisers.

    Attributes:
      learn: the function.
      labeled: whether it trains with labels; then the control arm gets the same budget.
      stage: the stage that trains it, where that has another name.
      distills: whether it trains on the backbone's clean answers; then, too, the control arm gets
        the same budget.
      chooses: whether it selects the strength of fusion on held-out images.
      direct: whether its denoisers are maps given directly, fused by rule "affine".
      explicit: whether its result is evaluated on the explicit path and cannot be fused or
        exported.
    """

    learn: Callable[[LearnerInputs], Learned]
    labeled: bool = False
    chooses: bool = False
    direct: bool = False
    explicit: bool = False
    stage: str = ""
    distills: bool = False


def train(
    inputs: LearnerInputs,
    stage: str,
    loss_fn: Any,
    log_extra: Callable[[Tree], dict[str, float]] | None = None,
    *,
    start: Mapping[str, Tree] = MappingProxyType({}),
    prepare_batch: Callable[[Batch, int], Batch] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Runs or resumes a stage; returns its final state and its section of the report.

    Args:
      inputs: of the learner.
      stage: name of the stage.
      loss_fn, log_extra, prepare_batch: see `run_training`.
      start: {subtree: parameters} in place of the usual ones before the first step.
    """
    params, others = starting(inputs.run, stage, inputs.variables)
    state, seconds = run_training(
        inputs.run, stage, {**params, **start}, others, loss_fn, log_extra, prepare_batch=prepare_batch
    )
    return state, trained_section(inputs.run, stage, int(state.step), seconds)


def trained_section(run: Run, stage: str, steps: int, seconds: float) -> dict[str, Any]:
    """Returns the section of the report that every trained stage has."""
    lines = lines_of(run.directory, stage) if processes.primary() else ()  # only it writes the report
    loss = [[line["step"], line["loss"]] for line in lines]
    return {"steps": steps, "seconds": seconds, "loss": loss, "images": len(run.setup.train)}


def keep(name: str, inputs: LearnerInputs, learned: Learned) -> None:
    """Writes a solved result to `checkpoints/<name>`, in the format of a trained stage."""
    backbone, others = split_variables(learned.variables or inputs.variables)
    params = {"backbone": backbone, "denoise": learned.denoisers.tree}
    state, frozen, _ = prepare(inputs.run, name, params, others)
    checkpointer = open_checkpoints(folder_of(inputs.run.directory, name))
    try:
        checkpointer.save(state, frozen, {"stage": name})
    finally:
        checkpointer.close()


def against_optimum(inputs: LearnerInputs, denoise: Tree) -> dict[str, Any]:
    """Returns the report's exact losses of denoisers of the run's backbone, and the minimum."""
    sites, schedule = inputs.setup.sites, inputs.setup.schedule
    start = closed_form.expected_losses(inputs.moments, sites, schedule, init_denoise(sites))
    final = closed_form.expected_losses(inputs.moments, sites, schedule, denoise)
    return {
        "per_site": {name: [start[name], final[name]] for name in start},
        "optimum": closed_form.expected_losses(inputs.moments, sites, schedule),
        "moment_seconds": inputs.moment_seconds,
    }


def selection_of(config: Config, **changes: Any) -> Selection:
    """Returns the options of selection on held-out images: `config.select`, with changes."""
    select, evaluate = {**config["select"], **changes}, config["evaluate"]
    return Selection(
        strengths=tuple(select["strengths"]),
        conditions=tuple(select["conditions"] or evaluate["conditions"]),
        images=select["images"],
        labels=select["labels"],
        max_clean_loss=select["max_clean_loss"],
        batch_size=evaluate["batch_size"],
        seed=config["seed"],
        progress=config["progress"],
    )


def leading_counts(count: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Returns the numbers of leading sites that fractions of `count` sites stand for, ascending.

    >>> leading_counts(10, (1.0, 0.25, 0.21))
    (3, 10)
    """
    return tuple(sorted({math.ceil(count * fraction - 1e-9) for fraction in fractions}))


def with_leading(candidate: Candidate, sites: Sequence[Site], count: int) -> Candidate:
    """Returns a candidate of which only the first `count` sites are fused, in execution order.

    The maps of the others are zero, so their layers keep the backbone's weights.
    """
    if count >= len(sites):
        return candidate
    denoise = candidate.denoise
    for site in sites[count:]:
        zero = jax.tree_util.tree_map(np.zeros_like, get_in(denoise, site.path))
        denoise = set_in(denoise, site.path, zero)
    return Candidate(f"{candidate.label}, first {count} of {len(sites)} sites", denoise)


def noise_predictors(config: Config, tree: Tree) -> Denoisers:
    """Returns denoisers that predict noise, with the rule and the number of steps of the configuration."""
    return Denoisers(tree, config["denoise"]["rule"], config["denoise"]["steps"])


def direct_maps(tree: Tree) -> Denoisers:
    """Returns denoisers that are maps given directly."""
    return Denoisers(tree, "affine", 1)
