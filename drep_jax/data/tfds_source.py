"""Data sets of the TFDS catalog, prepared as array_record and read without TensorFlow."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from drep_jax.data.decode import fitted, fitted_size
from drep_jax.data.labels import MISSING, spread
from drep_jax.data.splits import SPLITS, Part, plan
from drep_jax.errors import ConfigError, DataError, did_you_mean
from drep_jax.files import expanded

FORMAT = "array_record"
PROBED = 16
"""Number of test images that are looked at to find out whether a split has labels."""
# How many of the last train images stand in for a missing validation split, where a tenth would be
# more than needed.
HELD_OUT = {"imagenet2012": 10_000}
# Files that TFDS does not download, to be put into downloads/manual.
BY_HAND = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}


class TfdsSource:
    """One split of a prepared TFDS data set.

    Args:
      builder: a `tfds.core.DatasetBuilder` whose data set is prepared as array_record.
      split: `train`, `validation` or `test`.
      image_size: (height, width) in pixels.
      resize: a way of `drep_jax.data.fits.transform_of_fit`.
    """

    def __init__(self, builder: Any, split: str, image_size: tuple[int, int], resize: str) -> None:
        import tensorflow_datasets as tfds

        self.name = f"tfds:{builder.info.full_name}"
        stored = builder.info.features
        features: dict[str, Any] = dict(stored.items()) if isinstance(stored, tfds.features.FeaturesDict) else {}
        if "image" not in features:
            raise DataError(
                f'{self.name} has no feature "image"; it has {stored}. Export its images to a folder instead.'
            )
        sizes = {name: info.num_examples for name, info in builder.info.splits.items() if name in SPLITS}
        label: Any = features.get("label")
        labeled = isinstance(label, tfds.features.ClassLabel)
        # Images stay encoded, so that one decoder treats gray, CMYK and transparent images alike
        # for every source. Masks stay so, too: they are not read.
        pictures = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        skipped = {name: tfds.decode.SkipDecoding() for name in pictures}
        unlabeled = []
        if labeled and {"train", "validation", "test"} <= sizes.keys():
            tested = builder.as_data_source("test", decoders=skipped, file_format=FORMAT)
            if all(int(tested[place]["label"]) == MISSING for place in spread(len(tested), PROBED)):
                unlabeled = ["test"]
        part = plan(sizes, split, self.name, unlabeled)
        self._data = builder.as_data_source(
            instruction(builder.name, part, sizes[part.stored]), decoders=skipped, file_format=FORMAT
        )
        self.num_classes: int | None = label.num_classes if labeled else None
        # TFDS calls unnamed classes "0", "1", ...
        self.class_names: tuple[str, ...] | None = tuple(label.names) if labeled else None
        self.note = part.note
        if builder.name in HELD_OUT and (part.start, part.stop) != (0, 10):
            size = sizes[part.stored]
            held = min(HELD_OUT[builder.name], size - size * 9 // 10)
            withheld = f"The test split of {self.name} has no labels. " if unlabeled else ""
            self.note = (
                f"{withheld}{self.name} does not come in three splits: the last {held:,} of its {size:,} train images serve "
                "as validation."
            )
        self.stored = part.stored
        self.image_size = image_size
        self.resize = resize

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return fitted(self.raw(index), self.image_size, self.resize)

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image from its header."""
        return fitted_size(self.raw(index), self.image_size, self.resize)

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item with its image as it is stored, and "where", what to call it."""
        example = self._data[index]
        raw: dict[str, Any] = {"image": example["image"], "where": f"{self.name}, {self.stored} image {index}"}
        return raw if self.num_classes is None else {**raw, "label": np.int32(example["label"])}


def open_tfds(argument: str, split: str, image_size: tuple[int, int], resize: str, data_dir: str | None) -> TfdsSource:
    """Opens `tfds:NAME[/config]`.

    Raises:
      ConfigError, DataError: as `open_builder`.
    """
    return TfdsSource(open_builder(argument, data_dir), split, image_size, resize)


def open_builder(argument: str, data_dir: str | None) -> Any:
    """Returns the `tfds.core.DatasetBuilder` of a prepared data set, NAME[/config].

    Raises:
      ConfigError: for a name that TFDS does not know.
      DataError: when the data set is not prepared in `data_dir` as array_record; nothing is
        downloaded.
    """
    import tensorflow_datasets as tfds  # takes half a second to import

    name, _, config = argument.partition("/")
    if not re.fullmatch(r"\w+", name):
        raise ConfigError(f'Expected "tfds:NAME" or "tfds:NAME/CONFIG"; got "tfds:{argument}".')
    root = data_root(data_dir)
    prepared = prepared_folder(root, name, config)
    if prepared is None:
        # Constructing the catalog's builder would ask the network, so only the list of names is
        # consulted.
        catalog = tfds.list_builders(with_community_datasets=False)
        if name not in catalog:
            raise ConfigError(
                f'"{name}" is neither prepared in {root} nor in the TFDS catalog.{did_you_mean(name, catalog)}'
            )
        raise DataError(f'The TFDS data set "{argument}" is not prepared in {root}. {how_to_provide(argument, root)}')
    builder = tfds.builder_from_directory(str(prepared))
    formats = sorted(str(stored.value) for stored in builder.info.available_file_formats())
    if FORMAT not in formats:
        raise DataError(
            f"{prepared} is prepared as {', '.join(formats)}, not as {FORMAT}, which alone allows slices. "
            f"Move it away first. {how_to_provide(argument, root)}"
        )
    return builder


def data_root(data_dir: str | None) -> Path:
    """Returns where TFDS keeps its data sets."""
    return Path(expanded(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def instruction(name: str, part: Part, size: int) -> str:
    """Returns the TFDS slice of a stored split of `size` examples, as in `train[:90]`."""
    if (part.start, part.stop) == (0, 10):
        return part.stored
    borders = {tenth: size * tenth // 10 for tenth in range(11)}
    borders[9] = max(borders[9], size - HELD_OUT.get(name, size))
    return f"{part.stored}[{borders[part.start]}:{borders[part.stop]}]"


def prepared_folder(root: Path, name: str, config: str) -> Path | None:
    """Returns the newest prepared version of a data set below `root`, or None.

    Raises:
      ConfigError: when no configuration is named and several are prepared.
    """
    if not config and _versions(root / name):
        return _versions(root / name)[-1]
    candidates = [root / name / config] if config else sorted((root / name).glob("*"))
    configs = [path for path in candidates if _versions(path)]
    if len(configs) > 1:
        raise ConfigError(
            f'"tfds:{name}" is prepared in several configurations below {root / name}. Name one: '
            f"{', '.join(f'tfds:{name}/{path.name}' for path in configs)}."
        )
    return _versions(configs[0])[-1] if configs else None


def how_to_provide(argument: str, root: Path) -> str:
    """Returns the three ways to get the images of a TFDS data set that is not prepared."""
    tars = BY_HAND.get(argument.partition("/")[0], ())
    by_hand = f" It needs {' and '.join(tars)}, put by hand into {root}/downloads/manual before that." if tars else ""
    return (
        "One of:\n"
        f"  1. prepare it once (this alone needs TensorFlow):\n"
        f"     pip install -r requirements-prepare.txt && python -m drep_jax.data.prepare {argument} --data_dir={root}\n"
        f"     and pass the same directory as --config.data.data_dir or TFDS_DATA_DIR.{by_hand}\n"
        "  2. --config.data.source=folder:DIR with your own copy as DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg\n"
        "  3. --config.data.source=folder:DIR with unlabeled images, DIR/*.jpg: enough to learn denoisers, "
        "not to measure accuracy"
    )


def _versions(folder: Path) -> list[Path]:
    versions = [
        path.parent for path in folder.glob("*/dataset_info.json") if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    ]
    return sorted(versions, key=lambda path: [int(number) for number in path.name.split(".")])
