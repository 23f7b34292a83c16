"""Orbax checkpoints, written in the background: all that a stage needs to resume bit for bit."""

import dataclasses
import json
import os
import sys
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from drep_jax.errors import CheckpointError, reason_of
from drep_jax.parallel import processes
from drep_jax.parallel.processes import on_primary, orbax_options
from drep_jax.training.state import TrainState
from drep_jax.trees import check_finite
from drep_jax.typing import Tree

FOLDER = "checkpoints"
OLD_STAGES = {"algorithm1": "denoise"}
"""Names of stages' folders in the first release."""
_STORED_AS = {"key": "rng"}
"""Names in a checkpoint of the state's fields, where they differ."""


def folder_of(workdir: str, stage: str) -> str:
    """Returns the folder of a stage's checkpoints, under its old name if only that is there."""
    folder = os.path.join(workdir, FOLDER, stage)
    old = os.path.join(workdir, FOLDER, OLD_STAGES.get(stage, stage))
    return old if os.path.isdir(old) and not os.path.isdir(folder) else folder


def _to_tree(state: TrainState, frozen: Tree) -> Tree:
    """Returns the tree that is stored: all non-empty fields of the state."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    tree = {"params": {**frozen, **fields.pop("params")}, "others": fields.pop("others")}
    stored = {_STORED_AS.get(name, name): value for name, value in fields.items() if jax.tree_util.tree_leaves(value)}
    return {**tree, **stored}


def abstract(tree: Tree) -> Tree:
    """Returns the shapes and types of a tree, placed on the first local device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree_util.tree_map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype, sharding=here), tree
    )


class Checkpointer:
    """Saves and restores one stage in `directory`, keeping the last two checkpoints.

    Saving refuses parameters that are not finite, and an earlier checkpoint is deleted only when a
    later one is complete. So the last checkpoint is always a good one.
    """

    def __init__(self, directory: str, *, read_only: bool = False) -> None:
        """Opens a stage's folder.

        Args:
          directory: of the stage.
          read_only: whether to change nothing there; if not, unfinished writes of a killed run are
            deleted.

        Raises:
          CheckpointError: if the folder cannot be made.
        """
        self.directory = os.path.abspath(directory)
        self._writing: int | None = None  # step of the write in the background
        self._failed: tuple[int, BaseException] | None = None  # step and error, until raised
        alone = jax.process_count() == 1  # Orbax makes the folder only when one process runs
        keeping: dict[str, Any] = {"max_to_keep": 2, "create": alone, "cleanup_tmp_directories": True}
        try:
            if not read_only:
                os.makedirs(self.directory, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    read_only=read_only, **({} if read_only else keeping), **orbax_options()
                ),
            )
        except OSError as error:
            raise CheckpointError(f"Cannot keep checkpoints in {self.directory}: {error.strerror or error}.") from error

    def save(self, state: TrainState, frozen: Tree, meta: dict[str, Any], *, wait: bool = True) -> None:
        """Writes a checkpoint of one device's copy of the state, which must not change afterwards.

        Args:
          state, frozen: copies, not views of buffers that the next step overwrites.
          meta: JSON values that a resumed stage needs besides.
          wait: whether to wait until it is on disk. If not, an error is raised by the next `save`
            or `wait`.

        Raises:
          NonFiniteError: if a trained parameter is NaN or Inf.
          CheckpointError: if this checkpoint, or the one before, cannot be written.
        """
        self.wait()  # Orbax skips a save while another is in progress
        step = int(state.step)
        if step not in self._manager.all_steps():
            last_good = f"the last good checkpoint (step {self.latest() or 0}) in {self.directory} is kept"
            check_finite(state.params, f"Not saving step {step} ({last_good})")
            tree = jax.tree_util.tree_map(np.asarray, _to_tree(state, frozen))
            meta = json.loads(json.dumps({**meta, "step": step}))  # a copy
            signed = ocp.args.JsonSave({**meta, "checksum": _checksum(meta)})
            args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=signed)
            try:
                self._writing = step
                self._manager.save(step, args=args)
            except (OSError, ValueError) as error:
                self._note_failure(error)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits for the write in the background.

        Raises:
          CheckpointError: if it failed; names its step.
        """
        self._settle()
        if self._failed is not None:
            (step, error), self._failed = self._failed, None
            raise CheckpointError(
                f"Could not write the checkpoint of step {step} to {self.directory}: {reason_of(error)}. Earlier checkpoints "
                f"are untouched (the last is that of step {self._manager.latest_step() or 0}); free some space or make the "
                "place writable, then give the same command again."
            ) from error

    def _settle(self) -> None:
        """Waits for the write in the background; its error is raised by `wait`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # noqa: BLE001 (`wait` raises it)
            self._note_failure(error)
        self._writing = None

    def _note_failure(self, error: Exception) -> None:
        self._failed = (self._writing or 0, error)
        self._manager.reload()  # Orbax had dropped the checkpoint that this one was to replace

    def latest(self) -> int | None:
        """Returns the last step with a complete checkpoint, or None.

        Waits for a write in progress.
        """
        self._settle()
        return self._manager.latest_step()

    def restore(self, state: TrainState, frozen: Tree) -> tuple[TrainState, Tree, dict[str, Any]]:
        """Restores the last checkpoint, from any number of devices, into the given structure.

        Returns:
          The state, the frozen parameters and the metadata saved with them.

        Raises:
          CheckpointError: if it is truncated, or belongs to another model, optimizer or set of
            sites.
        """
        step = self.latest()
        if step is None:
            raise CheckpointError(f"There is no checkpoint in {self.directory}.")
        expected = _to_tree(state, frozen)
        self._check_structure(step, expected)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract(expected)), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
            meta = dict(restored["meta"])
            if meta.pop("checksum", None) not in (None, _checksum(meta)):  # first release: none
                raise ValueError("the checksum of its metadata is wrong")
        except Exception as error:  # Orbax raises many kinds for damaged files
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} is damaged or was written by something else "
                f"({type(error).__name__}: {reason_of(error)}). Delete {os.path.join(self.directory, str(step))} "
                "to go on from an earlier checkpoint, if there is one."
            ) from error
        tree = restored["state"]
        params = {name: tree["params"][name] for name in state.params}
        frozen = {name: tree["params"][name] for name in frozen}
        names = {f.name: _STORED_AS.get(f.name, f.name) for f in dataclasses.fields(state)}
        # Empty fields are not stored.
        fields = {name: tree[stored] for name, stored in names.items() if stored in tree}
        return state.replace(**{**fields, "params": params}), frozen, meta

    def _check_structure(self, step: int, expected: Tree) -> None:
        """Compares names and shapes of the parameters before reading them; the error lists both."""
        folder = os.path.join(self.directory, str(step))
        try:
            saved = self._metadata(step)
        except Exception as error:  # as above
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} is incomplete or no checkpoint of ours "
                f"({type(error).__name__}). Delete {folder} to go on from an earlier checkpoint, if there is one."
            ) from error
        there, here = _leaves(saved["params"]), _leaves(expected["params"])
        if there != here:
            raise CheckpointError(
                f"The checkpoint in {self.directory} belongs to another model or set of sites."
                f"\n  only in the checkpoint: {_some(there - here)}"
                f"\n  only in this run:       {_some(here - there)}"
            )
        if saved.keys() != expected.keys():
            raise CheckpointError(
                f"The checkpoint in {self.directory} was made with other training settings: it holds "
                f"{', '.join(sorted(saved))}, and this run needs {', '.join(sorted(expected))}. Choose another --workdir, "
                "or the settings of that run."
            )

    def _metadata(self, step: int) -> Tree:
        """Returns the shapes and types of a checkpoint's state, as a tree."""
        with ocp.StandardCheckpointer() as reader:
            return reader.metadata(os.path.join(self.directory, str(step), "state")).item_metadata.tree

    def close(self) -> None:
        """Ends Orbax's background work.

        An error not raised before is printed, since another may be on its way up.
        """
        self._settle()
        if self._failed is not None:
            step, error = self._failed
            print(f"The checkpoint of step {step} could not be written: {reason_of(error)}.", file=sys.stderr)
        self._manager.close()


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _leaves(params: Tree) -> set[tuple[str, tuple[int, ...]]]:
    """Returns names and shapes."""
    return {
        ("/".join(str(getattr(key, "key", key)) for key in path), tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _some(leaves: set[tuple[str, tuple[int, ...]]]) -> str:
    shown = [f"{name} {shape}" for name, shape in sorted(leaves)[:6]]
    return (", ".join(shown) or "none") + (f", … ({len(leaves)} in all)" if len(leaves) > 6 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run with several processes
# ---------------------------------------------------------------------------------------------------------------------


class SharedCheckpointer:
    """The `Checkpointer` of process 0.

    Every process restores the same state, even without access to the files.
    """

    def __init__(self, directory: str, **options: Any) -> None:
        self.directory = os.path.abspath(directory)
        self._primary: Any = on_primary(lambda: Checkpointer(directory, **options))

    def latest(self) -> int | None:
        """Returns the last saved step, or None."""
        return processes.from_primary(self._primary.latest)

    def restore(self, state: Any, frozen: Tree) -> tuple[Any, Tree, dict[str, Any]]:
        """Restores the last checkpoint on process 0 and sends it to all.

        See `Checkpointer.restore`.
        """
        form = jax.tree_util.tree_structure((state, frozen))

        def read() -> tuple[list[np.ndarray], dict[str, Any]]:
            *restored, meta = self._primary.restore(state, frozen)
            return [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(tuple(restored))], meta

        leaves, meta = processes.from_primary(read)
        return *jax.tree_util.tree_unflatten(form, leaves), meta

    def __getattr__(self, name: str) -> Any:
        """Everything else is done by process 0 alone."""
        return getattr(self._primary, name)


def open_checkpoints(directory: str, **options: Any) -> Checkpointer:
    """Returns the checkpoints of a stage's directory, shared where a run has several processes."""
    kind: Any = Checkpointer if processes.alone() else SharedCheckpointer
    return kind(directory, **options)
