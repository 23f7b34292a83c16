"""The last checkpoint of a stage, finished or not: its backbone and denoisers."""

import dataclasses
import os

import jax
import numpy as np

from drep_jax.parallel import processes
from drep_jax.run.run import Run
from drep_jax.run.stages import prepare, stage_of, starting
from drep_jax.training.checkpoint import folder_of, open_checkpoints
from drep_jax.typing import Tree


@dataclasses.dataclass(frozen=True)
class Saved:
    """The last checkpoint of a stage.

    Attributes:
      step: number of steps taken.
      steps: total number of steps of the stage; 0 for a solved result.
      variables: of the backbone.
      denoise: the denoisers; None if the stage has none.
    """

    step: int
    steps: int
    variables: Tree
    denoise: Tree | None


def last_saved(run: Run, stage: str) -> Saved | None:
    """Returns the last checkpoint of a stage or learner, or None if there is none.

    Raises:
      CheckpointError: if it is damaged, or of another model or set of sites.
    """
    folder = folder_of(run.directory, stage)
    if not processes.from_primary(lambda: os.path.isdir(folder)):
        return None
    empty = jax.tree_util.tree_map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(run.setup.abstract))
    params, others = starting(run, stage, empty)
    state, frozen, _ = prepare(run, stage, params, others)
    checkpointer = open_checkpoints(folder, read_only=True)
    try:
        if checkpointer.latest() is None:
            return None
        state, frozen, _ = checkpointer.restore(state, frozen)
    finally:
        checkpointer.close()
    learned = {**frozen, **state.averaged}
    return Saved(
        step=int(state.step),
        steps=stage_of(stage).steps(run.config),
        variables={**state.others, "params": learned["backbone"]},
        denoise=learned.get("denoise"),
    )
