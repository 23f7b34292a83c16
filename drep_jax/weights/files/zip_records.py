"""Zip archives as the records of a mapped file: where each lies, and replacing the bytes of some in place.

Everything that is not replaced keeps its place, padding included, so that PyTorch can still map the
file.
"""

import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO
from zlib import crc32

from drep_jax.errors import CheckpointError

_LOCAL = struct.Struct("<4s5H3I2H")
LOCAL_SIZE = _LOCAL.size
_DESCRIPTOR = b"PK\x07\x08"
_ERRORS = (
    zipfile.BadZipFile,
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    struct.error,
    LookupError,
)


@dataclass(frozen=True)
class Record:
    """One record: its directory entry and where its bytes begin."""

    info: zipfile.ZipInfo
    start: int


def records(path: str, buffer: memoryview) -> tuple[dict[str, Record], bytes]:
    """Returns {name: record} in the order of the directory, and the archive's comment.

    Raises:
      CheckpointError: if the archive is damaged, or has one name twice.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos, comment, directory = archive.infolist(), archive.comment, archive.start_dir
    except _ERRORS as error:
        raise CheckpointError(
            f"{path} ({len(buffer)} bytes) begins like a zip archive (.pth, .npz) and is incomplete or damaged: {error}. "
            "Is the download complete?"
        ) from error
    by_name: dict[str, Record] = {}
    for info in infos:
        if info.filename in by_name:
            raise CheckpointError(f"{path} holds two records {info.filename!r}: it is damaged or malicious.")
        by_name[info.filename] = Record(info, _start(path, buffer, info, directory))
    return by_name, comment


def _start(path: str, buffer: memoryview, info: zipfile.ZipInfo, directory: int) -> int:
    at = info.header_offset
    start, name = 0, b""
    if 0 <= at <= directory - _LOCAL.size:
        signature, *_, name_length, extra_length = _LOCAL.unpack_from(buffer, at)
        start = at + _LOCAL.size + name_length + extra_length
        name = bytes(buffer[at + _LOCAL.size : at + _LOCAL.size + name_length]) if signature == b"PK\x03\x04" else b""
    if not name or name != _encoded(info) or info.compress_size < 0 or start + info.compress_size > directory:
        raise CheckpointError(
            f"{path} is damaged: its record {info.filename!r} ({info.file_size} bytes) is not where its directory says."
        )
    return start


def _encoded(info: zipfile.ZipInfo) -> bytes:
    try:
        return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    except UnicodeEncodeError:
        return b""


def stored_bytes(path: str, buffer: memoryview, record: Record) -> memoryview:
    """Returns the bytes of an uncompressed record, without copying them.

    Raises:
      CheckpointError: if it is compressed (it could expand without bound) or encrypted.
    """
    info = record.info
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 0x1:
        raise CheckpointError(
            f"{path}: record {info.filename!r} is compressed or encrypted, which PyTorch never does: refused. Unpack the "
            "archive and write it again without compression, or save it again with PyTorch."
        )
    return buffer[record.start : record.start + info.file_size]


def replace(file: BinaryIO, archive: zipfile.ZipFile, record: Record, data: bytes | bytearray) -> None:
    """Overwrites the bytes of an uncompressed record, and its checksum wherever a zip archive keeps it.

    Args:
      file: the archive's own stream, opened for reading and writing.
      archive: the archive on that stream, opened with mode "a"; it writes its directory when it is
        closed.
      record: the record.
      data: as many bytes as it has.
    """
    info = archive.getinfo(record.info.filename)
    checksum = struct.pack("<I", crc32(data))
    file.seek(record.start)
    file.write(data)
    if info.flag_bits & 0x8:  # the checksum follows the data, as PyTorch writes it
        file.seek(record.start + len(data))
        signed = file.read(4) == _DESCRIPTOR
        file.seek(record.start + len(data) + (4 if signed else 0))
    else:
        file.seek(info.header_offset + 14)
    file.write(checksum)
    info.CRC = crc32(data)


def drop(archive: zipfile.ZipFile, names: Iterable[str]) -> None:
    """Removes records from the directory of an archive opened with mode "a", and their bytes if they are the last ones."""
    for name in set(names) & set(archive.namelist()):
        info = archive.NameToInfo.pop(name)
        archive.filelist.remove(info)
        if all(other.header_offset < info.header_offset for other in archive.filelist):
            archive.start_dir = info.header_offset
