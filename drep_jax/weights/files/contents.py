"""What every kind of foreign file is read as: blocks of bytes and, on them, named strided views (PyTorch's tensors).

Nothing is copied on reading: blocks are slices of the mapped file. Several views may lie on one
block (tied weights), so what a change does to the others is decided here, for all kinds.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np

from drep_jax.errors import CheckpointError

Path = tuple[str, ...]
MARK = "drep_jax"  # under this key, or with it in its name, a file written here says what was fused into it

# A view may repeat numbers (stride 0): such a view costs nothing until it is copied, so it is
# bounded by itself.
MOST_REPEATED = 2**24
MOST_IN_A_DIMENSION = 2**40
MOST_DIMENSIONS = 32


@dataclass(frozen=True)
class Block:
    """A run of bytes of the file; `offset` is where it lies there (None if it was compressed)."""

    data: memoryview
    offset: int | None
    crc: int | None = None  # None: the file holds no checksum for it


@dataclass(frozen=True)
class View:
    """A tensor: `strides` and `offset` count elements of `dtype`, which is stored big-endian if `swapped`."""

    block: str
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    swapped: bool = False

    def on(self, data: memoryview | bytearray) -> np.ndarray:
        """Returns this view of a block's bytes, in the stored byte order (ml_dtypes as unsigned integers if swapped)."""
        dtype = self.dtype
        if self.swapped:
            dtype = (dtype if dtype.kind in "fiubc" else np.dtype(f"u{dtype.itemsize}")).newbyteorder(">")
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)
        size = dtype.itemsize
        return np.ndarray(self.shape, dtype, data, self.offset * size, tuple(step * size for step in self.strides))

    def values(self, data: memoryview | bytearray) -> np.ndarray:
        """Returns the numbers in this machine's byte order; a view of `data` where that is possible."""
        stored = self.on(data)
        if self.swapped:
            return stored.astype(stored.dtype.newbyteorder("=")).view(self.dtype)
        return stored if stored.flags.aligned else stored.copy()

    def put(self, data: bytearray, values: np.ndarray) -> None:
        """Writes numbers of this view's dtype and shape into a block's bytes."""
        stored = self.on(data)
        stored[...] = values.view(stored.dtype.newbyteorder("=")) if self.swapped else values


@dataclass(frozen=True)
class Contents:
    """A file as it was read; `views` are its tensors by path, `others` counts everything else by entry."""

    path: str
    kind: str
    blocks: Mapping[str, Block]
    views: Mapping[Path, View]
    others: Mapping[Path, int] = field(default_factory=dict)
    unnamed: tuple[View, ...] = ()  # tensors inside objects that are not looked into: they must not change either
    mark: str | None = None
    notes: tuple[str, ...] = ()
    inline: frozenset[str] = frozenset()  # blocks that are not written by themselves
    layout: Any = None  # what the module of this kind needs to write the file again
    checked: set[str] = field(default_factory=set, compare=False)

    def data(self, name: str) -> memoryview:
        """Returns a block's bytes, compared with their checksum the first time."""
        block = self.blocks[name]
        if name not in self.checked:
            if block.crc is not None and crc32(block.data) != block.crc:
                raise CheckpointError(f"{self.path} is damaged: the checksum of its block {name} does not fit.")
            self.checked.add(name)
        return block.data

    def array(self, path: Path) -> np.ndarray:
        """Returns a tensor, read-only."""
        view = self.views[path]
        array = view.values(self.data(view.block))
        array.flags.writeable = False
        return array


def full_name(path: Path) -> str:
    """Returns the path as one name, as in "model_ema/module.fc.weight"."""
    return "/".join(path)


def check_view(view: View, nbytes: int, where: str) -> None:
    """Makes sure that a view lies within its block: strided access beyond it would read other memory.

    Raises:
      CheckpointError: if it does not.
    """
    numbers = (*view.shape, *view.strides, view.offset)
    sane = (
        all(type(number) is int and 0 <= number <= MOST_IN_A_DIMENSION for number in numbers)
        and len(view.shape) == len(view.strides) <= MOST_DIMENSIONS
        and math.prod(max(size, 1) for size in view.shape) <= MOST_IN_A_DIMENSION
    )
    if sane:
        room = nbytes // view.dtype.itemsize
        count = math.prod(view.shape)
        last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.strides, strict=True))
        sane = not count or (last < room and count <= max(room, MOST_REPEATED))
    if not sane:
        raise CheckpointError(
            f"{where}: a {view.dtype} tensor of shape {_short(view.shape)}, strides {_short(view.strides)} and offset "
            f"{_short(view.offset)} does not lie within its storage of {nbytes} bytes; the file is damaged or malicious."
        )


def dense_strides(shape: tuple[int, ...], fortran: bool = False) -> tuple[int, ...]:
    """Returns the strides, in elements, of a contiguous array."""
    order = range(len(shape)) if fortran else range(len(shape) - 1, -1, -1)
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two arrays are the same bit for bit (so that NaN equals itself and -0.0 is not 0.0)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = np.dtype(f"u{min(one.dtype.itemsize, 8)}")
    return np.array_equal(np.ascontiguousarray(one).view(bits), np.ascontiguousarray(other).view(bits))


def cast(values: np.ndarray, view: View, name: str, path: str) -> np.ndarray:
    """Returns `values` in the dtype of a stored tensor, C order.

    Raises:
      CheckpointError: if the shape differs, numbers are not of that sort, or finite ones become
        infinite.
    """
    values = np.asarray(values)
    if values.shape != view.shape:
        raise CheckpointError(f'"{name}" has shape {view.shape} in {path}, not {values.shape}.')
    if values.dtype == view.dtype:
        return np.ascontiguousarray(values).reshape(view.shape)
    if not (is_float(values.dtype) and is_float(view.dtype)):
        raise CheckpointError(f'"{name}" is {view.dtype} in {path}; {values.dtype} would not be the same numbers.')
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.ascontiguousarray(values).reshape(view.shape).astype(view.dtype)
    if not np.isfinite(stored[np.isfinite(values)]).all():
        raise CheckpointError(
            f'"{name}" is {view.dtype} in {path}, and some of its new numbers are too large for that (up to '
            f"{np.abs(values[np.isfinite(values)]).max():.3g}). Start from a file with float32 weights."
        )
    return stored


def is_float(dtype: np.dtype) -> bool:
    """Returns whether a dtype is a real floating one, those of ml_dtypes included."""
    return dtype.kind == "f" or "float" in dtype.name


def changed_blocks(contents: Contents, changed: Mapping[Path, np.ndarray]) -> Iterator[tuple[str, bytearray]]:
    """Yields the new bytes of each block that holds a changed tensor, one at a time.

    Raises:
      CheckpointError: if tensors share numbers and the changes to them disagree, or only one of
        them is given.
    """
    wanted: dict[str, list[Path]] = defaultdict(list)
    for path in changed:
        wanted[contents.views[path].block].append(path)
    on_block: dict[str, list[tuple[str, View]]] = defaultdict(list)
    for path, view in contents.views.items():
        if path not in changed:
            on_block[view.block].append((f'"{full_name(path)}"', view))
    for view in contents.unnamed:
        on_block[view.block].append(("a tensor inside an object that is not looked into", view))
    for block, paths in wanted.items():
        old = contents.data(block)
        new = bytearray(old)
        values = {path: cast(changed[path], contents.views[path], full_name(path), contents.path) for path in paths}
        for path in paths:
            contents.views[path].put(new, values[path])
        for path in paths:
            if not same_numbers(contents.views[path].values(new), values[path]):
                names = ", ".join(f'"{full_name(other)}"' for other in paths)
                raise CheckpointError(
                    f"{names} share numbers in {contents.path}, and the changes to them differ. Give the same values for "
                    "each of them."
                )
        for name, view in on_block[block]:
            if not same_numbers(view.values(old), view.values(new)):
                names = ", ".join(f'"{full_name(path)}"' for path in paths)
                raise CheckpointError(
                    f"{name} shares its numbers with {names} in {contents.path}, so it would change too. Change all of "
                    "them, with the same values, or start from a file in which they are separate."
                )
        yield block, new


def _short(numbers: object) -> str:
    text = repr(numbers)
    return text if len(text) <= 80 else text[:77] + "..."
