"""PyTorch's checkpoint files, zip (1.6 and later) and legacy, read and written without PyTorch and without running pickles.

zip: NAME/data.pkl (a pickle whose tensors refer to storages), NAME/data/KEY (the storages),
NAME/byteorder.
legacy: five pickles (magic number, protocol, system, the object, the keys of the storages), then
each storage as its number of elements (int64) and its bytes, little-endian.
"""

import os
import shutil
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from drep_jax.errors import CheckpointError
from drep_jax.weights.files import zip_records
from drep_jax.weights.files.contents import MARK, Block, Contents, Path, View, check_view, dense_strides
from drep_jax.weights.files.pickled import DTYPES, STORAGES, Array, Storage, Tensor
from drep_jax.weights.files.unpickler import Unpickled, unpickle

MAGIC_NUMBER = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the end of the pickle that every legacy file begins with
ALIGNMENT = 64
MOST_VALUES = 20_000_000  # numbers and texts that are passed over
MOST_ENTRIES = 300_000  # tensors, dictionaries and lists
DEEPEST = 64
_ENTRIES = (dict, list, tuple, Tensor, Array)
_MARK_RECORD = f"{MARK}.json"
_TRAILER = f"<{MARK}>".encode()  # last bytes of a legacy file with a mark: JSON, its length, this

Blocks = Iterable[tuple[str, bytes | bytearray]]


def root_of(record: str) -> str:
    """Returns "NAME/" if a record is NAME/data.pkl, which only PyTorch's archives have; otherwise ""."""
    match record.split("/"):
        case [root, "data.pkl"]:
            return f"{root}/"
    return ""


def read_zip(path: str, buffer: memoryview) -> Contents:
    """Reads a zip checkpoint.

    Raises:
      CheckpointError: if it is damaged, a TorchScript program, or wants anything that is not data.
    """
    records, _ = zip_records.records(path, buffer)
    root = next(filter(None, map(root_of, records)), "")
    if f"{root}constants.pkl" in records:
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint: save model.state_dict() instead.")

    def small(name: str) -> bytes:
        record = records.get(root + name)
        return bytes(zip_records.stored_bytes(path, buffer, record)) if record else b""

    order = small("byteorder") or b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(f"{path} has byte order {order[:20]!r}; expected little or big.")
    program = zip_records.stored_bytes(path, buffer, records[f"{root}data.pkl"])
    pickled = unpickle(program, 0, path)
    blocks: dict[str, Block] = {}
    for storage in _storages(path, pickled):
        record = records.get(f"{root}data/{storage.key}")
        if record is None:
            raise CheckpointError(f"{path} is damaged: it has no record {root}data/{storage.key}.")
        data = zip_records.stored_bytes(path, buffer, record)
        _check_size(path, storage, len(data))
        blocks[storage.key] = Block(data, record.start, record.info.CRC or None)  # 0: written without checksums
    views, others, unnamed, inline = _views(path, pickled, blocks, order == b"big")
    mark = small(_MARK_RECORD)
    return Contents(
        path,
        "pth (zip)",
        blocks,
        views,
        others,
        unnamed,
        mark.decode("utf-8", "replace") or None,
        notes=_about_arrays(inline),
        inline=inline,
        layout=(root, records),
    )


def is_legacy(start: bytes) -> bool:
    """Returns whether a file that begins so is a legacy checkpoint, in any of the pickle protocols."""
    return start[:1] == b"\x80" and MAGIC_NUMBER in start[:32]


def read_legacy(path: str, buffer: memoryview) -> Contents:
    """Reads a checkpoint of torch.save before PyTorch 1.6.

    Raises:
      CheckpointError: if it is damaged or incomplete, or wants anything that is not data.
    """
    parts: list[Unpickled] = []
    for _ in range(5):
        parts.append(unpickle(buffer, parts[-1].end if parts else 0, path))
    _, protocol, _, pickled, keys = parts
    if protocol.value != 1001 or not isinstance(keys.value, list):
        raise CheckpointError(f"{path} is damaged: its legacy header is not of protocol 1001, or it lists no storages.")
    storages = {storage.key: storage for storage in _storages(path, pickled)}
    blocks: dict[str, Block] = {}
    position = keys.end
    for key in keys.value:
        if not isinstance(key, str) or key not in storages or key in blocks:
            raise CheckpointError(f"{path} is damaged: it lists a storage that nothing uses, or one twice.")
        storage = storages[key]
        size = storage.size * storage.dtype.itemsize
        start = position + 8
        if start + size > len(buffer):
            raise CheckpointError(
                f"{path} is incomplete: storage {key} needs {size} bytes from byte {start} on, and the file has {len(buffer)} "
                "bytes. Is the download complete?"
            )
        if struct.unpack_from("<q", buffer, position)[0] != storage.size:
            raise CheckpointError(f"{path} is damaged: storage {key} does not have {storage.size} elements.")
        blocks[key] = Block(buffer[start : start + size], start)
        position = start + size
    if missing := sorted(storages.keys() - blocks.keys()):
        raise CheckpointError(f"{path} is damaged: it lacks the storages {', '.join(missing[:5])}.")
    views, others, unnamed, inline = _views(path, pickled, blocks, swapped=False)
    mark, end = _legacy_mark(buffer, position)
    return Contents(path, "pth (legacy)", blocks, views, others, unnamed, mark, _about_arrays(inline), inline, end)


def _storages(path: str, pickled: Unpickled) -> list[Storage]:
    """Returns one storage a key; all mentions of a key must mean the same bytes."""
    found: dict[str, Storage] = {}
    for storage in pickled.storages:
        first = found.setdefault(storage.key, storage)
        if first.size * first.dtype.itemsize != storage.size * storage.dtype.itemsize:
            raise CheckpointError(f"{path} is damaged: it gives two sizes for storage {storage.key!r}.")
    return list(found.values())


def _check_size(path: str, storage: Storage, nbytes: int) -> None:
    expected = storage.size * storage.dtype.itemsize
    if nbytes != expected:
        raise CheckpointError(f"{path} is damaged: storage {storage.key} has {nbytes} bytes, expected {expected}.")


def _views(
    path: str, pickled: Unpickled, blocks: dict[str, Block], swapped: bool
) -> tuple[dict[Path, View], dict[Path, int], tuple[View, ...], frozenset[str]]:
    """Returns the tensors by path, how many other leaves each entry has, tensors without a path, and the blocks of arrays."""
    made = {id(tensor): _view(path, tensor, blocks, swapped) for tensor in pickled.tensors}
    views: dict[Path, View] = {}
    others: dict[Path, int] = {}
    named: set[int] = set()
    arrays: dict[Path, Array] = {}
    values = entries = 0
    waiting: list[tuple[Path, Any]] = [((), pickled.value)] if isinstance(pickled.value, _ENTRIES) else []
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, Tensor):
            if where in views:
                raise CheckpointError(f"{path} has two tensors of the name {'/'.join(where)!r}.")
            views[where] = made[id(value)]
            named.add(id(value))
            continue
        if isinstance(value, Array):
            arrays[where] = value
            continue
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        inner = [((*where, _part(key)), value) for key, value in items if isinstance(value, _ENTRIES)]
        # One list may be in many others, or in itself: so what is met is counted, however few bytes
        # it has in the file.
        values, entries = values + len(items), entries + len(inner)
        if values > MOST_VALUES or entries > MOST_ENTRIES or len(where) > DEEPEST:
            raise CheckpointError(
                f"{path} holds more than {MOST_ENTRIES} entries or {MOST_VALUES} values, or nests deeper than {DEEPEST}."
            )
        others[where] = len(items) - len(inner)
        waiting += reversed(inner)
    unnamed = tuple(view for key, view in made.items() if key not in named)
    inline = _add_arrays(path, arrays, blocks, views, others)
    return views, others, unnamed, inline


def _add_arrays(
    path: str, arrays: Mapping[Path, Array], blocks: dict[str, Block], views: dict[Path, View], others: dict[Path, int]
) -> frozenset[str]:
    """Adds NumPy arrays that stand in the place of tensors: beside tensors, or where there are none at all.

    Others are settings and states of random generators, which count as what is no tensor.
    """
    entries = {where[:-1] for where in views}
    inline: dict[int, str] = {}
    for where, array in arrays.items():
        if array.dtype is None or (entries and where[:-1] not in entries) or not where or where in views:
            others[where[:-1]] = others.get(where[:-1], 0) + 1
            continue
        block = inline.setdefault(id(array), f"numpy/{len(inline)}")
        blocks[block] = Block(memoryview(array.data), None)
        strides = dense_strides(array.shape, array.fortran)
        view = View(block, array.dtype, array.shape, strides, swapped=array.swapped and array.dtype.itemsize > 1)
        check_view(view, len(array.data), path)
        views[where] = view
    return frozenset(inline.values())


def _about_arrays(inline: frozenset[str]) -> tuple[str, ...]:
    return (f"{len(inline)} NumPy arrays inside the pickle; fused ones need a new file",) if inline else ()


def _part(key: Any) -> str:
    return key if isinstance(key, str) else f"[{str(key)[:80]}]"


def _view(path: str, tensor: Tensor, blocks: Mapping[str, Block], swapped: bool) -> View:
    storage = tensor.storage
    offset, nbytes = tensor.offset, len(blocks[storage.key].data)
    if storage.seen is not None:  # a storage that was itself a part of another one
        own = View(storage.key, tensor.dtype, (storage.seen,), (1,), storage.start)
        check_view(own, nbytes, path)
        offset += storage.start
        nbytes = (storage.start + storage.seen) * storage.dtype.itemsize
    view = View(storage.key, tensor.dtype, tensor.shape, tensor.strides, offset, swapped and tensor.dtype.itemsize > 1)
    check_view(view, nbytes, path)
    return view


def _legacy_mark(buffer: memoryview, end: int) -> tuple[str | None, int]:
    """Returns the mark after the storages, if there is one, and where the file ends without it."""
    tail = len(_TRAILER) + 8
    if len(buffer) - end < tail or buffer[len(buffer) - len(_TRAILER) :] != _TRAILER:
        return None, len(buffer)
    (size,) = struct.unpack_from("<Q", buffer, len(buffer) - tail)
    start = len(buffer) - tail - size
    if start < end:
        return None, len(buffer)
    return bytes(buffer[start : start + size]).decode("utf-8", "replace"), start


def rewrite_zip(contents: Contents, path: str, blocks: Blocks, mark: str) -> None:
    """Writes the same archive with other bytes in some storages, and the mark as a record NAME/drep_jax.json."""
    root, records = contents.layout
    shutil.copyfile(contents.path, path)
    with open(path, "r+b") as file, zipfile.ZipFile(file, "a") as archive:
        for key, data in blocks:
            zip_records.replace(file, archive, records[f"{root}data/{key}"], data)
        zip_records.drop(archive, [root + _MARK_RECORD])
        archive.writestr(zipfile.ZipInfo(root + _MARK_RECORD), mark)


def rewrite_legacy(contents: Contents, path: str, blocks: Blocks, mark: str) -> None:
    """Writes the same file with other bytes in some storages, and the mark after the last one, where PyTorch stops reading."""
    shutil.copyfile(contents.path, path)
    with open(path, "r+b") as file:
        for key, data in blocks:
            offset = contents.blocks[key].offset
            if offset is None:  # compressed, which a legacy file never is
                raise CheckpointError(f"{contents.path}: storage {key} has no place of its own in the file.")
            file.seek(offset)
            file.write(data)
        file.seek(contents.layout)
        file.truncate()
        text = mark.encode()
        file.write(text + struct.pack("<Q", len(text)) + _TRAILER)


def create(path: str, tensors: Mapping[str, np.ndarray], mark: str) -> None:
    """Writes a new zip checkpoint: an OrderedDict of tensors, each with a storage of its own.

    Raises:
      CheckpointError: if PyTorch has no such dtype.
    """
    storages = {name: storage for storage, name in STORAGES.items() if storage != "UntypedStorage"}
    kinds = {dtype: storages[name] for name, dtype in DTYPES.items() if name in storages}
    for name, array in tensors.items():
        if array.dtype not in kinds:
            raise CheckpointError(f'"{name}" is {array.dtype}; a new .pth can hold {", ".join(map(str, kinds))}.')
    root = os.path.basename(path).partition(".")[0] or "archive"
    program = b"".join(
        [b"\x80\x02", _EMPTY_ORDERED, b"("]
        + [_pickled(name, str(i), array, kinds[array.dtype]) for i, (name, array) in enumerate(tensors.items())]
        + [b"u."]
    )
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, f"{root}/data.pkl", program)
        _add(archive, f"{root}/byteorder", b"little")
        for i, array in enumerate(tensors.values()):
            _add(archive, f"{root}/data/{i}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        _add(archive, f"{root}/version", b"3\n")
        _add(archive, f"{root}/{_MARK_RECORD}", mark.encode())


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds a record whose bytes begin at a multiple of 64, as PyTorch's own do."""
    info = zipfile.ZipInfo(name)
    info.file_size = len(data)
    wide = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile then adds a field of its own
    start = archive.start_dir + zip_records.LOCAL_SIZE + len(name.encode()) + 4 + wide
    info.extra = b"FB" + struct.pack("<H", -start % ALIGNMENT) + b"Z" * (-start % ALIGNMENT)
    with archive.open(info, "w", force_zip64=bool(wide)) as record:
        record.write(data)
    info.extra = b""  # only the local header needs the padding


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_EMPTY_ORDERED = _global("collections", "OrderedDict") + b")R"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def _integers(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


def _pickled(name: str, key: str, array: np.ndarray, storage: str) -> bytes:
    """Returns the opcodes of one name and its tensor, as torch.save would write them but for the memo."""
    reference = (
        b"(" + _text("storage") + _global("torch", storage) + _text(key) + _text("cpu") + _integer(array.size) + b"tQ"
    )
    return (
        _text(name)
        + _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + reference
        + _integer(0)
        + _integers(array.shape)
        + _integers(dense_strides(array.shape))
        + b"\x89"
        + _EMPTY_ORDERED
        + b"tR"
    )
