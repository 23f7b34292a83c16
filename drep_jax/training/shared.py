"""The files of a run as every process sees them: process 0 reads and writes, and tells the others what they need to know."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from drep_jax.training import distributed
from drep_jax.training.checkpoint import Checkpointer

Tree = Any


class SharedCheckpointer:
    """A `Checkpointer` of process 0; restoring gives every process the same state, wherever the files are."""

    def __init__(self, directory: str, **options: Any) -> None:
        self.directory = os.path.abspath(directory)
        self._own: Any = on_primary(lambda: Checkpointer(directory, **options))

    def latest(self) -> int | None:
        """Returns the last saved step, or None."""
        return distributed.from_primary(self._own.latest)

    def restore(self, state: Any, frozen: Tree) -> tuple[Any, Tree, dict[str, Any]]:
        """Restores the last checkpoint on process 0 and hands it to all."""
        form = jax.tree_util.tree_structure((state, frozen))

        def read() -> tuple[list[np.ndarray], dict[str, Any]]:
            *found, meta = self._own.restore(state, frozen)
            return [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(tuple(found))], meta

        leaves, meta = distributed.from_primary(read)
        return *jax.tree_util.tree_unflatten(form, leaves), meta

    def __getattr__(self, name: str) -> Any:
        """Whatever else is done with checkpoints, process 0 alone does."""
        return getattr(self._own, name)


def open_checkpoints(directory: str, **options: Any) -> Checkpointer:
    """Returns the `Checkpointer` of a stage's directory, or among several processes what acts as one on all of them."""
    kind: Any = Checkpointer if distributed.alone() else SharedCheckpointer
    return kind(directory, **options)


def on_primary(make: Callable[[], Any]) -> Any:
    """Returns `make()` on process 0, and elsewhere something that does nothing whatever is called."""
    return make() if distributed.primary() else _Nothing()


class _Nothing:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None
