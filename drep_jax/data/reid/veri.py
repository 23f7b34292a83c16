"""VeRi-776: `0001_c001_00016450_0.jpg`, vehicle 1 by camera 1, in three folders.

A query that is also in the gallery, by its name, is there once, as both. These files are optional:
the lists name_train.txt, name_query.txt and name_test.txt decide which images are used;
train_label.xml and test_label.xml give color and type (numbers from 1; 0 is an error of the data
set); keypoint_train.txt and keypoint_test.txt (Wang et al., 2017) have the view, 0 to 7, at the end
of each line.
"""

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

from drep_jax.data.reid.layout import VERI_FOLDERS, begin, check_layout
from drep_jax.data.reid.listing import Entry, Listed, check_listed_files, counted, few, merged, read_flat, read_lines
from drep_jax.errors import ConfigError, DataError

CAMERAS = 20
NAME = re.compile(r"(?P<identity>\d{4})_c(?P<camera>\d{3})_\d+_\d+\.jpg")
LISTS = ("name_train.txt", "name_query.txt", "name_test.txt")
LABELS = ("train_label.xml", "test_label.xml")
VIEWS = ("keypoint_train.txt", "keypoint_test.txt")
COUNTS = {"train": (576, 37_778), "query": (200, 1_678), "gallery": (200, 11_579)}


def read_veri(root: Path, options: Mapping[str, str]) -> Listed:
    """Reads VeRi-776.

    Args:
      root: the folder, or its parent.
      options: `views`, "all" (the default) or "known": images of unknown view are left out, as
        TransReID does.

    Raises:
      DataError: when it is another data set, or not as published.
    """
    wanted = options.get("views", "all")
    if wanted not in ("all", "known"):
        raise ConfigError(f'The option views of VeRi-776 is "all" or "known"; got "{wanted}".')
    base = begin(root, VERI_FOLDERS)
    check_layout(base, VERI_FOLDERS, "VeRi-776", "veri")
    attributes = {name: values for file in LABELS for name, values in _labels(base / file).items()}
    views = {name: view for file in VIEWS for name, view in _views(base / file).items()}
    parts, unlisted = [], 0
    for folder, file in zip(VERI_FOLDERS, LISTS, strict=True):
        entries, _ = read_flat(base / folder, NAME, "VeRi-776", CAMERAS)
        listed = _listed(entries, base / folder, base / file)
        unlisted += len(entries) - len(listed)
        named = [(os.path.basename(entry.where), entry) for entry in listed]
        known = [entry._replace(view=views.get(name, -1)) for name, entry in named]
        parts.append(
            [
                e._replace(attributes=attributes.get(name, e.attributes))
                for (name, _), e in zip(named, known, strict=True)
            ]
        )
    train, query, gallery = parts
    remarks = [f"{counted(unlisted, 'image is', 'images are')} in no list and left out."] if unlisted else []
    if views:
        unknown = sum(entry.view < 0 for part in parts for entry in part)
        what = "-1" if wanted == "all" else "left out"
        remarks.append(f"The view of {counted(unknown, 'image', 'images')} is unknown ({what}).")
    if wanted == "known":
        train, query, gallery = ([entry for entry in part if entry.view >= 0] for part in parts)
    return Listed(
        "VeRi-776",
        str(base),
        train,
        merged(query, gallery, key=lambda entry: os.path.basename(entry.where)),
        CAMERAS,
        published=COUNTS,
        remarks=tuple(remarks),
    )


def _listed(entries: list[Entry], folder: Path, file: Path) -> list[Entry]:
    if not file.is_file():
        return entries
    lines = [(line, str(folder / os.path.basename(words[0]))) for line, words in read_lines(file, 1, "one file name")]
    check_listed_files(lines, file)
    names = {path for _, path in lines}
    return [entry for entry in entries if entry.where in names]


def _labels(file: Path) -> dict[str, dict[str, int]]:
    if not file.is_file():
        return {}
    try:
        # The file declares GB2312, which Python's parser does not know; all that is in it is ASCII.
        root = ElementTree.fromstring(file.read_bytes(), ElementTree.XMLParser(encoding="utf-8"))
        return {
            item.attrib["imageName"]: {"color": int(item.attrib["colorID"]), "type": int(item.attrib["typeID"])}
            for item in root.iter("Item")
        }
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read: {error!r}. Expected XML of Items with imageName, colorID and typeID; or remove it."
        ) from error


def _views(file: Path) -> dict[str, int]:
    if not file.is_file():
        return {}
    views, odd = {}, []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) < 2 or not re.fullmatch("[0-7]", words[-1]):
            odd += [str(number)] if words else []
        else:
            views[words[0].split("/")[-1]] = int(words[-1])
    if odd:
        raise DataError(f"{file}: expected an image first and its view, 0 to 7, last; not so in line {few(odd)}.")
    return views
