"""Tasks, the meaning of labels and outputs: one file and one line in `TASKS` each."""

from collections.abc import Callable

from drep_jax.errors import lookup
from drep_jax.tasks.base import Exhibit, Items, StagePlan, Task
from drep_jax.tasks.classification import make_classification
from drep_jax.tasks.detection import make_detection
from drep_jax.tasks.retrieval import make_retrieval
from drep_jax.tasks.segmentation import make_segmentation
from drep_jax.typing import Config

__all__ = ["DEFAULT", "TASKS", "Exhibit", "Items", "StagePlan", "Task", "make_task"]

TASKS: dict[str, Callable[[Config], Task]] = {
    "classification": make_classification,
    "retrieval": make_retrieval,
    "segmentation": make_segmentation,
    "detection": make_detection,
}

DEFAULT = "classification"
"""The task of configurations without one, and of dry runs, which use no labels."""


def make_task(config: Config) -> Task:
    """Returns the task of a configuration.

    Raises:
      ConfigError: for an unknown task, or invalid settings of it.
    """
    return lookup(TASKS, config.get("task", DEFAULT), "task")(config)
