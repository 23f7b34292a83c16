"""Fused backbones as foreign files: the file that was read with some numbers changed, or a new one of a format."""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from drep_jax.errors import CheckpointError
from drep_jax.typing import Tree
from drep_jax.weights import files
from drep_jax.weights.computed import Computed, find_computed, refusal
from drep_jax.weights.foreign import Foreign
from drep_jax.weights.formats import named_format
from drep_jax.weights.native import names_of
from drep_jax.weights.translation import Format, Piece, find_pieces, put_back, some


def write_back(foreign: Foreign, path: str, before: Tree, after: Tree, fusion: Mapping[str, Any]) -> tuple[str, ...]:
    """Writes the foreign file again with the tensors replaced that differ between two variable trees; all else as it was.

    Args:
      foreign: as read.
      path: of the new file; nothing is there under that name until it is complete.
      before: the variables that the file holds.
      after: those to write, float64 or as they are.
      fusion: recorded in the file where it can hold that.

    Returns:
      Foreign names of the tensors that were replaced.

    Raises:
      CheckpointError: if two leaves tied to one tensor differ, or the file written does not read
        back as it should.
    """
    old, new = names_of(before), names_of(after)
    changed = {n: np.asarray(new[n]) for n in new if not np.array_equal(np.asarray(old[n]), np.asarray(new[n]))}
    _check_places(foreign, {name: array.shape for name, array in changed.items()})
    stored, source = foreign.tensors, foreign.source
    replaced = put_back(foreign.pieces, changed, stored)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in replaced.items():
        if name in foreign.computed:
            tensors |= foreign.computed[name].written(name, tensor, source.tensors)
        else:
            tensors[name] = tensor.astype(source.tensors[name].dtype)
    files.write_changed(source, path, tensors, fusion)
    again = files.read_again(source, path)
    for name, tensor in {**source.tensors, **tensors}.items():
        if again[name].dtype != tensor.dtype or again[name].tobytes() != tensor.tobytes():
            raise CheckpointError(f"{path} does not read back as it was written ({name}).")
    _check_computed(foreign, find_computed(path, again), replaced, path)
    return tuple(sorted(tensors))


def _check_computed(
    foreign: Foreign, again: Mapping[str, Computed], replaced: Mapping[str, np.ndarray], path: str
) -> None:
    """Compares the weights that the new file's parts give with those that were to be written."""
    for name in foreign.computed.keys() & replaced.keys():
        value, wanted = (array.astype(np.float64) for array in (again[name].value, replaced[name]))
        unit = float(ml_dtypes.finfo(foreign.computed[name].value.dtype).eps)
        if not np.allclose(value, wanted, rtol=8 * unit, atol=8 * unit * float(np.abs(wanted).max())):
            raise CheckpointError(f"{path}: the parts of {name} do not give the weight that was to be written.")


def fused_name(foreign: Foreign) -> str:
    """Returns what the fused file is called: NAME_fused.SUFFIX, or a folder with shards of the original names."""
    name = os.path.basename(foreign.source.path)
    if foreign.source.shards:
        return os.path.join(f"{re.split(r'-[0-9]{5}-of-|[.]', name)[0]}_fused", name)
    stem, suffix = os.path.splitext(name)
    return f"{stem}_fused{suffix}"


def remarks_on(foreign: Foreign, before: Tree, after: Tree) -> list[str]:
    """Returns what a user should know of a fused file whose weights were stored in parts, as sentences."""
    old, new = names_of(before), names_of(after)
    kinds: dict[str, list[str]] = {}
    for piece in foreign.pieces:
        weight = foreign.computed.get(piece.theirs)
        if (
            weight
            and weight.how.remark
            and not np.array_equal(np.asarray(old[piece.ours]), np.asarray(new[piece.ours]))
        ):
            kinds.setdefault(f"{weight.how.kind}: {weight.how.remark}", []).append(piece.theirs)
    return [f"{text} ({some(dict.fromkeys(names))})." for text, names in kinds.items()]


def check_can_write_back(foreign: Foreign, leaves: Collection[str]) -> None:
    """Refuses a file that some leaves, once changed, cannot be written back into, before anything is computed.

    Args:
      foreign: as read.
      leaves: paths, with their collections, of what will be changed.

    Raises:
      CheckpointError: naming what it is, and the way out.
    """
    changed = set(leaves)
    theirs = {piece.theirs for piece in foreign.pieces if piece.ours in changed}
    computed = {name: foreign.computed[name] for name in sorted(theirs & foreign.computed.keys())}
    for name, weight in computed.items():
        if weight.how.write is None:
            raise CheckpointError(refusal(name, weight.how))
    parts = {part for weight in computed.values() for part in weight.parts.values()}
    files.check_can_rewrite(foreign.source, (theirs - computed.keys()) | parts)
    _check_places(foreign, {n: leaf.shape for n, leaf in names_of(foreign.variables).items() if n in changed})


def _holds(piece: Piece, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> bool:
    try:
        return piece.theirs in tensors and piece.read(tensors[piece.theirs]).shape == shape
    except ValueError:
        return False


def _check_places(foreign: Foreign, changed: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses changes of leaves that the file had no tensor, or one of another shape, for."""
    stored = foreign.tensors
    for piece in foreign.pieces:
        if piece.ours in changed and not _holds(piece, stored, changed[piece.ours]):
            raise CheckpointError(
                f"{piece.ours} was fused, but {foreign.source.path} has no such tensor ({piece.theirs}) of its shape to put it "
                "in. Leave the layer out of the sites with --config.sites.pattern, or write a new file with --export=FORMAT."
            )


def stored_tree(foreign: Foreign, variables: Tree) -> Tree:
    """Returns variables rounded to the types that the file stores them in."""
    stored = foreign.tensors
    dtypes = {p.ours: stored[p.theirs].dtype for p in foreign.pieces if p.theirs in stored}
    leaves = [np.asarray(leaf).astype(dtypes.get(name, leaf.dtype)) for name, leaf in names_of(variables).items()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(variables), leaves)


def write_new(
    module: nn.Module, variables: Tree, format_name: str | Format, path: str, fusion: Mapping[str, Any]
) -> str:
    """Writes a backbone's variables as a new file of a foreign format.

    Args:
      module: the backbone.
      variables: its variables.
      format_name: of the format, or the format itself.
      path: without suffix.
      fusion: recorded in the file where it can hold that.

    Returns:
      The path written, with the format's usual suffix.
    """
    fmt = named_format(module, format_name) if isinstance(format_name, str) else format_name
    arrays = {name: np.asarray(leaf) for name, leaf in names_of(variables).items()}
    pieces = find_pieces(fmt, module, {name: a.shape for name, a in arrays.items()})
    files.create(path + fmt.suffix, put_back(pieces, arrays), fusion)
    return path + fmt.suffix
