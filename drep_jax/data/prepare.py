"""Prepares a data set for TFDS: `python -m drep_jax.data.prepare NAME`.

Data sets of the TFDS catalog need TensorFlow for it. Those for re-identification are made from
`--manual_dir` without.
"""

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from drep_jax.data.reid import READERS
from drep_jax.data.tfds_source import BY_HAND, FORMAT, data_root, prepared_folder
from drep_jax.errors import ConfigError, DataError, DrepError, did_you_mean
from drep_jax.files import expanded


def prepare(argument: str, data_dir: str | None = None, manual_dir: str | None = None) -> str:
    """Writes a data set as array_record, unless it is there; those of the catalog are downloaded.

    Args:
      argument: NAME or NAME/CONFIG of a data set in the catalog or for re-identification.
      data_dir: where data sets are kept; None means TFDS_DATA_DIR or ~/tensorflow_datasets.
      manual_dir: the unpacked original of a data set for re-identification; None for the catalog.

    Returns:
      A text that says what is there now and how to read it.

    Raises:
      ConfigError: for an unknown name.
      DataError: without TensorFlow where it is needed, without files that must be put there by
        hand, or when preparing fails.
    """
    import tensorflow_datasets as tfds

    name, _, config = argument.partition("/")
    if not re.fullmatch(r"\w+", name):
        raise ConfigError(f'Expected NAME or NAME/CONFIG; got "{argument}".')
    root = data_root(data_dir)
    if name in READERS and not name.startswith("reid_"):
        return _prepare_reid(name, config, root, manual_dir)
    if manual_dir is not None:
        raise ConfigError(f'--manual_dir is for data sets for re-identification, which "{name}" is not.')
    if prepared_folder(root, name, config) is None:
        catalog = tfds.list_builders(with_community_datasets=False)
        if name not in catalog:
            known = [*catalog, *(reader for reader in READERS if not reader.startswith("reid_"))]
            raise ConfigError(f'"{name}" is not in the TFDS catalog.{did_you_mean(name, known)}')
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
    return _summary(root, name, config, f"tfds:{argument}")


def _prepare_reid(name: str, config: str, root: Path, manual_dir: str | None) -> str:
    import tensorflow_datasets as tfds

    from drep_jax.data.reid.builders import BUILDERS

    builder = BUILDERS[name]
    configs = [known.name for known in builder.BUILDER_CONFIGS]
    if config and config not in configs:
        raise ConfigError(f'"{name}" has no configuration "{config}".{did_you_mean(config, configs)}')
    config = config or (configs[0] if configs else "")
    if prepared_folder(root, name, config) is None:
        original = Path(expanded(manual_dir or "")).absolute()
        if manual_dir is None or not original.is_dir() or not any(original.iterdir()):
            given = "none was given" if manual_dir is None else f"{original} is no directory or empty"
            raise DataError(f'"{name}" is prepared from its unpacked original, --manual_dir=DIR; {given}.')
        download = tfds.download.DownloadConfig(manual_dir=str(original))
        made = builder(data_dir=str(root), config=config or None)
        made.download_and_prepare(download_config=download, file_format=FORMAT)
    argument = f"{name}/{config}" if config else name
    return _summary(root, name, config, f"reid_tfds:{argument}")


def _summary(root: Path, name: str, config: str, source: str) -> str:
    import tensorflow_datasets as tfds

    folder = prepared_folder(root, name, config)
    if folder is None:
        raise DataError(f'TFDS prepared "{name}", but there is no version of it in {root / name}.')
    info = tfds.builder_from_directory(str(folder)).info
    splits = ", ".join(f"{split} {part.num_examples}" for split, part in info.splits.items())
    return (
        f"{folder}: {splits} examples.\nTo read it: --config.data.source={source} --config.data.data_dir={root}, "
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
    parser.add_argument("name", help="NAME or NAME/CONFIG, such as cifar10 of the TFDS catalog, or market1501")
    parser.add_argument("--data_dir", default=None, help="by default TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--manual_dir", default=None, help="for re-identification: the unpacked original")
    options = parser.parse_args(arguments)
    try:
        print(prepare(options.name, options.data_dir, options.manual_dir))
    except DrepError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
