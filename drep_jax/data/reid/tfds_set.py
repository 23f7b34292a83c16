"""`reid_tfds:NAME[/CONFIG]`: a data set that `python -m drep_jax.data.prepare` has prepared."""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drep_jax.data.reid.listing import Entry, Listed
from drep_jax.data.tfds_source import FORMAT, data_root, prepared_folder
from drep_jax.errors import DataError
from drep_jax.metrics.protocol import Protocol

COLUMNS = ("identity", "camera", "view", "query", "gallery")


def read_prepared(path: Path, options: Mapping[str, str]) -> Listed:
    """Reads the labels of a prepared data set; images are read on demand.

    Args:
      path: NAME or NAME/CONFIG below the data directory, or below TFDS_DATA_DIR.
      options: none.

    Raises:
      DataError: when it is not prepared there, or not a data set for re-identification.
    """
    del options
    places = (path, data_root(None) / path)
    prepared = (prepared_folder(place.parent, place.name, "") for place in places)
    folders = [folder for folder in prepared if folder is not None]
    if not folders:
        raise DataError(
            f"There is no prepared data set {' or '.join(map(str, dict.fromkeys(places)))}. Prepare it once from the unpacked "
            f"original: python -m drep_jax.data.prepare {path.name} --manual_dir=DIR --data_dir=DIR"
        )
    return _read(str(folders[0]), os.path.getmtime(folders[0] / "dataset_info.json"))


# Train, validation and test sources are opened one after another, and 126,000 records take 25 s to
# read.
@functools.lru_cache(maxsize=2)
def _read(folder: str, written: float) -> Listed:
    import tensorflow_datasets as tfds  # takes half a second to import

    del written  # a data set that is prepared anew is read anew
    builder = tfds.builder_from_directory(folder)
    about, absent = _about(builder)
    if absent:
        raise DataError(f"{folder} is not a data set for re-identification: it lacks {', '.join(absent)}.")
    read = {
        part: list(_entries(builder, part)) for part in ("train", "query", "gallery") if part in builder.info.splits
    }
    return Listed(
        str(about["title"]),
        folder,
        read.get("train", []),
        [*read.get("query", []), *read.get("gallery", [])],
        int(about["cameras"]),
        Protocol(cross_camera=bool(about["cross_camera"]), trials=int(about["trials"])),
        {part: (int(identities), int(images)) for part, (identities, images) in about["published"].items()},
        bool(about["one_numbering"]),
        tuple(about["remarks"]),
    )


def _about(builder: Any) -> tuple[Mapping[str, Any], list[str]]:
    """Returns what the builder wrote about the data set, and which of the features it lacks."""
    about = builder.info.metadata or {}
    features = dict(builder.info.features.items()) if hasattr(builder.info.features, "items") else {}
    absent = [name for name in ("image", *COLUMNS) if name not in features]
    return about, absent or ([] if "title" in about else ["its description"])


def _entries(builder: Any, part: str) -> Iterator[Entry]:
    import tensorflow_datasets as tfds

    stored = builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()}, file_format=FORMAT)
    for number in range(len(stored)):
        example = stored[number]
        yield Entry(
            functools.partial(_image, stored, number),
            f"{builder.info.full_name}, {part} image {number}",
            _text(example["identity"]),
            int(example["camera"]),
            int(example["view"]),
            bool(example["query"]),
            bool(example["gallery"]),
        )


def _image(stored: Any, number: int) -> bytes:
    return stored[number]["image"]


def _text(stored: Any) -> str:
    return stored.decode() if isinstance(stored, bytes) else str(stored)
