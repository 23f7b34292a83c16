"""Checkpoints with Orbax: parameters, optimiser, step, random key and data position of one stage of a run."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from drep_jax.denoise_tree import check_finite
from drep_jax.errors import CheckpointError
from drep_jax.one_process import orbax_options
from drep_jax.training.state import TrainState

Tree = Any


def _to_tree(state: TrainState, frozen: Tree) -> Tree:
    return {
        "params": {**frozen, **state.params},
        "others": state.others,
        "opt_state": state.opt_state,
        "step": state.step,
        "rng": state.key,
        **({"ema": state.ema} if state.ema else {}),
    }


def abstract(tree: Tree) -> Tree:
    """Returns the shapes and types of a tree, placed on the first local device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree_util.tree_map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype, sharding=here), tree
    )


class Checkpointer:
    """Saves and restores one stage below `directory`, keeping the last two checkpoints.

    Saving refuses parameters that are not finite, so the last checkpoint is always a good one.
    """

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        try:
            os.makedirs(self.directory, exist_ok=True)  # Orbax makes it only where no other process has a say
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(max_to_keep=2, create=jax.process_count() == 1, **orbax_options()),
            )
        except OSError as error:
            raise CheckpointError(f"Cannot keep checkpoints in {self.directory}: {error.strerror or error}.") from error

    def save(self, state: TrainState, frozen: Tree, meta: dict[str, Any]) -> None:
        """Writes a checkpoint of the given state (one device's copy); waits until it is on disk.

        Raises:
          NonFiniteError: if a trained parameter is NaN or Inf.
          CheckpointError: if it cannot be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        kept = f"the last good checkpoint (step {self.latest() or 0}) in {self.directory} is kept"
        check_finite(state.params, f"Not saving step {step} ({kept})")
        tree = jax.tree_util.tree_map(np.asarray, _to_tree(state, frozen))
        shapes = _shapes(tree["params"])
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave({**meta, "step": step, "shapes": shapes})
        )
        try:
            self._manager.save(step, args=args)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"Could not write the checkpoint of step {step} to {self.directory}: {error}. "
                "Earlier checkpoints are untouched; free some space or choose another --workdir, then run again."
            ) from error

    def latest(self) -> int | None:
        """Returns the last saved step, or None."""
        return self._manager.latest_step()

    def restore(self, state: TrainState, frozen: Tree) -> tuple[TrainState, Tree, dict[str, Any]]:
        """Restores the last checkpoint into the structure of `state` and `frozen`.

        Returns:
          The state, the frozen parameters and the metadata saved with them.

        Raises:
          CheckpointError: if it is truncated, or belongs to another model, optimiser or set of sites.
        """
        step = self.latest()
        if step is None:
            raise CheckpointError(f"There is no checkpoint in {self.directory}.")
        wanted = _to_tree(state, frozen)
        self._check_structure(step, wanted)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract(wanted)), meta=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax raises many kinds for damaged files; all mean the same to the user
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} is damaged or was written by something else "
                f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}). Delete "
                f"{os.path.join(self.directory, str(step))} to go on from an earlier checkpoint, if there is one."
            ) from error
        tree = found["state"]
        params = {name: tree["params"][name] for name in state.params}
        frozen = {name: tree["params"][name] for name in frozen}
        restored = TrainState(
            step=tree["step"],
            params=params,
            others=tree["others"],
            opt_state=tree["opt_state"],
            key=tree["rng"],
            ema=tree.get("ema", {}),
        )
        return restored, frozen, dict(found["meta"])

    def _check_structure(self, step: int, wanted: Tree) -> None:
        """Compares names and shapes of the parameters before reading them, so that the error can list both sides."""
        folder = os.path.join(self.directory, str(step))
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            found = {(name, tuple(shape)) for name, shape in meta["shapes"].items()}
            with open(os.path.join(folder, "state", "_METADATA"), "rb"):
                pass
        except Exception as error:  # as above
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} is incomplete or no checkpoint of ours "
                f"({type(error).__name__}). Delete {folder} to go on from an earlier checkpoint, if there is one."
            ) from error
        expected = {(name, tuple(shape)) for name, shape in _shapes(wanted["params"]).items()}
        if found != expected:
            raise CheckpointError(
                f"The checkpoint in {self.directory} belongs to another model or set of sites."
                f"\n  only in the checkpoint: {_some(found - expected)}\n  only in this run:       {_some(expected - found)}"
            )

    def close(self) -> None:
        """Ends Orbax's background work."""
        self._manager.close()


def _shapes(params: Tree) -> dict[str, list[int]]:
    return {
        "/".join(str(getattr(key, "key", key)) for key in path): [*leaf.shape]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _some(leaves: set[tuple[str, tuple[int, ...]]]) -> str:
    shown = [f"{name} {shape}" for name, shape in sorted(leaves)[:6]]
    return (", ".join(shown) or "none") + (f", … ({len(leaves)} in all)" if len(leaves) > 6 else "")
