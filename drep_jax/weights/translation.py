"""Foreign names and layouts as data: one table of rules a format, read in both directions.

A rule says where a leaf of our variable tree lies in a foreign file. Importing looks every leaf up;
exporting puts it back in the same place. Layouts are transposes and reshapes, parts are slices:
nothing is computed, so both ways are exact to the bit.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from drep_jax.errors import CheckpointError
from drep_jax.weights.positions import Positions

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Two exact inverses: `read` makes our array of theirs, `write` theirs of ours."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
DENSE = Layout(lambda a: a.T, lambda a: a.T)
"""PyTorch's (out, in) and Flax's (in, out)."""
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
"""PyTorch's (out, in, height, width) and Flax's (height, width, in, out)."""


def _one_pixel(array: np.ndarray) -> np.ndarray:
    if array.ndim != 4 or array.shape[2:] != (1, 1):
        raise ValueError(f"{array.shape} is no window of one pixel")
    return array[:, :, 0, 0].T


POINTWISE = Layout(_one_pixel, lambda a: a.T[:, :, None, None])
"""PyTorch's convolution by one pixel (out, in, 1, 1), which is a Dense layer (in, out) of ours."""


def reshaped(ours: Sequence[int], theirs: Sequence[int]) -> Layout:
    """Returns the layout between two shapes of the same numbers in the same order; other shapes are refused."""

    def read(array: np.ndarray) -> np.ndarray:
        if array.shape != tuple(theirs):
            raise ValueError(f"{array.shape} is not {tuple(theirs)}")
        return array.reshape(tuple(ours))

    return Layout(read, lambda a: a.reshape(tuple(theirs)))


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Where leaves lie in the foreign file.

    >>> rule = Rule(r"block(\d+)/conv", lambda match: f"features.{int(match[1]) + 1}.0")
    >>> rule.place("block3/conv")
    'features.4.0'

    Attributes:
      ours: regular expression that matches all of a leaf's path without its collection
        ("encoderblock_3/attn/query/kernel"), or of its module's path ("encoderblock_3/attn/query").
        The first rule that matches counts.
      theirs: template for `re.Match.expand`, or a function of the match: the tensor's name if
        `ours` matched the leaf, the module's name otherwise, to which PyTorch's name of the leaf is
        added.
      part: (i, n) if our leaf is the i-th of n equal parts of their tensor.
      axis: of their tensor, along which it has these parts.
      layout: None for the usual one of a kernel with 2 or 4 axes, and no change for all else.
    """

    ours: str
    theirs: str | Callable[[re.Match[str]], str]
    part: tuple[int, int] | None = None
    layout: Layout | None = None
    axis: int = 0

    def place(self, path: str) -> str | None:
        """Returns the foreign name of a path, or None if the rule is not for it."""
        match = re.fullmatch(self.ours, path)
        if match is None:
            return None
        return match.expand(self.theirs) if isinstance(self.theirs, str) else self.theirs(match)


@dataclasses.dataclass(frozen=True)
class Format:
    """How one kind of foreign checkpoint names and lays out the parameters of one family of backbones.

    A table of names of a user's own is such a format, and needs `name` and `rules` only.

    Attributes:
      name: what users call it.
      family: class of the backbones.
      marks: regular expressions; a file is of this format if each matches one of its names.
      rules: the rules, or a function that makes them for a backbone of the family.
      ignored: regular expressions over foreign names that hold nothing trained, such as buffers of
        indices, or nothing of the backbone, such as the projection head of self-supervised
        training.
      suffix: of a new file.
      canonical: foreign name ↦ the name that marks and rules use, where files of one kind name the
        same tensor in several ways; no two names of a file may become one.
      refused: (regular expression over canonical names, reason) of what only another network's
        files have.
      unused: (backbone, the file's canonical names) ↦ regular expressions over the canonical names
        that this backbone does not read; as `ignored`, but depending on the backbone.
      zeros: regular expressions over canonical names that are left out if they hold nothing but
        zeros, as shifts that were never trained; else the file is refused.
      fresh: regular expressions over our paths of what files of the format lack and a new task
        begins with; it stays as initialized, and a note says so.
      positions: of a backbone's position embeddings, so that those of another grid of patches can
        be read.
    """

    name: str
    family: type[nn.Module] = nn.Module
    marks: tuple[str, ...] = ()
    rules: Sequence[Rule] | Callable[[nn.Module], Sequence[Rule]] = ()
    ignored: tuple[str, ...] = ()
    suffix: str = ".pth"
    canonical: Callable[[str], str] = str
    refused: tuple[tuple[str, str], ...] = ()
    positions: Callable[[nn.Module], Positions] | None = None
    unused: Callable[[Any, Collection[str]], tuple[str, ...]] = lambda *_: ()
    zeros: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def rules_of(self, module: nn.Module) -> Sequence[Rule]:
        """Returns the rules for a backbone."""
        return self.rules(module) if callable(self.rules) else self.rules

    def recognizes(self, names: Collection[str]) -> bool:
        """Returns whether names as these are of this format."""
        known = [self.canonical(name) for name in names]
        return all(any(re.fullmatch(mark, name) for name in known) for mark in self.marks)

    def passed_over(self, module: nn.Module, names: Collection[str]) -> set[str]:
        """Returns those of a file's names that a backbone has no need of."""
        patterns = (*self.unused(module, {self.canonical(name) for name in names}), *self.zeros)
        return {n for n in names if matches(self.ignored, n) or matches(patterns, self.canonical(n))}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One leaf of ours (path with its collection) and its place in the foreign file; see `Rule`."""

    ours: str
    theirs: str
    part: tuple[int, int] | None
    layout: Layout
    axis: int = 0

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Returns our array, cut out of their tensor.

        Raises:
          ValueError: if the tensor has not the axes, or not the size, that this asks for.
        """
        if self.part is None:
            return self.layout.read(tensor)
        if tensor.ndim <= self.axis:
            raise ValueError(f"{tensor.shape} has no axis {self.axis}")
        return self.layout.read(np.split(tensor, self.part[1], self.axis)[self.part[0]])


LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
"""PyTorch's names of Flax's leaves."""


def find_pieces(
    fmt: Format, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], names: Iterable[str] = ()
) -> list[Piece]:
    """Returns the place of every leaf.

    Args:
      fmt: the format.
      module: the backbone.
      shapes: {path with collection: shape} of its variables.
      names: of the file's tensors, which may be others than the canonical ones; none for a new
        file.

    Raises:
      CheckpointError: naming the leaves that the format has no place for.
    """
    rules = fmt.rules_of(module)
    actual = {fmt.canonical(name): name for name in names}
    pieces, homeless = [], []
    for path, shape in shapes.items():
        piece = _place(path, len(shape), rules)
        if piece is None:
            homeless.append(path)
        else:
            pieces.append(dataclasses.replace(piece, theirs=actual.get(piece.theirs, piece.theirs)))
    if homeless:
        raise CheckpointError(
            f'Format "{fmt.name}" cannot express these parameters of this {type(module).__name__}: {some(homeless)}. '
            "Choose options of the model that the format's own networks have; in a table of your own, add rules for them."
        )
    return pieces


def _place(path: str, axes: int, rules: Iterable[Rule]) -> Piece | None:
    """Returns where the first rule that matches puts a leaf."""
    leaf = path.split("/", 1)[1]
    owner, _, last = leaf.rpartition("/")
    for rule in rules:
        layout = rule.layout or ({2: DENSE, 4: CONV}.get(axes, SAME) if last == "kernel" else SAME)
        if (name := rule.place(leaf)) is not None:
            return Piece(path, name, rule.part, layout, rule.axis)
        if last in LEAVES and (name := rule.place(owner)) is not None:
            return Piece(path, f"{name}.{LEAVES[last]}", rule.part, layout, rule.axis)
    return None


@dataclasses.dataclass(frozen=True)
class Account:
    """Every tensor accounted for.

    Attributes:
      arrays: {path: array} of the leaves that were found, as stored.
      missing: {path: the foreign name looked for}.
      unexpected: foreign names that no leaf asks for.
      shaped: {path: what is wrong with its shape}.
    """

    arrays: dict[str, np.ndarray]
    missing: dict[str, str]
    unexpected: tuple[str, ...]
    shaped: dict[str, str]


def account(
    pieces: Sequence[Piece], shapes: Mapping[str, tuple[int, ...]], tensors: Arrays, ignored: Iterable[str]
) -> Account:
    """Takes every leaf from the foreign tensors and says what is missing, left over or of another shape."""
    arrays, missing, shaped = {}, {}, {}
    for piece in pieces:
        if piece.theirs not in tensors:
            missing[piece.ours] = piece.theirs
            continue
        tensor = tensors[piece.theirs]
        try:
            array = piece.read(tensor)
        except ValueError:
            array = None
        if array is None or array.shape != tuple(shapes[piece.ours]):
            expected = _expected(piece, shapes[piece.ours])
            shaped[piece.ours] = f"{piece.theirs} is {tuple(tensor.shape)} in the file, {expected} in the model"
        else:
            arrays[piece.ours] = array
    wanted = {piece.theirs for piece in pieces}
    unexpected = (name for name in tensors if name not in wanted and not matches(ignored, name))
    return Account(arrays, missing, tuple(sorted(unexpected)), shaped)


def _expected(piece: Piece, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape that the foreign tensor of a leaf should have."""
    theirs = piece.layout.write(np.broadcast_to(np.float32(0), tuple(shape))).shape
    if piece.part is None:
        return theirs
    return (*theirs[: piece.axis], theirs[piece.axis] * piece.part[1], *theirs[piece.axis + 1 :])


def put_back(pieces: Sequence[Piece], arrays: Arrays, tensors: Arrays | None = None) -> dict[str, np.ndarray]:
    """Returns foreign tensors with our arrays in their places.

    Args:
      pieces: the places of the arrays; others are passed over.
      arrays: {path: array}; all the same dtype within a foreign tensor.
      tensors: the file's own, for what the arrays do not cover; None for a new file, in which they
        must cover all.

    Returns:
      {foreign name: tensor} for each tensor that holds one of the arrays.

    Raises:
      CheckpointError: if two leaves that the file ties to one tensor differ, or a new tensor would
        have gaps.
    """
    by_name: dict[str, dict[tuple[int, int], Piece]] = {}
    for piece in pieces:
        if piece.ours not in arrays:
            continue
        places = by_name.setdefault(piece.theirs, {})
        other = places.setdefault(piece.part or (0, 1), piece)
        if other is not piece and not np.array_equal(arrays[other.ours], arrays[piece.ours]):
            raise CheckpointError(
                f"{other.ours} and {piece.ours} are one tensor in this format ({piece.theirs}), but they differ now, so it "
                "cannot be written. Leave these layers out of the sites."
            )
    return {name: _assemble(name, places, arrays, tensors) for name, places in by_name.items()}


def _assemble(name: str, places: Mapping[tuple[int, int], Piece], arrays: Arrays, tensors: Arrays | None) -> np.ndarray:
    """Returns one foreign tensor."""
    parts = {part: piece.layout.write(np.asarray(arrays[piece.ours])) for part, piece in places.items()}
    count, axis = next(iter(parts))[1], next(iter(places.values())).axis
    if tensors is not None:
        first = next(iter(parts.values()))
        held = tensors[name].astype(first.dtype)
        whole = [held] if count == 1 else np.split(held, count, axis)  # a number by itself has no axis to split
    elif len(parts) == count:
        whole = [np.empty(0)] * count
    else:
        raise CheckpointError(f"Only {len(parts)} of the {count} parts of {name} are there.")
    for (i, _), array in parts.items():
        whole[i] = array
    return np.asarray(whole[0] if count == 1 else np.concatenate(whole, axis), order="C")


def matches(patterns: Iterable[str], name: str) -> bool:
    """Returns whether one of the regular expressions matches all of a name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def some(names: Collection[str], most: int = 6) -> str:
    """Returns the first few names, and how many there are in all if there are more."""
    listed = list(names)
    return ("; ".join(listed[:most]) or "none") + (f"; … ({len(listed)} in all)" if len(listed) > most else "")
