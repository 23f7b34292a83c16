"""Data sets in the IDX files of MNIST and Fashion-MNIST (`train-images-idx3-ubyte`, …)."""

import gzip
import os
import struct
import zlib

import numpy as np

from drep_jax.data.npz_source import ArraySource, cut
from drep_jax.data.splits import plan
from drep_jax.errors import ConfigError, DataError
from drep_jax.files import expanded

PREFIX = {"train": "train", "test": "t10k"}
UBYTE = 0x08


def open_idx(argument: str, split: str, image_size: tuple[int, int], resize: str, data_dir: str | None) -> ArraySource:
    """Opens `idx:DIR`, DIR absolute or inside `data_dir`; validation is the last tenth of train.

    Raises:
      DataError: when a file is absent, damaged, or holds something else.
    """
    if not argument:
        raise ConfigError('The data source "idx" needs a directory: "idx:DIR".')
    folder = os.path.join(expanded(data_dir or ""), expanded(argument))
    part = plan(("train", "test"), split, folder)
    prefix = PREFIX[part.stored]
    images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"), 3)
    labels = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels in {prefix}.")
    # Over both files, so that both splits have the same classes.
    of_both = [read_idx(_find(folder, f"{each}-labels-idx1-ubyte"), 1) for each in PREFIX.values()]
    classes = tuple(map(str, range(max(int(each.max(initial=0)) for each in of_both) + 1)))
    return cut(f"idx:{argument}", part, images, labels, classes, image_size, resize)


def _find(folder: str, name: str) -> str:
    for path in (os.path.join(folder, name), os.path.join(folder, f"{name}.gz")):
        if os.path.isfile(path):
            return path
    raise DataError(
        f"There is no {name} (or {name}.gz) in {folder}. The Debian package dataset-fashion-mnist puts Fashion-MNIST into "
        "/usr/share/datasets/fashion-mnist; give the place with --config.data.source=idx:DIR."
    )


def read_idx(path: str, rank: int) -> np.ndarray:
    """Returns the array of an IDX file of bytes with that many dimensions.

    Raises:
      DataError: naming the file and what is wrong with it.
    """
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    head = 4 + 4 * rank
    if len(content) < head or content[:4] != bytes([0, 0, UBYTE, rank]):
        raise DataError(f"{path} is not an IDX file of bytes with {rank} dimension(s).")
    shape = struct.unpack(f">{rank}I", content[4:head])
    if len(content) != head + int(np.prod(shape)):
        raise DataError(f"{path} is truncated: {len(content) - head} bytes of data, expected {int(np.prod(shape))}.")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
