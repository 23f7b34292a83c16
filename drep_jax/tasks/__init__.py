"""Tasks: what a backbone's outputs and a label mean. Another one is a file here and a line in `TASKS`."""

from collections.abc import Callable, Mapping
from typing import Any

from drep_jax.errors import lookup
from drep_jax.tasks.classification import Classification
from drep_jax.tasks.retrieval import Retrieval, make_retrieval

__all__ = ["TASKS", "Classification", "Retrieval", "Task", "make_task"]

Task = Classification | Retrieval

TASKS: dict[str, Callable[[Mapping[str, Any]], Task]] = {
    "classification": lambda config: Classification(),
    "retrieval": make_retrieval,
}


def make_task(config: Mapping[str, Any]) -> Task:
    """Returns the task that a configuration asks for.

    Raises:
      ConfigError: for an unknown task, or settings of it that cannot be.
    """
    return lookup(TASKS, config.get("task", "classification"), "task")(config)
