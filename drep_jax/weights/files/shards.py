"""Checkpoints in several files: an index (`model.safetensors.index.json`), or names that count (`model-00001-of-00002.bin`).

All shards are read as one file. What is written back is a folder with files of the same names.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence

from drep_jax.errors import CheckpointError
from drep_jax.weights.files.contents import Block, Contents, Path, View, full_name

_COUNTED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
LARGEST_INDEX = 2**26  # bytes
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".th", ".npz", ".ckpt")
CONVERTERS = {
    ".metadata": "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {0} weights.pth",
    "zero_to_fp32.py": "python {0}/zero_to_fp32.py {0} weights.pth",
}
"""{what marks a folder of PyTorch's distributed checkpoints, or DeepSpeed's: the command that makes one file of it}."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of one checkpoint.

    Attributes:
      index: the index, or None.
      paths: of the shards, in order.
      names: {tensor: file name} from the index; empty without one.
    """

    index: str | None
    paths: tuple[str, ...]
    names: Mapping[str, str]


def find_shards(path: str) -> Shards | None:
    """Returns the shards that a path stands for, an index or one of several counted files; None for a file by itself.

    Raises:
      CheckpointError: if the index is damaged, or shards are missing; names them.
    """
    if path.endswith(".json"):
        return _indexed(path)
    folder, name = os.path.split(path)
    match = _COUNTED.fullmatch(name)
    if match is None:
        return None
    index = os.path.join(folder, f"{match[1]}{match[4]}.index.json")
    if os.path.isfile(index):
        shards = _indexed(index)
        if shards is not None and path in shards.paths:
            return shards
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        return None
    names = [f"{match[1]}-{i + 1:05}-of-{match[3]}{match[4]}" for i in range(count)]
    paths = tuple(os.path.join(folder, name) for name in names)
    _check_present(path, paths)
    return Shards(None, paths, {}) if count > 1 else None


def _indexed(path: str) -> Shards | None:
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(LARGEST_INDEX))
    except OSError as error:
        raise CheckpointError(f"Cannot read the weights {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}), so it is no index of shards.") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(
            f'{path} is JSON without a "weight_map", so it is no index of shards. Give the file with the weights.'
        )
    for name in names.values():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.strip("."):
            raise CheckpointError(f"{path} names the shard {str(name)[:80]!r}; expected files in its own folder.")
    paths = tuple(os.path.join(os.path.dirname(path), name) for name in sorted(set(names.values())))
    _check_present(path, paths)
    return Shards(path, paths, names)


def _check_present(path: str, paths: Sequence[str]) -> None:
    missing = [os.path.basename(shard) for shard in paths if not os.path.isfile(shard)]
    if missing:
        listed = ", ".join(missing[:6]) + (f", … ({len(missing)} in all)" if len(missing) > 6 else "")
        raise CheckpointError(
            f"{path} is part of a checkpoint of {len(paths)} files, of which {len(missing)} are missing beside it: {listed}. "
            "Put all of them into one folder."
        )


def merged(shards: Shards, parts: Sequence[Contents]) -> Contents:
    """Returns the contents of several files as those of one.

    Raises:
      CheckpointError: if they are of different kinds, a name is in two of them, or the index names
        what is not there.
    """
    where = shards.index or shards.paths[0]
    if len({part.kind for part in parts}) > 1:
        raise CheckpointError(f"The shards of {where} are of different kinds: {sorted({part.kind for part in parts})}.")
    blocks: dict[str, Block] = {}
    views: dict[Path, View] = {}
    places: dict[Path, int] = {}
    others: dict[Path, int] = {}
    for i, (path, part) in enumerate(zip(shards.paths, parts, strict=True)):
        blocks |= {f"{i}/{name}": block for name, block in part.blocks.items()}
        for entry, count in part.others.items():
            others[entry] = others.get(entry, 0) + count
        for name, view in part.views.items():
            if shards.names and shards.names.get(full_name(name), os.path.basename(path)) != os.path.basename(path):
                continue  # a tied tensor is stored twice, and the index says which one counts
            if name in views:
                raise CheckpointError(
                    f'"{full_name(name)}" is in {shards.paths[places[name]]} and in {path}: they are shards of different '
                    "checkpoints, or the index is missing."
                )
            views[name] = dataclasses.replace(view, block=f"{i}/{view.block}")
            places[name] = i
    lost = [name for name in shards.names if (name,) not in views]
    if lost:
        raise CheckpointError(
            f"{where} names {len(lost)} tensors that its shards do not hold, such as {lost[0]!r}: the files are of different "
            "checkpoints."
        )
    mark = next((part.mark for part in parts if part.mark is not None), None)
    notes = (f"{len(parts)} shards read as one", *(note for part in parts for note in part.notes))
    unnamed = tuple(view for part in parts for view in part.unnamed)
    return Contents(where, parts[0].kind, blocks, views, others, unnamed, mark, notes, layout=places)


def explain_folder(path: str) -> str:
    """Returns what to do with a folder that holds weights of other projects in several files, or ""."""
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return ""
    for mark, command in CONVERTERS.items():
        if mark in names:
            return f"It is a distributed checkpoint; make one file of it: {command.format(path)}"
    files = [name for name in names if name.endswith((".index.json", *WEIGHTS))]
    first = sorted(files, key=lambda name: not name.endswith(".index.json"))[:4]
    return f"Give a file in it: {', '.join(os.path.join(path, name) for name in first)}." if first else ""
