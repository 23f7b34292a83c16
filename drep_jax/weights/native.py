"""Our own weight files: safetensors and Orbax, written whole or not at all, read against a known tree.

Names are the paths of the variable tree, collection first, as in
"params/encoderblock_0/mlp/fc1/kernel". Both forms carry what was fused into them, so that fused
weights are never fused again by mistake.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.flax

from drep_jax.errors import CheckpointError, reason_of
from drep_jax.files import replacing
from drep_jax.parallel.processes import orbax_options
from drep_jax.trees import check_finite
from drep_jax.typing import Tree
from drep_jax.weights.files.shards import explain_folder
from drep_jax.weights.translation import some

MARK = "drep_jax"
ORBAX_MARK = "drep_jax.json"
COLLECTIONS = ("params", "batch_stats")


def names_of(tree: Tree) -> dict[str, Any]:
    """Returns {path: leaf} with "/" between the parts of a path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def digest(tree: Tree) -> str:
    """Returns a hash of all names and numbers of a tree."""
    total = hashlib.sha256()
    for name, leaf in sorted(names_of(tree).items()):
        total.update(name.encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def save_safetensors(path: str, variables: Tree, fusion: Mapping[str, Any] | None = None) -> None:
    """Writes the variables of a backbone; `fusion` says what was fused into them.

    Raises:
      NonFiniteError: for NaN or Inf.
      CheckpointError: if the file cannot be written.
    """
    check_finite(variables, f"Not writing {path}")
    # In C order, because safetensors writes the memory of an array as it lies.
    tensors: Any = {name: np.asarray(leaf, order="C") for name, leaf in names_of(variables).items()}
    try:
        with replacing(path) as temporary:
            safetensors.flax.save_file(tensors, temporary, metadata={MARK: json.dumps({"fused": fusion})})
    except (OSError, safetensors.SafetensorError) as error:
        raise _not_written(path, error) from error


def save_orbax(directory: str, variables: Tree, fusion: Mapping[str, Any] | None = None) -> None:
    """Writes the variables of a backbone as an Orbax checkpoint, replacing an earlier one only when it is complete.

    Raises:
      NonFiniteError: for NaN or Inf.
      CheckpointError: if it cannot be written.
    """
    check_finite(variables, f"Not writing {directory}")
    directory = os.path.abspath(directory)
    try:
        with replacing(directory, directory=True) as temporary:
            with ocp.StandardCheckpointer(**orbax_options()) as checkpointer:
                checkpointer.save(temporary, jax.tree_util.tree_map(np.asarray, dict(variables)))
            with open(os.path.join(temporary, ORBAX_MARK), "w", encoding="utf-8") as file:
                json.dump({"fused": fusion}, file)
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        raise _not_written(directory, error) from error


def _not_written(path: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Cannot write weights to {path}: {reason_of(error)}. Nothing else is lost; free some space or make the place "
        "writable, then give the same command again."
    )


def load(path: str, like: Tree, *, allow_fused: bool = False) -> Tree:
    """Reads a backbone's variables from a safetensors file or an Orbax directory.

    Args:
      path: file or directory.
      like: variables of the same structure, arrays or `jax.ShapeDtypeStruct`.
      allow_fused: whether weights that carry a fusion already are accepted.

    Returns:
      The variables, in the structure and types of `like`.

    Raises:
      CheckpointError: if it is absent, damaged or already fused, or if names or shapes differ; both
        lists are shown.
      NonFiniteError: for NaN or Inf.
    """
    if os.path.isdir(path):
        tensors, fused = _read_orbax(path, like)
    elif os.path.isfile(path):
        tensors, fused = _read_safetensors(path)
    else:
        raise CheckpointError(f"There are no weights at {path}; expected a .safetensors file or an Orbax directory.")
    if fused and not allow_fused:
        raise CheckpointError(
            f"The weights in {path} are already fused ({fused}); denoising them again would compound. Use the weights they "
            "were fused from."
        )
    wanted = names_of(like)
    shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    shaped = [
        f"{n}: {tuple(tensors[n].shape)} in the file, {shapes[n]} in the model"
        for n in sorted(shapes.keys() & tensors.keys())
        if tuple(tensors[n].shape) != shapes[n]
    ]
    if missing or unexpected or shaped:
        raise CheckpointError(
            f"The weights in {path} do not fit this model.\n  missing:    {some(missing)}\n"
            f"  unexpected: {some(unexpected)}\n  mis-shaped: {some(shaped)}"
        )
    leaves = [np.asarray(tensors[name]).astype(leaf.dtype) for name, leaf in wanted.items()]
    variables = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), leaves)
    check_finite(variables, path)
    return variables


def _read_safetensors(path: str) -> tuple[dict[str, Any], Any]:
    try:
        with safetensors.safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no complete safetensors file: {error}.") from error
    return tensors, json.loads(metadata.get(MARK, "{}")).get("fused")


def _read_orbax(path: str, like: Tree) -> tuple[dict[str, Any], Any]:
    del like  # names and shapes are compared by the caller, which can list both sides
    _check_marked(path)
    try:
        with open(os.path.join(path, ORBAX_MARK), encoding="utf-8") as file:
            fused = json.load(file).get("fused")
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(os.path.abspath(path))
    except Exception as error:
        raise CheckpointError(
            f"The Orbax checkpoint {path} is damaged: {(str(error).splitlines() or [''])[0][:200]}"
        ) from error
    return names_of(tree), fused


def _check_marked(path: str) -> None:
    if not os.path.isfile(os.path.join(path, ORBAX_MARK)):
        raise CheckpointError(
            f"{path} holds no {ORBAX_MARK}: it is no weights directory written by this project. {explain_folder(path)}".strip()
        )


def is_native(path: str) -> bool:
    """Returns whether weights at a path are this project's own: an Orbax directory, or a safetensors file with our names.

    Raises:
      CheckpointError: if there is nothing at the path, or a directory of something else.
    """
    if os.path.isdir(path):
        _check_marked(path)
        return True
    if not os.path.isfile(path):
        raise CheckpointError(f"There are no weights at {path}; expected a file, or an Orbax directory.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return all(name.split("/", 1)[0] in COLLECTIONS and "/" in name for name in file.keys())  # noqa: SIM118
    except (safetensors.SafetensorError, OSError):
        return False
