"""`reid_npz:FILE`: encoded images in one NumPy file, with the arrays

- jpeg, uint8: the files of all images, one after another; image i is
  jpeg[offsets[i]:offsets[i + 1]];
- pid and camera, whole numbers, one an image; view, likewise, if known (-1 where it is not);
- split: 0 for training, 1 for test.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from drep_jax.data.reid.listing import Entry, Listed, in_order
from drep_jax.data.reid.split import drawn_exactly, seed_of, share_of
from drep_jax.errors import ConfigError, DataError
from drep_jax.files import expanded
from drep_jax.metrics.protocol import Protocol

COLUMNS = ("pid", "camera", "split")
GALLERIES = ("others", "all")


def read_reid_npz(file: Path, options: Mapping[str, str]) -> Listed:
    """Reads a file of encoded images.

    Args:
      file: absolute, or relative to the data directory or to $DREP_DATA.
      options: `gallery`, "others" (queries are the first camera's test images, the gallery those of
        the other cameras) or "all" (every test image is both); `test`, a fraction, and `seed`: the
        identities of both stored splits are split anew.

    Raises:
      DataError: naming the array that is missing or does not fit.
    """
    gallery = options.get("gallery", "others")
    if gallery not in GALLERIES:
        raise ConfigError(f'The option gallery is "others" or "all"; got "{gallery}".')
    if "seed" in options and "test" not in options:
        raise ConfigError('The option "seed" needs the option "test", the fraction of the identities that is tested.')
    entries, split, cameras = _entries(_existing(file))
    remarks = []
    if "test" in options:
        identities = {entry.identity for entry in entries}
        seed = seed_of(options.get("seed", "0"))
        chosen = drawn_exactly(identities, share_of(options["test"], "test"), seed)
        split = [int(entry.identity in chosen) for entry in entries]
        remarks.append(f"{len(chosen)} of the {len(identities)} identities are tested, drawn with the seed {seed}.")
    train = [entry for entry, part in zip(entries, split, strict=True) if part == 0]
    test = [entry for entry, part in zip(entries, split, strict=True) if part == 1]
    if gallery == "all" or cameras == 1:
        flagged = [entry._replace(query=True, gallery=True) for entry in test]
    else:
        flagged = [entry._replace(query=True) for entry in test if entry.camera == 0]
        flagged += [entry._replace(gallery=True) for entry in test if entry.camera != 0]
    protocol = Protocol(cross_camera=cameras > 1)
    return Listed(file.name, str(file), train, flagged, cameras, protocol, remarks=tuple(remarks))


def _existing(file: Path) -> Path:
    elsewhere = Path(expanded(os.environ.get("DREP_DATA", "")), file)
    for path in (file, elsewhere):
        if path.is_file():
            return path
    raise DataError(
        f"There is no file {file} (looked for {file.absolute()}). Say where it is with --config.data.data_dir=DIR or the "
        "environment variable DREP_DATA."
    )


def _entries(file: Path) -> tuple[list[Entry], list[int], int]:
    """Returns the images, the stored split of each, and how many cameras there are."""
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            absent = [name for name in ("jpeg", "offsets", *COLUMNS) if name not in stored.files]
            if absent:
                raise DataError(
                    f"{file} lacks {', '.join(absent)}: expected jpeg, offsets, pid, camera, split and, if known, view."
                )
            names = (*COLUMNS, "view") if "view" in stored.files else COLUMNS
            jpeg, offsets = stored["jpeg"], stored["offsets"]
            columns = {name: stored[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read: {error}.") from error
    count = len(offsets) - 1
    for name, values in columns.items():
        if values.shape != (count,) or values.dtype.kind not in "iu":
            raise DataError(f"{file}: {name} is {values.dtype} {values.shape}, expected whole numbers ({count},).")
    if jpeg.dtype != np.uint8 or offsets[0] != 0 or offsets[-1] != len(jpeg) or (np.diff(offsets) <= 0).any():
        raise DataError(
            f"{file}: offsets do not cut jpeg, {jpeg.dtype} {jpeg.shape}, into {count} files one after another."
        )
    if not np.isin(columns["split"], (0, 1)).all():
        raise DataError(
            f"{file}: split holds {sorted(set(columns['split'].tolist()))}; expected 0 (train) and 1 (test)."
        )
    cameras = {name: number for number, name in enumerate(in_order(map(str, columns["camera"].tolist())))}
    views = _from_zero(columns["view"].astype(np.int64)) if "view" in columns else np.full(count, -1)
    data = jpeg.tobytes()
    entries = [
        Entry(
            data[offsets[i] : offsets[i + 1]],
            f"{file}, image {i}",
            str(columns["pid"][i]),
            cameras[str(columns["camera"][i])],
            int(views[i]),
        )
        for i in range(count)
    ]
    return entries, columns["split"].tolist(), len(cameras)


def _from_zero(views: np.ndarray) -> np.ndarray:
    """Returns views numbered from 0, -1 where they are unknown (negative)."""
    known = views >= 0
    return np.where(known, views - views[known].min(initial=np.iinfo(np.int64).max), -1)
