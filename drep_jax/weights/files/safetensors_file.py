"""safetensors files: eight bytes with the length of a JSON header, the header, and the tensors one after the other."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from drep_jax.errors import CheckpointError
from drep_jax.weights.files.contents import MARK, Block, Contents, Path, View, check_view, dense_strides

LONGEST_HEADER = 100_000_000  # bytes, as in the format's own definition
_METADATA = "__metadata__"
_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }.items()
}


def is_safetensors(start: bytes) -> bool:
    """Returns whether a file that begins so is a safetensors file."""
    return len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= LONGEST_HEADER


def read(path: str, buffer: memoryview) -> Contents:
    """Reads a safetensors file.

    Raises:
      CheckpointError: if it is damaged or incomplete.
    """
    (length,) = struct.unpack_from("<Q", buffer)
    begin = 8 + length
    if begin > len(buffer):
        raise CheckpointError(f"{path} is incomplete: its header needs {begin} bytes and the file has {len(buffer)}.")
    try:
        header = json.loads(bytes(buffer[8:begin]), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is no JSON ({error}).") from error
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is damaged: its metadata are no texts.")
    blocks: dict[str, Block] = {}
    views: dict[Path, View] = {}
    for name, entry in header.items():
        if name == _METADATA:
            continue
        dtype, shape, first, last = _entry(path, name, entry)
        if begin + last > len(buffer):
            raise CheckpointError(
                f'{path} is incomplete: "{name}" ends at byte {begin + last} and the file has {len(buffer)} bytes. Is the '
                "download complete?"
            )
        view = View(name, dtype, shape, dense_strides(shape))
        check_view(view, last - first, path)
        if math.prod(shape) * dtype.itemsize != last - first:
            raise CheckpointError(f'{path} is damaged: "{name}" has {last - first} bytes for shape {shape} of {dtype}.')
        blocks[name] = Block(buffer[begin + first : begin + last], begin + first)
        views[name,] = view
    end = begin
    for block in sorted(blocks.values(), key=lambda block: (block.offset, len(block.data))):
        if block.offset != end:
            raise CheckpointError(f"{path} is damaged: its tensors overlap or leave gaps at byte {end}.")
        end += len(block.data)
    if end != len(buffer):
        raise CheckpointError(f"{path} is damaged: it has {len(buffer)} bytes, and its tensors end at byte {end}.")
    return Contents(path, "safetensors", blocks, views, mark=metadata.get(MARK), layout=(header, begin))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name twice")
    return unique


def _entry(path: str, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [first, last]}:
            if all(type(n) is int and n >= 0 for n in (*shape, first, last)) and first <= last:
                if dtype in _DTYPES:
                    return _DTYPES[dtype], tuple(shape), first, last
                raise CheckpointError(f'{path}: "{name}" has dtype {dtype!r}; known: {", ".join(_DTYPES)}.')
    raise CheckpointError(f'{path} is damaged: "{name}" lacks a dtype, a shape or its place.')


def rewrite(contents: Contents, path: str, blocks: Iterable[tuple[str, bytes | bytearray]], mark: str) -> None:
    """Writes the same file with other bytes in some tensors and the mark in its metadata."""
    header, begin = contents.layout
    marked = {_METADATA: {}, **header} if _METADATA not in header else dict(header)
    marked[_METADATA] = {**marked[_METADATA], MARK: mark}
    with open(path, "wb") as file:
        shift = _write_header(file, marked) - begin
        with open(contents.path, "rb") as source:
            source.seek(begin)
            while piece := source.read(2**24):
                file.write(piece)
        for name, data in blocks:
            offset = contents.blocks[name].offset
            file.seek((offset or 0) + shift)
            file.write(data)


def _write_header(file: Any, header: Mapping[str, Any]) -> int:
    """Writes the header, padded so that tensors begin at a multiple of 8, and returns where it ends."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def create(path: str, tensors: Mapping[str, np.ndarray], mark: str) -> None:
    """Writes a new file; tensors with wide elements come first, so that each is aligned.

    Raises:
      CheckpointError: if the format has no such dtype, or keeps the name for itself.
    """
    kinds = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {_METADATA: {MARK: mark}}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, array in ordered:
        if array.dtype not in kinds or name == _METADATA:
            raise CheckpointError(
                f'"{name}" is {array.dtype}; a .safetensors file can hold {", ".join(map(str, kinds))}.'
            )
        header[name] = {
            "dtype": kinds[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    with open(path, "wb") as file:
        _write_header(file, header)
        for _, array in ordered:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
