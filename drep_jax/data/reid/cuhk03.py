"""CUHK03 in the new protocol (767 persons to train, 700 to test), labeled or detected boxes.

Three forms are read, all with images extracted from cuhk-03.mat:
- images_labeled/1_001_1_01.png (pair of cameras, person, view, image) with
  cuhk03_new_protocol_config_labeled.mat;
- the same images with splits_new_labeled.json;
- labeled/bounding_box_train, query and bounding_box_test with 0001_c1_1.png ("CUHK03-NP").

A person is seen by the two cameras of one pair; cameras are numbered by the view, 0 and 1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drep_jax.data.reid.layout import CUHK03_NP_NAME, MARKET_FOLDERS, recognized, wrong_folder
from drep_jax.data.reid.listing import Entry, Listed, check_listed_files, merged
from drep_jax.data.reid.market import read_market_form
from drep_jax.errors import ConfigError, DataError

BOXES = ("labeled", "detected")
NAME = re.compile(r"(?P<pair>\d)_(?P<person>\d{3})_(?P<view>[12])_\d{2}\.png")
COUNTS = {
    "labeled": {"train": (767, 7_368), "query": (700, 1_400), "gallery": (700, 5_328)},
    "detected": {"train": (767, 7_365), "query": (700, 1_400), "gallery": (700, 5_332)},
}
PARTS = ("train", "query", "gallery")


def read_cuhk03(root: Path, options: Mapping[str, str]) -> Listed:
    """Reads CUHK03.

    Args:
      root: the folder, or the one that cuhk03 or cuhk03-np lies in.
      options: `boxes`, labeled (by hand, the default) or detected.

    Raises:
      DataError: when it is another data set, or images or split are not in one of the three forms.
    """
    boxes = options.get("boxes", "labeled")
    if boxes not in BOXES:
        raise ConfigError(f'CUHK03 has the boxes labeled and detected; got the option boxes="{boxes}".')
    title = f"CUHK03 ({boxes})"
    for base in (root, root / "cuhk03", root / "cuhk03-np"):
        for folders in (base / boxes, base):
            if all((folders / part).is_dir() for part in MARKET_FOLDERS) and _named_so(folders):
                return read_market_form(folders, title, "cuhk03", CUHK03_NP_NAME, 2, COUNTS[boxes])
        images = base / f"images_{boxes}"
        config, split = base / f"cuhk03_new_protocol_config_{boxes}.mat", base / f"splits_new_{boxes}.json"
        if images.is_dir() and (config.is_file() or split.is_file()):
            file = config if config.is_file() else split
            named = _names_of_mat(config) if config.is_file() else _names_of_json(split)
            train, query, gallery = (_entries(named[part], images, file) for part in PARTS)
            test = merged(query, gallery, key=lambda entry: entry.where)
            return Listed(title, str(base), train, test, 2, published=COUNTS[boxes])
    raise _unusable(root, boxes, title)


def _named_so(folders: Path) -> bool:
    """Returns whether folders in Market-1501's form are CUHK03's."""
    known = recognized(folders)
    return known is not None and known[1] == "cuhk03"


def _unusable(root: Path, boxes: str, title: str) -> DataError:
    needed = (f"images_{boxes}/", f"cuhk03_new_protocol_config_{boxes}.mat or splits_new_{boxes}.json")
    for base in (root, root / "cuhk03"):
        raw = [file for file in (base / "cuhk-03.mat", base / "cuhk03_release" / "cuhk-03.mat") if file.is_file()]
        if raw and not (base / f"images_{boxes}").is_dir():
            return DataError(
                f"{raw[0]} holds the images of CUHK03 in MATLAB's HDF5 form, which is not read. Save them as PNG files "
                f"images_{boxes}/PAIR_PERSON_VIEW_IMAGE.png (as in 1_001_1_01.png) beside "
                f"cuhk03_new_protocol_config_{boxes}.mat, as torchreid and fast-reid do when they first open the data set, "
                f"or take the images of CUHK03-NP, {boxes}/bounding_box_train and so on."
            )
        if (base / f"images_{boxes}").is_dir():
            why = f"there are images, but neither {base / f'cuhk03_new_protocol_config_{boxes}.mat'} nor the JSON"
            return wrong_folder(base, why, needed, title, "cuhk03")
    return wrong_folder(root, "it lacks the images", needed, title, "cuhk03")


def _names_of_mat(file: Path) -> dict[str, list[str]]:
    from scipy.io import loadmat  # takes a tenth of a second to import
    from scipy.io.matlab import MatReadError

    try:
        stored = loadmat(str(file))
        names = [str(np.ravel(cell)[0]) for cell in stored["filelist"].ravel()]
        places = {part: stored[f"{part}_idx"].ravel().astype(np.int64) - 1 for part in PARTS}
    except (OSError, ValueError, NotImplementedError, MatReadError, IndexError) as error:
        raise DataError(f"{file} cannot be read as a MATLAB file: {error}.") from error
    except KeyError as error:
        raise DataError(f"{file} lacks {error}; expected filelist, train_idx, query_idx and gallery_idx.") from error
    for part, chosen in places.items():
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(names):
            raise DataError(
                f"{file}: {part}_idx goes from {chosen.min() + 1} to {chosen.max() + 1} of {len(names)} files."
            )
    return {part: [names[place] for place in chosen] for part, chosen in places.items()}


def _names_of_json(file: Path) -> dict[str, list[str]]:
    """Returns the names in torchreid's file, without the folders of the machine that wrote it."""
    try:
        split: Any = json.loads(file.read_text(encoding="utf-8"))[0]
        return {part: [re.split(r"[/\\]", str(item[0]))[-1] for item in split[part]] for part in PARTS}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{file} is not a split as torchreid writes it, a list with one table of train, query and gallery: {error!r}."
        ) from error


def _entries(names: list[str], images: Path, file: Path) -> list[Entry]:
    matches = [(NAME.fullmatch(name), name) for name in names]
    odd = [name for match, name in matches if match is None]
    if odd:
        raise DataError(f"{file} names {odd[0]!r}; expected PAIR_PERSON_VIEW_IMAGE.png, as in 1_001_1_01.png.")
    paths = [str(images / name) for name in names]
    check_listed_files(list(enumerate(paths, 1)), file)
    return [
        Entry(path, path, f"{match['pair']}_{match['person']}", int(match["view"]) - 1)
        for (match, _), path in zip(matches, paths, strict=True)
        if match is not None
    ]
