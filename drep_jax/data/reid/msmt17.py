"""MSMT17, both versions: list files of `0000/0000_000_01_0303morning_0008_0.jpg 0`.

The third number of a name is the camera.

V1 has its images in train/ and test/, V2 (faces blurred) in mask_train_v2/ and mask_test_v2/. Train
and validation lists together are the training set, as usual in the field. Train and test number
their persons separately: 0000 is another person in each.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from drep_jax.data.reid.layout import check_layout, recognized, wrong_folder
from drep_jax.data.reid.listing import Entry, Listed, camera_number, check_listed_files, merged, read_lines
from drep_jax.errors import ConfigError, DataError

CAMERAS = 15
NAME = re.compile(r"(?:.*/)?\d+_\d+_(?P<camera>\d+)_[^/]+\.(?:jpg|png)")
LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
FOLDERS = {"1": ("train", "test"), "2": ("mask_train_v2", "mask_test_v2")}
COUNTS = {"train": (1_041, 32_621), "query": (3_060, 11_659), "gallery": (3_060, 82_161)}


def read_msmt17(root: Path, options: Mapping[str, str]) -> Listed:
    """Reads MSMT17.

    Args:
      root: the folder with the lists, or the parent of MSMT17, MSMT17_V1 or MSMT17_V2.
      options: `version`, 1 or 2; needed where both are there.

    Raises:
      ConfigError: for another version, and when both are there and none is named.
      DataError: when it is another data set, or not as published.
    """
    base, version = _find(root, options.get("version"))
    training, testing = FOLDERS[version]
    check_layout(base, (training, testing, *LISTS), f"MSMT17-V{version}", "msmt17")
    train, val, query, gallery = (
        _read_list(base / name, base / folder)
        for name, folder in zip(LISTS, (training, training, testing, testing), strict=True)
    )
    twice = {entry.where for entry in train} & {entry.where for entry in val}
    if twice:
        raise DataError(
            f"{base}: {len(twice):,} images are both in {LISTS[0]} and in {LISTS[1]}, {min(twice)} for one."
        )
    test = merged(query, gallery, key=lambda entry: entry.where)
    return Listed(f"MSMT17-V{version}", str(base), [*train, *val], test, CAMERAS, published=COUNTS, one_numbering=False)


def _find(root: Path, version: str | None) -> tuple[Path, str]:
    if version is not None and version not in FOLDERS:
        raise ConfigError(f'MSMT17 has the versions 1 and 2; got the option version="{version}".')
    candidates = [base for base in (root, *(root / name for name in ("MSMT17", "MSMT17_V1", "MSMT17_V2")))]
    there = [(base, v) for base in candidates for v, names in FOLDERS.items() if _holds(base, names)]
    wanted = [(base, v) for base, v in there if version in (None, v)]
    if len({v for _, v in wanted}) > 1:
        raise ConfigError(f"{root} holds both versions of MSMT17. Name one: msmt17:{root}?version=1, or version=2.")
    if wanted:
        return wanted[0]
    if there:
        raise DataError(
            f"This is MSMT17-V{there[0][1]}, expected MSMT17-V{version}: {', '.join(FOLDERS[version or '1'])} below {root}. "
            "Leave out the option version to read it."
        )
    needed = (*FOLDERS[version or "1"], *LISTS)
    raise wrong_folder(root, "it lacks the folders of images", needed, f"MSMT17-V{version or '1'}", "msmt17")


def _holds(base: Path, names: tuple[str, str]) -> bool:
    """Returns whether a version is there; folders called train and test are not enough."""
    known = recognized(base)
    return known is not None and known[1] == "msmt17" and any((base / name).is_dir() for name in names)


def _read_list(file: Path, folder: Path) -> list[Entry]:
    entries, paths = [], []
    for line, (name, identity) in read_lines(
        file, 2, '"path identity", as in "0000/0000_000_01_0303morning_0008_0.jpg 0"'
    ):
        match = NAME.fullmatch(name)
        if match is None or not identity.isdecimal():
            raise DataError(
                f"{file}, line {line}: expected a path like 0000/0000_000_01_0303morning_0008_0.jpg and a number; "
                f'got "{name} {identity}".'
            )
        path = os.path.join(folder, name)
        camera = camera_number(match["camera"], CAMERAS, "MSMT17", f"{file}, line {line}")
        entries.append(Entry(path, path, f"{int(identity):04d}", camera))
        paths.append((line, path))
    check_listed_files(paths, file)
    return entries
