"""Foreign checkpoints, read into a backbone with every tensor accounted for."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from drep_jax.errors import CheckpointError
from drep_jax.trees import check_finite
from drep_jax.typing import Tree
from drep_jax.weights import files
from drep_jax.weights.channels import check_way, convert, other_channels
from drep_jax.weights.computed import Computed, notes_on, with_computed
from drep_jax.weights.formats.table import read_table
from drep_jax.weights.native import names_of
from drep_jax.weights.positions import CLASS_TOKEN, resize, source_grid
from drep_jax.weights.recognition import ADAPTER, adapters_refused, beside, prefix_hint, recognized
from drep_jax.weights.translation import Account, Format, Piece, account, find_pieces, matches, some


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint that was read.

    Attributes:
      variables: of the backbone.
      source: the file.
      format: its format.
      pieces: where each leaf lies in it.
      notes: how it was read, in sentences for the user.
      state: the requested one of several states in the file.
      computed: the weights that it stores in parts, by the names that `pieces` use.
    """

    variables: Tree
    source: files.ForeignFile
    format: Format
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...]
    state: str | None
    computed: Mapping[str, Computed] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The file's tensors, with computed weights in place of their parts."""
        return with_computed(self.source.tensors, self.computed)

    @property
    def rounds(self) -> bool:
        """Whether the file stores a floating parameter in fewer bits than the backbone."""
        stored, leaves = self.tensors, names_of(self.variables)
        return any(stored[p.theirs].itemsize < leaves[p.ours].itemsize for p in self.pieces if p.theirs in stored)


def load_foreign(
    path: str,
    module: nn.Module,
    like: Tree,
    *,
    format_name: str = "",
    names: str | Format | Sequence[Format] = "",
    state: str | None = None,
    allow: Sequence[str] = (),
    allow_fused: bool = False,
    grid: tuple[int, int] | None = None,
    input_channels: str = "",
    fresh: Callable[[], Tree] | None = None,
) -> Foreign:
    """Reads a foreign checkpoint into the variables of a backbone.

    Args:
      path: of the file.
      module: the backbone.
      like: its variables, arrays or `jax.ShapeDtypeStruct`.
      format_name: of the format; "" recognizes it by the names in the file.
      names: a name table instead of the built-in formats: a format, several, or the path of a file
        that defines them, see `drep_jax.weights.formats.table`.
      state: which of several states in the file to take ("model", "model_ema", …).
      allow: regular expressions over our paths and foreign names; what they match may be missing
        (then it stays as initialized), left over, or of another shape (both).
      allow_fused: whether a file that carries a fusion already is accepted.
      grid: (height, width) of the patches that the file's position embeddings are for; None: that
        of the format or, if their number fits, of the backbone.
      input_channels: how a first convolution of another number of channels is read: "sum", "mean"
        or "repeat" (`drep_jax.weights.channels`); "" refuses it.
      fresh: makes initial variables, for what is allowed to be missing.

    Raises:
      CheckpointError: if the file is damaged, of no known format, already fused, or does not fit;
        all names are listed.
      NonFiniteError: for NaN or Inf.
    """
    source = files.read(path, state=state)
    if source.fused and not allow_fused:
        raise CheckpointError(already_fused(path, source.fused))
    wanted = names_of(like)
    shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
    table = _table(names)
    source, fmt, computed = recognized(source, module, shapes, format_name, table)
    tensors = with_computed(source.tensors, computed)
    _check_refused(fmt, tensors, path)
    pieces = find_pieces(fmt, module, shapes, tensors)
    passed_over = map(re.escape, fmt.passed_over(module, tensors))
    accounted = account(pieces, shapes, tensors, tuple(passed_over))
    accounted, resized = _with_positions(accounted, fmt, module, pieces, shapes, tensors, grid)
    accounted, converted = _with_channels(accounted, pieces, shapes, tensors, input_channels)
    accounted, left_out = _without_others(accounted, tensors, path, allow)
    _check_types(accounted, pieces, wanted, path)
    absent = _check_account(
        accounted,
        fmt,
        path,
        (*allow, *fmt.fresh),
        lambda: prefix_hint(tensors, module, shapes, format_name, table),
        _classes_hint(accounted, pieces, shapes, tensors, getattr(module, "num_classes", 0)),
    )
    read_as = f"{os.path.basename(path)}: {source.kind}, format {fmt.name}"
    notes = [read_as, *source.notes, *notes_on(computed), *resized, *converted, *left_out]
    arrays: dict[str, Any] = dict(accounted.arrays)
    if absent:
        if fresh is None:
            raise CheckpointError(f"{path} lacks {some(absent)}, and there is nothing to fill them with.")
        initial = names_of(fresh())
        arrays.update({name: initial[name] for name in absent})
        notes.extend(_left_as_initialized(absent, fmt))
    if accounted.unexpected:
        notes.append(f"in the file, but not in the model: {some(accounted.unexpected)}")
    leaves = [np.asarray(arrays[name], order="C").astype(leaf.dtype) for name, leaf in wanted.items()]
    variables = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), leaves)
    check_finite(variables, path)
    return Foreign(variables, source, fmt, tuple(pieces), tuple(notes), state, computed)


def _table(names: str | Format | Sequence[Format]) -> tuple[Format, ...]:
    if isinstance(names, str):
        return read_table(names) if names else ()
    return (names,) if isinstance(names, Format) else tuple(names)


def _left_as_initialized(absent: Sequence[str], fmt: Format) -> list[str]:
    """Returns notes on the leaves that the file lacks: what such files never have by the names of its modules."""
    fresh = {name.split("/")[1]: None for name in absent if matches(fmt.fresh, name)}
    others = [name for name in absent if not matches(fmt.fresh, name)]
    notes = [f"not in files of this format, and left as initialized: {', '.join(fresh)}"] if fresh else []
    return [*notes, f"not in the file, and left as initialized: {some(others)}"] if others else notes


def already_fused(path: str, fusion: Any) -> str:
    """Returns the message for weights that carry a fusion."""
    return (
        f"The weights in {path} are already fused ({fusion}); denoising them again would compound. Use the weights they were "
        "fused from."
    )


def _check_refused(fmt: Format, tensors: Mapping[str, np.ndarray], path: str) -> None:
    """Refuses names that only another network has, and numbers where this one can have only zeros."""
    for pattern, reason in fmt.refused:
        seen = [name for name in tensors if matches((pattern,), fmt.canonical(name))]
        if seen:
            raise CheckpointError(f"{path} (format {fmt.name}) holds {some(seen)}: {reason}")
    shifts = [name for name in tensors if matches(fmt.zeros, fmt.canonical(name)) and np.any(tensors[name])]
    if shifts:
        raise CheckpointError(
            f"{path} (format {fmt.name}) holds numbers other than 0 in {some(shifts)}, which this model has no place for: its "
            "shift is held at 0, as in the public training code."
        )


def _with_positions(
    accounted: Account,
    fmt: Format,
    module: nn.Module,
    pieces: Sequence[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray],
    grid: tuple[int, int] | None,
) -> tuple[Account, list[str]]:
    """Resizes position embeddings of another grid; where the grid is unknown, the account says how to give it.

    Returns:
      The account, and notes for the user.

    Raises:
      CheckpointError: if `grid` was given and does not fit the file, or there is nothing that it
        could be of.
    """
    positions = fmt.positions(module) if fmt.positions else None
    piece = next((p for p in pieces if positions and p.ours == positions.leaf and p.theirs in tensors), None)
    if positions is None or piece is None:
        if grid is not None:
            raise CheckpointError(
                f"There are no position embeddings of format {fmt.name} to resize: leave out --config.backbone.init_grid."
            )
        return accounted, []
    tensor = piece.read(tensors[piece.theirs])
    if tensor.shape[::2] != shapes[piece.ours][::2] or tensor.shape[1] <= positions.prefix:
        return accounted, []  # of another width: the account says so
    old = source_grid(positions, tensor.shape, grid)
    if old == positions.grid:
        return accounted, []
    ours = "×".join(map(str, positions.grid))
    shaped = dict(accounted.shaped)
    if old is None:
        shaped[piece.ours] += (
            f", whose patches are {ours}: to resize the positions, give the grid of the file, such as "
            f'--config.backbone.init_grid="(14, 14)" (height, width). {CLASS_TOKEN}'
        )
        return dataclasses.replace(accounted, shaped=shaped), []
    shaped.pop(piece.ours, None)
    arrays = {**accounted.arrays, piece.ours: resize(positions, tensor, old)}
    theirs = "×".join(map(str, old))
    note = f"{piece.theirs} resized from {theirs} to {ours} patches ({positions.interpolation.name})"
    return dataclasses.replace(accounted, arrays=arrays, shaped=shaped), [note]


def _with_channels(
    accounted: Account,
    pieces: Sequence[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray],
    way: str,
) -> tuple[Account, list[str]]:
    """Converts a first convolution of another number of channels; if no way is given, the account says how to."""
    others = [
        piece for piece in pieces if piece.ours in accounted.shaped and _has_other_channels(piece, shapes, tensors)
    ]
    if way:
        check_way(way)
    if len(others) != 1:  # several: another network
        unused = f'init_channels="{way}" was not needed: the first convolution has the number of channels of the model'
        return accounted, [unused] if way and not others else []
    piece, shaped = others[0], dict(accounted.shaped)
    kernel, count = piece.read(tensors[piece.theirs]), shapes[piece.ours][-2]
    if not way:
        shaped[piece.ours] += (
            f": the model expects images of {count} channels, and the file is for {kernel.shape[-2]}. "
            '--config.backbone.init_channels=sum converts it; also "mean" and "repeat" (docs/weights.md)'
        )
        return dataclasses.replace(accounted, shaped=shaped), []
    del shaped[piece.ours]
    arrays = {**accounted.arrays, piece.ours: convert(kernel, count, way)}
    note = f"{piece.theirs} converted from {kernel.shape[-2]} to {count} input channels ({way})"
    return dataclasses.replace(accounted, arrays=arrays, shaped=shaped), [note]


def _has_other_channels(piece: Piece, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]) -> bool:
    try:
        return other_channels(piece.read(tensors[piece.theirs]), shapes[piece.ours])
    except ValueError:
        return False


def _without_others(
    accounted: Account, tensors: Mapping[str, np.ndarray], path: str, allow: Sequence[str]
) -> tuple[Account, list[str]]:
    """Takes what is no part of a network from the tensors left over, and says so; refuses adapters that change it."""
    left = beside(accounted.unexpected, tensors)
    names = {name for group in left.values() for name in group}
    unexpected = tuple(name for name in accounted.unexpected if name not in names)
    adapters = [name for name in unexpected if ADAPTER.fullmatch(name) and not matches(allow, name)]
    if adapters:
        raise CheckpointError(adapters_refused(path, adapters))
    notes = [f"left out, {what}: {some(group)}" for what, group in left.items()]
    return dataclasses.replace(accounted, unexpected=unexpected), notes


def _check_types(accounted: Account, pieces: Sequence[Piece], wanted: Mapping[str, Any], path: str) -> None:
    """Refuses quantized weights: bytes in the place of a floating parameter are numbers only with their scales."""
    bytewise = [
        f"{piece.theirs} ({accounted.arrays[piece.ours].dtype})"
        for piece in pieces
        if piece.ours in accounted.arrays
        and np.issubdtype(wanted[piece.ours].dtype, np.floating)
        and accounted.arrays[piece.ours].dtype in (np.int8, np.uint8, np.bool_, np.complex64, np.complex128)
    ]
    if bytewise:
        raise CheckpointError(
            f"{path} holds quantized or complex numbers where the model has floating-point weights: {some(bytewise, 4)}. "
            "Save the weights dequantized, as float32 or float16."
        )


def _classes_hint(
    accounted: Account,
    pieces: Sequence[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray],
    classes: int,
) -> str:
    """Returns the sentence for a file whose only misfit is the number of classes, with both ways out, or ""."""
    counts, owners = set(), set()
    for piece in pieces:
        if piece.ours not in accounted.shaped:
            continue
        wanted = shapes[piece.ours]
        try:
            stored = piece.read(tensors[piece.theirs]).shape
        except ValueError:
            return ""
        background = wanted[-1] - classes  # an output for none of the classes, or there is none
        if not classes or background not in (0, 1) or len(stored) != len(wanted) or stored[:-1] != wanted[:-1]:
            return ""
        counts.add(stored[-1] - background)
        owners.add(piece.ours.split("/", 1)[1].rpartition("/")[0])
    if len(counts) != 1 or accounted.unexpected:
        return ""
    pattern, (count,) = f".*({'|'.join(sorted(owners))})/.*" if len(owners) > 1 else f".*{owners.pop()}/.*", counts
    return (
        f" The file is for {count} classes and the model for {classes}: --config.model.num_classes={count} "
        f"reads it with its classifier; --config.backbone.init_allow=\"('{pattern}',)\" reads all but the classifier, "
        "which then stays as initialized."
    )


def _check_account(
    accounted: Account, fmt: Format, path: str, allow: Sequence[str], hint: Callable[[], str], classes: str
) -> list[str]:
    """Returns the leaves to be left as initialized, or refuses what does not fit and is not allowed to."""
    missing = {
        ours: name for ours, name in accounted.missing.items() if not (matches(allow, ours) or matches(allow, name))
    }
    unexpected = [name for name in accounted.unexpected if not matches(allow, name)]
    shaped = {
        ours: text for ours, text in accounted.shaped.items() if not (matches(allow, ours) or _named(allow, text))
    }
    if missing or unexpected or shaped:
        raise CheckpointError(
            f"The weights in {path} (format {fmt.name}) do not fit this model.\n"
            f"  missing: {_listed([f'{name} (for {ours})' for ours, name in missing.items()])}\n"
            f"  unexpected: {_listed(unexpected)}\n"
            f"  mis-shaped: {_listed([f'{text} ({ours})' for ours, text in shaped.items()])}\n"
            "Choose the model that the file is of, or allow what may differ with "
            "--config.backbone.init_allow=\"('regular expression',)\"." + (hint() if missing else classes)
        )
    return [*accounted.missing, *accounted.shaped]


def _listed(lines: Sequence[str], most: int = 20) -> str:
    """Returns the first lines below one another, and how many there are in all if there are more."""
    more = [f"… ({len(lines)} in all)"] if len(lines) > most else []
    return "".join(f"\n    {line}" for line in [*lines[:most], *more]) or "none"


def _named(allow: Sequence[str], text: str) -> bool:
    """Returns whether the foreign name that a message about a shape begins with is allowed to differ."""
    return matches(allow, text.split(" ", 1)[0])
