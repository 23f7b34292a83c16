"""Checkpoint files of other projects: read as {foreign name: array}, and written again with some numbers changed.

No part of a file is ever executed, and PyTorch is not needed. One module per container: `torch_file`
(.pth, zip and legacy), `safetensors_file`, `npz_file`, `darknet_file` (.weights with its .cfg). The
meaning of the names is decided in `formats`.
"""

import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from drep_jax.errors import CheckpointError, did_you_mean
from drep_jax.files import replacing, temporary_of
from drep_jax.weights.files import darknet_file, naming, npz_file, safetensors_file, shards, torch_file, zip_records
from drep_jax.weights.files.contents import (
    Contents,
    Path,
    cast,
    changed_blocks,
    full_name,
    is_float,
    same_numbers,
)
from drep_jax.weights.files.shards import Shards, find_shards

Rewrite = Callable[[Contents, str, Iterable[tuple[str, bytes | bytearray]], str], None]

REWRITE: dict[str, Rewrite] = {
    "safetensors": safetensors_file.rewrite,
    "pth (zip)": torch_file.rewrite_zip,
    "pth (legacy)": torch_file.rewrite_legacy,
    "npz": npz_file.rewrite,
    "darknet": darknet_file.rewrite,
}
CREATE: dict[str, Callable[[str, Mapping[str, np.ndarray], str], None]] = {
    ".safetensors": safetensors_file.create,
    ".npz": npz_file.create,
} | dict.fromkeys((".pth", ".pt", ".bin", ".th"), torch_file.create)


@dataclass(frozen=True)
class ForeignFile:
    """A checkpoint of another project.

    Attributes:
      path: where it lies.
      kind: "safetensors", "pth (zip)", "pth (legacy)", "npz" or "darknet".
      tensors: {name without wrappers and prefixes: array in the stored dtype}; read-only, and parts
        of the mapped file where possible, so the file must stay as it is while they are used.
      stored: {name in `tensors`: full name in the file}, entries of wrappers first, with "/"
        between.
      notes: what was recognized, as sentences.
      fused: what an earlier export marked the file with, or None.
      own: {name in `tensors`: its name in its entry of the file}.
      fixed: names of `tensors` whose numbers cannot be replaced where they lie.
      shards: the files, if there are several.
    """

    path: str
    kind: str
    tensors: dict[str, np.ndarray]
    stored: dict[str, str]
    notes: tuple[str, ...]
    fused: Any
    own: Mapping[str, str] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    shards: Shards | None = None


def read(path: str, *, state: str | None = None) -> ForeignFile:
    """Reads a checkpoint; its first bytes say of which kind it is.

    Args:
      path: a .pth of PyTorch (zip or legacy), .safetensors or .npz file.
      state: which entry of a wrapper ("model", "state_dict_ema", "teacher", …) or which prefix of
        the names to take; None: averaged weights (EMA, teacher) if there are any, else the usual
        names.

    Returns:
      Its tensors by name, and what was recognized.

    Raises:
      CheckpointError: if it is absent, of another kind, damaged, or asks for anything but data; or
        if `state` is not there.
    """
    sharded = find_shards(path)
    contents = shards.merged(sharded, [*map(_contents, sharded.paths)]) if sharded else _contents(path)
    names, notes = naming.find_state(path, contents.views, state)
    tensors = {name: contents.array(where) for name, where in names.items()}
    return ForeignFile(
        path=contents.path,
        kind=contents.kind,
        tensors=tensors,
        stored={name: full_name(where) for name, where in names.items()},
        notes=(*notes, *contents.notes, *_others(contents, names.values()), _dtypes(tensors)),
        fused=_fused(contents),
        own={name: where[-1] for name, where in names.items()},
        fixed=frozenset(name for name, where in names.items() if contents.views[where].block in contents.inline),
        shards=sharded,
    )


def other_namings(source: ForeignFile) -> Iterator[ForeignFile]:
    """Yields the same file with its tensors named in other ways, for networks of unusual names."""
    for names, note in naming.other_namings(source.own):
        yield replace(
            source,
            tensors={new: source.tensors[old] for new, old in names.items()},
            stored={new: source.stored[old] for new, old in names.items()},
            own={new: source.own[old] for new, old in names.items()},
            fixed=frozenset(new for new, old in names.items() if old in source.fixed),
            notes=(note, *(other for other in source.notes if not re.match(r"prefix |wrapper ", other))),
        )


def read_again(source: ForeignFile, path: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that `write_changed` made of another one, by the names that they have there.

    Raises:
      CheckpointError: if it is damaged, or lacks one of them.
    """
    sharded = find_shards(path) if source.shards else None
    contents = shards.merged(sharded, [*map(_contents, sharded.paths)]) if sharded else _contents(path)
    paths = {full_name(where): where for where in contents.views}
    if lost := [full for full in source.stored.values() if full not in paths]:
        raise CheckpointError(f"{path} does not read back as it was written ({lost[0]}).")
    return {name: contents.array(paths[full]) for name, full in source.stored.items()}


def check_can_rewrite(source: ForeignFile, names: Collection[str]) -> None:
    """Refuses to change tensors whose numbers are part of the file's structure.

    Raises:
      CheckpointError: naming some, and the way out.
    """
    if fixed := sorted(source.fixed & set(names)):
        raise CheckpointError(
            f"{source.path} holds NumPy arrays inside its pickle ({fixed[0]}), whose numbers cannot be replaced in place. "
            "Write a new file with --export=FORMAT (docs/weights.md), or save torch.from_numpy(array) and start again."
        )


def write_changed(source: ForeignFile, path: str, changed: Mapping[str, np.ndarray], mark: Mapping[str, Any]) -> None:
    """Writes the file again with other numbers in some tensors; all else stays as it was, byte for byte where it can.

    The mark goes where the kind's own readers do not look: a record NAME/drep_jax.json (.pth, zip),
    behind the last storage (.pth, legacy), the metadata (.safetensors), the archive's comment
    (.npz). An earlier mark is replaced.

    Args:
      source: the file as `read` gave it.
      path: the new file, of the same kind. It appears when it is complete and has been read back.
      changed: {name in `source.tensors`: array}, of the stored shape; any float dtype is cast to
        the stored one.
      mark: what `read` will give back as `fused`, as JSON.

    Raises:
      CheckpointError: for an unknown name, another shape, numbers that do not fit the dtype,
        tensors that share numbers of which only some are changed, or a path that cannot be written.
    """
    for name in changed:
        if name not in source.tensors:
            raise CheckpointError(f'{source.path} has no tensor "{name}".{did_you_mean(name, source.tensors)}')
    check_can_rewrite(source, changed)
    if source.shards:
        _write_shards(source, source.shards, path, changed, mark)
        return
    temporary = temporary_of(path)
    for target in (path, temporary):
        if os.path.realpath(target) == os.path.realpath(source.path) or (
            os.path.exists(target) and os.path.samefile(target, source.path)
        ):
            raise CheckpointError(f"Not writing {path} over the file that it is made from; choose another name.")
    if _kind_of_suffix(path) not in (None, source.kind.partition(" ")[0]):
        raise CheckpointError(f"{path} would be a {source.kind} file like {source.path}: give it that one's suffix.")
    contents = _contents(source.path)
    paths = {full_name(where): where for where in contents.views}
    lost = [full for full in source.stored.values() if full not in paths]
    if lost or contents.kind != source.kind:
        raise CheckpointError(f"{source.path} has changed since it was read: read it again.")
    by_path = {paths[source.stored[name]]: np.asarray(value) for name, value in changed.items()}
    unchanged = {paths[source.stored[name]]: array for name, array in source.tensors.items() if name not in changed}
    text = json.dumps({"fused": mark})
    rewrite = REWRITE[contents.kind]

    def verify(written: Contents) -> None:
        if written.views.keys() != contents.views.keys() or written.mark != text:
            raise CheckpointError(f"{temporary} did not come back as it was written.")
        for where, view in contents.views.items():
            if where in by_path:
                wanted = cast(by_path[where], view, full_name(where), source.path)
            else:
                wanted = unchanged[where] if where in unchanged else contents.array(where)
            if not same_numbers(written.array(where), wanted):
                raise CheckpointError(f'"{full_name(where)}" in {temporary} did not come back as it was written.')

    _publish(path, lambda place: rewrite(contents, place, changed_blocks(contents, by_path), text), verify)


def _write_shards(
    source: ForeignFile, sharded: Shards, path: str, changed: Mapping[str, np.ndarray], mark: Mapping[str, Any]
) -> None:
    """Writes every shard again under its own name in the folder of `path`, and the index last."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}.") from error
    for shard in sharded.paths:
        part = _shard(source, sharded, shard)
        kept = {name: array for name, array in changed.items() if name in part.tensors}
        write_changed(part, os.path.join(folder, os.path.basename(shard)), kept, mark)
    if sharded.index:
        try:
            with replacing(path) as temporary:
                shutil.copyfile(sharded.index, temporary)
        except OSError as error:
            raise CheckpointError(f"Cannot write {path}: {error.strerror or error}.") from error


def _shard(source: ForeignFile, sharded: Shards, shard: str) -> ForeignFile:
    """Returns one shard by itself, with the names that the whole has."""
    names = {full_name(where) for where in _contents(shard).views}
    name_of_file = os.path.basename(shard)
    stored = {
        name: full
        for name, full in source.stored.items()
        if full in names and sharded.names.get(full, name_of_file) == name_of_file
    }
    return replace(
        source, path=shard, tensors={name: source.tensors[name] for name in stored}, stored=stored, shards=None
    )


def create(path: str, tensors: Mapping[str, np.ndarray], mark: Mapping[str, Any]) -> None:
    """Writes a new file; its suffix says the kind: .safetensors, .npz, or .pth, .pt, .bin, .th (PyTorch's zip).

    Args:
      path: the new file. It appears when it is complete and has been read back.
      tensors: {name: array}; each gets memory of its own.
      mark: what `read` will give back as `fused`, as JSON.

    Raises:
      CheckpointError: for a suffix or dtype that is not known, or a path that cannot be written.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in CREATE:
        raise CheckpointError(f"{path}: the suffix of a new file must be one of {', '.join(CREATE)}.")
    if not tensors:
        raise CheckpointError(f"Not writing {path}: there are no tensors.")
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    text = json.dumps({"fused": mark})

    def verify(written: Contents) -> None:
        stored = {full_name(where): written.array(where) for where in written.views}
        if stored.keys() != arrays.keys() or not all(
            same_numbers(stored[name], array) for name, array in arrays.items()
        ):
            raise CheckpointError(f"{temporary_of(path)} did not come back as it was written.")

    _publish(path, lambda place: CREATE[suffix](place, arrays, text), verify)


def _publish(path: str, write: Callable[[str], None], verify: Callable[[Contents], None]) -> None:
    """Writes to a temporary path, reads that back, and gives it its name; what fails leaves nothing behind."""
    try:
        with replacing(path) as temporary:
            write(temporary)
            verify(_contents(temporary))
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}.") from error


def _contents(path: str) -> Contents:
    """Maps a file and reads its directory, whichever kind it is."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    except OSError as error:
        raise CheckpointError(f"Cannot read the weights {path}: {error.strerror}.") from error
    start = bytes(buffer[:512])
    if start.startswith(b"PK\x03\x04"):
        records, _ = zip_records.records(path, buffer)
        if any(map(torch_file.root_of, records)):
            return torch_file.read_zip(path, buffer)
        if any(name.endswith(".npy") for name in records):
            return npz_file.read(path, buffer)
        raise _unknown(path, "a zip archive without data.pkl or .npy members")
    if torch_file.is_legacy(start):
        return torch_file.read_legacy(path, buffer)
    if safetensors_file.is_safetensors(start):
        return safetensors_file.read(path, buffer)
    if darknet_file.is_darknet(path):
        return darknet_file.read(path, buffer)
    raise _unknown(path, _guess(start))


def _guess(start: bytes) -> str:
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file: run `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "a web page: the download went wrong"
    if start[257:262] == b"ustar":
        return "a tar archive, as PyTorch before 0.1.10 wrote: load it there and save it again"
    if start.lstrip()[:1] == b"{":
        return "JSON text: settings, or an index of shards without the name NAME.index.json"
    if start.startswith(b"\x93NUMPY"):
        return "a single .npy array, without names"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file"
    if start[:1] == b"\x80":
        return "a plain pickle, which is not PyTorch's format"
    return f"something that begins with {start[:8]!r}"


def _unknown(path: str, guess: str) -> CheckpointError:
    return CheckpointError(f"{path} is {guess}. Known kinds: {', '.join(REWRITE)}.")


def _kind_of_suffix(path: str) -> str | None:
    suffix = os.path.splitext(path)[1].lower()
    return {".safetensors": "safetensors", ".npz": "npz", ".weights": "darknet"}.get(
        suffix, "pth" if suffix in CREATE else None
    )


def _others(contents: Contents, chosen: Iterable[Path]) -> list[str]:
    count = sum(contents.others.get(entry, 0) for entry in {where[:-1] for where in chosen})
    return [f"{count} entries that are no tensors ignored"] if count else []


def _dtypes(tensors: Mapping[str, np.ndarray]) -> str:
    counts: dict[str, int] = {}
    for array in tensors.values():
        if is_float(array.dtype):
            counts[array.dtype.name] = counts.get(array.dtype.name, 0) + array.size
    if len(counts) < 2:
        return f"{next(iter(counts), 'no floating-point')} weights"
    return "weights of " + ", ".join(f"{name} ({count} numbers)" for name, count in sorted(counts.items()))


def _fused(contents: Contents) -> Any:
    if contents.mark is None:
        return None
    try:
        content = json.loads(contents.mark)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{contents.path} has a mark of this project that is no JSON: it is damaged.")
    return content.get("fused")
