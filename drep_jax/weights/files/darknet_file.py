"""darknet's `.weights`: a header and bare float32 numbers, which the `.cfg` beside it gives names and shapes.

int32 major, minor, revision; the number of images seen, 8 bytes if major·10 + minor ≥ 2, else 4.
Then for each convolution in the order of the `.cfg`: with a batch norm its bias, scale, mean and
variance, else the convolution's bias; then the weights (out, in / groups, height, width). A file
may end after any layer, as those that begin a training do.

Names are those that PyTorch would give: `layer3.conv.weight`, `layer3.bn.running_mean`.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.models.detectors.darknet_cfg import Network, read_cfg
from drep_jax.weights.files.contents import Block, Contents, Path, View, dense_strides

SUFFIX = ".weights"
_FLOAT = np.dtype("<f4")
_MARK = b"\ndrep_jax\n"
"""Begins what follows the numbers of a file that was written here; darknet does not read that far."""


def is_darknet(path: str) -> bool:
    """Returns whether a file is of this kind by its name, also while it is being written; its bytes do not tell."""
    return path.removesuffix(".tmp").endswith(SUFFIX)


def cfg_of(path: str) -> str:
    """Returns the path of the `.cfg` beside a `.weights` file."""
    return path.removesuffix(".tmp").removesuffix(SUFFIX) + ".cfg"


def tensors_of(network: Network) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the name and shape of every tensor, in the order of the file."""
    for layer in network.layers:
        if layer.kind != "convolutional":
            continue
        owner = f"layer{layer.number}"
        if layer.norm:
            for leaf in ("bias", "weight", "running_mean", "running_var"):
                yield f"{owner}.bn.{leaf}", (layer.channels,)
        else:
            yield f"{owner}.conv.bias", (layer.channels,)
        shape = (layer.channels, layer.channels_in // layer.groups, layer.size, layer.size)
        yield f"{owner}.conv.weight", shape


def read(path: str, buffer: memoryview) -> Contents:
    """Reads a `.weights` file with the `.cfg` beside it.

    Raises:
      CheckpointError: if there is no such `.cfg`, or the two do not fit.
    """
    cfg = cfg_of(path)
    if not os.path.isfile(cfg):
        raise CheckpointError(
            f"{path} is a bare list of numbers, and there is no {cfg} to say what they are. Put the network's .cfg beside it "
            "under that name."
        )
    try:
        network = read_cfg(cfg)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    begin = _header(path, buffer)
    numbers, mark = _parts(path, buffer, begin)
    blocks: dict[str, Block] = {}
    views: dict[Path, View] = {}
    end = 0
    names = list(tensors_of(network))
    for name, shape in names:
        if end == numbers and name.split(".")[0] not in {other.split(".")[0] for other in blocks}:
            break  # a file that begins a training: it ends between two layers
        length = math.prod(shape) * _FLOAT.itemsize
        if end + length > numbers:
            raise _misfit(path, cfg, numbers, names, f'ends inside "{name}"')
        start = begin + end
        blocks[name] = Block(buffer[start : start + length], start)
        views[name,] = View(name, _FLOAT, shape, dense_strides(shape))
        end += length
    if end < numbers or not blocks:
        raise _misfit(path, cfg, numbers, names, "has numbers left over")
    notes: tuple[str, ...] = (f"names from {os.path.basename(cfg)}",)
    if len(blocks) < len(names):
        notes += (f"the file ends before {names[len(blocks)][0].split('.')[0]}",)
    return Contents(path, "darknet", blocks, views, mark=mark, notes=notes, layout=begin + numbers)


def _header(path: str, buffer: memoryview) -> int:
    if len(buffer) >= 16:
        major, minor, revision = struct.unpack_from("<3i", buffer)
        if 0 <= major < 1000 and 0 <= minor < 1000 and 0 <= revision < 1000:
            return 20 if major * 10 + minor >= 2 else 16
    raise CheckpointError(f"{path} does not begin with the version of darknet that wrote it: it is no .weights file.")


def _parts(path: str, buffer: memoryview, begin: int) -> tuple[int, str | None]:
    """Returns the number of bytes of the weights, and the mark behind them."""
    size = len(buffer) - begin
    tail = bytes(buffer[-min(len(buffer), 2**16) :])
    if _MARK in tail:
        text = tail[tail.rindex(_MARK) + len(_MARK) :]
        try:
            json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: what follows its numbers is cut off.") from error
        return size - len(text) - len(_MARK), text.decode()
    return size, None


def _misfit(path: str, cfg: str, numbers: int, names: list[tuple[str, tuple[int, ...]]], how: str) -> CheckpointError:
    expected = sum(math.prod(shape) for _, shape in names)
    return CheckpointError(
        f"{path} {how}: it has {numbers / _FLOAT.itemsize:.10g} numbers, and the layers of {cfg} need {expected}. Is this the "
        "network's .cfg, and the download complete?"
    )


def rewrite(contents: Contents, path: str, blocks: Iterable[tuple[str, bytes | bytearray]], mark: str) -> None:
    """Writes the same file with other numbers and the mark behind them, and its `.cfg` beside it.

    Raises:
      CheckpointError: if another `.cfg` is in the way.
    """
    source, target = cfg_of(contents.path), cfg_of(path)
    if not os.path.exists(target):
        shutil.copyfile(source, target)
    elif not os.path.samefile(source, target) and _bytes(source) != _bytes(target):
        raise CheckpointError(
            f"Not writing {path}: {target} is there and describes another network. Choose another name."
        )
    with open(contents.path, "rb") as file, open(path, "wb") as out:
        out.write(file.read(contents.layout))
        for name, data in blocks:
            out.seek(contents.blocks[name].offset or 0)
            out.write(data)
        out.seek(0, os.SEEK_END)
        out.write(_MARK + mark.encode())


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
