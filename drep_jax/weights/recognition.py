"""Which format a file is of, by its names as they are understood best, and what to say where none fits."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import flax.linen as nn

from drep_jax.errors import CheckpointError
from drep_jax.weights import files
from drep_jax.weights.computed import Computed, find_computed, with_computed
from drep_jax.weights.files.naming import BOOKKEEPING, prefixes_of
from drep_jax.weights.formats import find_format, formats_for
from drep_jax.weights.translation import Arrays, Format, find_pieces, some

Shapes = Mapping[str, tuple[int, ...]]

ADAPTER = re.compile(r"(.*[._])?(lora_[\w.]+|hada_\w+|lokr_\w+|ia3_l|oft_[rs]|vera_lambda_\w+)(\..*)?")
"""Names of adapters beside weights, as PEFT and loralib write them."""

_FLATTENED = re.compile(r"(.*\.)?_?flat_param(_\d+)?")


def recognized(
    source: files.ForeignFile, module: nn.Module, shapes: Shapes, name: str, table: Sequence[Format]
) -> tuple[files.ForeignFile, Format, dict[str, Computed]]:
    """Returns the file with its names as a format has them, that format, and the weights stored in parts.

    Args:
      source: as read.
      module: the backbone.
      shapes: {path with collection: shape} of its variables.
      name: of the format, if the user gave it.
      table: formats to choose among instead of the registered ones.

    Raises:
      ConfigError: if there is no such format.
      CheckpointError: if the file is of no known format; says which prefix would make it one.
    """
    _check_whole(source)
    best: tuple[int, files.ForeignFile, Format, dict[str, Computed]] | None = None
    failure: CheckpointError | None = None
    for reading in (source, *files.other_namings(source)):
        computed = find_computed(source.path, reading.tensors)
        tensors = with_computed(reading.tensors, computed)
        try:
            fmt = find_format(module, shapes.keys(), tensors.keys(), source.path, name, table)
        except CheckpointError as error:
            failure = failure or error
            continue
        count = _count(fmt, module, shapes, tensors)
        if best is None or count > best[0]:
            best = (count, reading, fmt, computed)
        if count == len(shapes):
            break
    if best is None:
        hint = prefix_hint(source.tensors, module, shapes, name, table)
        raise CheckpointError(f"{failure}{hint}") from None
    return best[1:]


def _check_whole(source: files.ForeignFile) -> None:
    flat = [name for name in source.tensors if _FLATTENED.fullmatch(name)]
    if flat:
        raise CheckpointError(
            f"{source.path} holds parameters flattened for sharding ({some(flat, 3)}), whose shapes are not in the file. Save "
            "a full state dict in PyTorch: FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT)."
        )
    adapters = [name for name in source.tensors if ADAPTER.fullmatch(name)]
    if adapters and len(adapters) == len(source.tensors):
        raise CheckpointError(
            f"{source.path} holds adapters only ({some(adapters, 3)}), not the weights that they adapt. Load both in PyTorch, "
            "merge them (with PEFT: model.merge_and_unload()), and save model.state_dict()."
        )


def _count(fmt: Format, module: nn.Module, shapes: Shapes, tensors: Collection[str]) -> int:
    """Returns how many of a module's leaves lie in a file."""
    return sum(piece.theirs in tensors for piece in find_pieces(fmt, module, shapes, tensors))


def prefix_hint(
    tensors: Arrays, module: nn.Module, shapes: Shapes, name: str = "", table: Sequence[Format] = ()
) -> str:
    """Returns the sentence that names the setting with which the names of a file are this module's, or ""."""
    for prefix, names in _under_prefixes(tensors, len(shapes) // 4):
        for fmt in formats_for(module, shapes.keys(), names, name, table):
            found = _count(fmt, module, shapes, names)
            if 2 * found > len(shapes):
                return (
                    f' Behind "{prefix}." its names are those of format {fmt.name}, {found} of the {len(shapes)} that the '
                    f"model needs: --config.backbone.init_state={prefix} reads them (in Python, state={prefix!r})."
                )
    return ""


def _under_prefixes(tensors: Arrays, least: int) -> Iterator[tuple[str, set[str]]]:
    for prefix in prefixes_of(tensors, least):
        under = {name: tensors[name] for name in tensors if name.startswith(f"{prefix}.")}
        bare = {name.removeprefix(f"{prefix}."): array for name, array in under.items()}
        computed = find_computed("", bare)
        yield prefix, set(with_computed(bare, computed))


def beside(unexpected: Collection[str], tensors: Arrays) -> dict[str, list[str]]:
    """Returns the names left over in a file that are no part of a network: {what they are: names}.

    Adapters count as such only if they change nothing, as before training: their second factor is
    zero.
    """
    left = {"of training, not of the network": [name for name in unexpected if BOOKKEEPING.fullmatch(name)]}
    adapters = [name for name in unexpected if ADAPTER.fullmatch(name)]
    second = [name for name in adapters if re.search(r"lora_(embedding_)?B", name)]
    plain = all("lora_" in name and "magnitude" not in name for name in adapters)
    if second and plain and not any(tensors[name].any() for name in second):
        left["of adapters that were never trained"] = adapters
    return {what: names for what, names in left.items() if names}


def adapters_refused(path: str, adapters: Sequence[str]) -> str:
    """Returns the message for adapters beside weights: how strongly they count is not in such a file."""
    return (
        f"{path} holds adapters beside the weights ({some(adapters, 4)}). The factor that they count with (LoRA's alpha / r) "
        "is not in the file, so the network that was trained cannot be computed. Merge them in PyTorch (with PEFT: "
        "model.merge_and_unload()) and save model.state_dict(); to read the weights without the adapters, "
        "--config.backbone.init_allow=\"('.*(lora|hada|lokr|ia3|oft|vera)_.*',)\"."
    )
