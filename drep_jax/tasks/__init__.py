"""Tasks: what labels and outputs mean, one file a task. Another is a file here, a line in `TASKS`, and its metrics."""

from collections.abc import Callable

from drep_jax.errors import lookup
from drep_jax.tasks.base import Exhibit, Items, StagePlan, Task
from drep_jax.tasks.classification import make_classification
from drep_jax.tasks.retrieval import make_retrieval
from drep_jax.typing import Config

__all__ = ["DEFAULT", "TASKS", "Exhibit", "Items", "StagePlan", "Task", "make_task"]

TASKS: dict[str, Callable[[Config], Task]] = {
    "classification": make_classification,
    "retrieval": make_retrieval,
}

DEFAULT = "classification"
"""The task of configurations that name none, and of dry runs, where labels make no difference."""


def make_task(config: Config) -> Task:
    """Returns the task that a configuration asks for.

    Raises:
      ConfigError: for an unknown task, or settings of it that cannot be.
    """
    return lookup(TASKS, config.get("task", DEFAULT), "task")(config)
