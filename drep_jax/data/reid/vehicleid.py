"""PKU VehicleID: image/0000001.jpg, and lists of `0000001 VEHICLE` in train_test_split/.

Cameras are unknown.

A test list has no queries and gallery: ten times, the protocol draws a gallery of one image a
vehicle, and the other images are the queries.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from drep_jax.data.reid.layout import begin, check_layout
from drep_jax.data.reid.listing import Entry, Listed, check_listed_files, read_lines
from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.protocol import Protocol

TRIALS = 10
TRAIN = (13_164, 113_346)
TEST = {"800": (800, 6_493), "1600": (1_600, 13_377), "2400": (2_400, 19_777)}


def read_vehicleid(root: Path, options: Mapping[str, str]) -> Listed:
    """Reads VehicleID.

    Args:
      root: the folder, or its parent.
      options: `size` of the test list: 800 (the default), 1600 or 2400 vehicles.

    Raises:
      DataError: when it is another data set, or not as published.
    """
    size = options.get("size", "800")
    if size not in TEST:
        raise ConfigError(f'VehicleID has test lists of the size {", ".join(TEST)}; got the option size="{size}".')
    lists = ("train_test_split/train_list.txt", f"train_test_split/test_list_{size}.txt")
    needed = ("image", *lists)
    base = begin(root, needed)
    check_layout(base, needed, "VehicleID", "vehicleid")
    train, test = (_read_list(base / name, base / "image") for name in lists)
    return Listed(
        f"VehicleID ({size})",
        str(base),
        train,
        [entry._replace(query=True, gallery=True) for entry in test],
        1,
        Protocol(cross_camera=False, trials=TRIALS),
        {"train": TRAIN, "test": TEST[size]},
    )


def _read_list(file: Path, folder: Path) -> list[Entry]:
    entries, paths = [], []
    for line, (name, identity) in read_lines(file, 2, '"image vehicle", as in "0000001 5"'):
        if not identity.isdecimal():
            raise DataError(f'{file}, line {line}: a vehicle is a number; got "{identity}".')
        path = os.path.join(folder, name if name.endswith(".jpg") else f"{name}.jpg")
        entries.append(Entry(path, path, identity, 0))
        paths.append((line, path))
    check_listed_files(paths, file)
    return entries
