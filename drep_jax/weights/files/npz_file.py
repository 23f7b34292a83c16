"""NumPy's .npz files: a zip archive with one .npy array a member. Arrays of Python objects (pickles) are left alone.

The mark is the archive's comment, which np.load does not look at: a member would show up among the
arrays.
"""

import json
import math
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from drep_jax.errors import CheckpointError
from drep_jax.weights.files import zip_records
from drep_jax.weights.files.contents import MARK, Block, Contents, Path, View, check_view, dense_strides
from drep_jax.weights.files.pickled import NUMPY_DTYPES

_MAGIC = b"\x93NUMPY"
_DTYPES = {**NUMPY_DTYPES, "V2": np.dtype(ml_dtypes.bfloat16)}
LONGEST_COMMENT = 65535
LONGEST_NPY_HEADER = 4096  # names of fields, which no array of numbers has, would make it longer
# Deflate makes at most about a thousand bytes of one; weights make one or two.
MOST_EXPANSION = 100
ALWAYS_FINE = 2**28  # bytes


def read(path: str, buffer: memoryview) -> Contents:
    """Reads an .npz file.

    Raises:
      CheckpointError: if it is damaged, or expands without proportion.
    """
    records, comment = zip_records.records(path, buffer)
    expanded = sum(record.info.file_size for record in records.values())
    if expanded > max(ALWAYS_FINE, MOST_EXPANSION * len(buffer)):
        raise CheckpointError(f"{path} has {len(buffer)} bytes and would expand to {expanded}: refused.")
    blocks: dict[str, Block] = {}
    views: dict[Path, View] = {}
    others = 0
    heads: dict[str, bytes] = {}
    guessed = 0
    for member, record in records.items():
        name = member.removesuffix(".npy")
        data = _unpacked(path, buffer, record)
        head, dtype, shape, fortran = _header(path, member, data) if name != member else (0, None, (), False)
        if dtype is None:
            others += 1
            continue
        numbers = data[head:]
        native = dtype.newbyteorder("=")
        view = View(name, native, shape, dense_strides(shape, fortran), swapped=dtype != native)
        check_view(view, len(numbers), path)
        if math.prod(shape) * dtype.itemsize != len(numbers):
            raise CheckpointError(f'{path} is damaged: "{name}" has {len(numbers)} bytes for shape {shape} of {dtype}.')
        guessed += dtype == ml_dtypes.bfloat16
        blocks[name] = Block(numbers, None)
        heads[member] = bytes(data[:head])
        views[name,] = view
    notes = (f"{guessed} arrays of two-byte voids taken for bfloat16, which NumPy cannot name",) if guessed else ()
    layout = (records, heads, comment)
    return Contents(path, "npz", blocks, views, {(): others}, mark=_mark(comment), notes=notes, layout=layout)


def _unpacked(path: str, buffer: memoryview, record: zip_records.Record) -> memoryview:
    """Returns the bytes of a member, compared with their checksum; a slice of the file unless it was compressed."""
    info = record.info
    packed = buffer[record.start : record.start + info.compress_size]
    if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"{path}: member {info.filename!r} is encrypted or compressed in an unusual way.")
    data = packed
    if info.compress_type == zipfile.ZIP_DEFLATED:
        try:  # one byte more than announced is asked for, never as much as there may be
            data = memoryview(zlib.decompressobj(-15).decompress(packed, info.file_size + 1))
        except zlib.error as error:
            raise CheckpointError(f"{path} is damaged: member {info.filename!r}: {error}.") from error
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise CheckpointError(f"{path} is damaged: the length or checksum of member {info.filename!r} does not fit.")
    return data


def _header(path: str, member: str, data: memoryview) -> tuple[int, np.dtype | None, tuple[int, ...], bool]:
    """Returns the length of a .npy header, dtype (None for what is no plain number), shape and whether columns come first.

    The header is a Python dictionary as text; it is searched, not evaluated.
    """
    start = bytes(data[:12])
    wide = start[6:7] in (b"\x02", b"\x03")
    if len(start) < 12 or start[:6] != _MAGIC or (not wide and start[6:7] != b"\x01"):
        raise CheckpointError(f"{path} is damaged: member {member!r} is no .npy array.")
    length = struct.unpack_from("<I" if wide else "<H", start, 8)[0]
    head = (12 if wide else 10) + length
    text = bytes(data[10 : min(head, LONGEST_NPY_HEADER)]).decode("latin-1")
    dtype = re.search(r"'descr': *'([<>|=]?)([a-zA-Z]\d*)'", text)
    order = re.search(r"'fortran_order': *(True|False)", text)
    shape = re.search(r"'shape': *\(([\d, L]{0,600})\)", text)
    if head > len(data) or order is None or shape is None or "'descr'" not in text:
        raise CheckpointError(f"{path} is damaged: the header of member {member!r} is none of NumPy's.")
    sizes = tuple(int(size) for size in re.findall(r"\d{1,18}", shape[1]))
    if dtype is None or dtype[2] not in _DTYPES:
        return head, None, sizes, False
    kind = _DTYPES[dtype[2]]
    return head, kind.newbyteorder(">") if dtype[1] == ">" else kind, sizes, order[1] == "True"


def _mark(comment: bytes) -> str | None:
    try:
        found = json.loads(comment)
    except (ValueError, RecursionError):
        return None
    return found.get(MARK) if isinstance(found, dict) else None


def rewrite(contents: Contents, path: str, blocks: Iterable[tuple[str, bytes | bytearray]], mark: str) -> None:
    """Writes the same members, in their order and compression, with other numbers in some."""
    records, heads, _ = contents.layout
    changed = dict(blocks)
    with zipfile.ZipFile(contents.path) as source, zipfile.ZipFile(path, "w") as archive:
        for member, record in records.items():
            old = record.info
            info = zipfile.ZipInfo(member, old.date_time)
            info.compress_type, info.external_attr, info.create_system = (
                old.compress_type,
                old.external_attr,
                old.create_system,
            )
            name = member.removesuffix(".npy")
            with archive.open(info, "w", force_zip64=True) as target:
                if name in changed and member in heads:
                    target.write(heads[member])
                    target.write(changed[name])
                else:
                    with source.open(member) as unchanged:
                        shutil.copyfileobj(unchanged, target, 2**20)
        archive.comment = _comment(path, mark)


def create(path: str, tensors: Mapping[str, np.ndarray], mark: str) -> None:
    """Writes a new file.

    Raises:
      CheckpointError: if NumPy has no name for a dtype.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in tensors.items():
            if not array.dtype.isbuiltin or array.dtype.kind not in "fiubc":
                raise CheckpointError(
                    f'"{name}" is {array.dtype}, which an .npz file cannot hold: write .safetensors or .pth instead.'
                )
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
        archive.comment = _comment(path, mark)


def _comment(path: str, mark: str) -> bytes:
    comment = json.dumps({MARK: mark}).encode()
    if len(comment) > LONGEST_COMMENT:
        raise CheckpointError(
            f"What was fused takes {len(comment)} bytes to write down, and {path} has room for {LONGEST_COMMENT}: write "
            ".safetensors or .pth instead."
        )
    return comment
