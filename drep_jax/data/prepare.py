"""Prepares a data set of the TFDS catalogue, which alone needs TensorFlow: `python -m drep_jax.data.prepare NAME`."""

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from drep_jax.data.tfds_source import BY_HAND, FORMAT, data_root, prepared_folder
from drep_jax.errors import ConfigError, DataError, DrepError, did_you_mean


def prepare(argument: str, data_dir: str | None = None) -> str:
    """Downloads a catalogue data set and writes it as array_record, unless that has been done.

    Args:
      argument: NAME or NAME/CONFIG in the catalogue.
      data_dir: where data sets are kept; None means TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
      What is there now, as text.

    Raises:
      ConfigError: for a name that TFDS does not know.
      DataError: without TensorFlow, without files that must be put there by hand, or when preparing fails.
    """
    import tensorflow_datasets as tfds

    name, _, config = argument.partition("/")
    if not re.fullmatch(r"\w+", name):
        raise ConfigError(f'Expected NAME or NAME/CONFIG; got "{argument}".')
    root = data_root(data_dir)
    if prepared_folder(root, name, config) is None:
        catalogue = tfds.list_builders(with_community_datasets=False)
        if name not in catalogue:
            raise ConfigError(f'"{name}" is not in the TFDS catalogue.{did_you_mean(name, catalogue)}')
        _check_files(name, root)
        if importlib.util.find_spec("tensorflow") is None:
            raise DataError(
                "Preparing a data set needs TensorFlow, which is not installed: pip install -r requirements-prepare.txt. "
                "Reading it afterwards does not."
            )
        try:
            tfds.builder(argument, data_dir=str(root)).download_and_prepare(file_format=FORMAT)
        except Exception as error:  # TFDS, TensorFlow and the network raise their own kinds
            raise DataError(f'Preparing "{argument}" in {root} failed: {type(error).__name__}: {error}') from error
    folder = prepared_folder(root, name, config)
    if folder is None:
        raise DataError(f'TFDS prepared "{argument}", but no version of it is to be found in {root / name}.')
    info = tfds.builder_from_directory(str(folder)).info
    splits = ", ".join(f"{split} {part.num_examples}" for split, part in info.splits.items())
    return (
        f"{folder}: {splits} examples.\nTo read it: --config.data.source=tfds:{argument} --config.data.data_dir={root}, "
        "without TensorFlow."
    )


def _check_files(name: str, root: Path) -> None:
    if name not in BY_HAND:
        return
    manual = root / "downloads" / "manual"
    absent = [file for file in BY_HAND[name] if not (manual / file).is_file()]
    if absent:
        raise DataError(f'"{name}" cannot be downloaded by a program. Put {" and ".join(absent)} into {manual} first.')


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m drep_jax.data.prepare", description=__doc__)
    parser.add_argument("name", help="NAME or NAME/CONFIG in the TFDS catalogue, such as cifar10")
    parser.add_argument("--data_dir", default=None, help="by default TFDS_DATA_DIR or ~/tensorflow_datasets")
    options = parser.parse_args(arguments)
    try:
        print(prepare(options.name, options.data_dir))
    except DrepError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
