"""Market-1501 and DukeMTMC-reID: folders of images whose names hold identity and camera.

Market-1501: `0002_c1s1_000451_03.jpg`, identity 2 by camera 1. Identity -1 is junk and left out;
0000 are distractors, which no query looks for. DukeMTMC-reID: `0005_c2_f0046985.jpg`; its
distractors have other identities than its queries.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from drep_jax.data.folder import SUFFIXES, scan
from drep_jax.data.labels import ignored_note
from drep_jax.data.reid.layout import (
    DUKE_NAME,
    MARKET_FOLDERS,
    MARKET_NAME,
    begin,
    check_layout,
    recognized,
    wrong_folder,
)
from drep_jax.data.reid.listing import JUNK, Entry, Listed, camera_number, counted, few, image_names, merged, read_flat
from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.protocol import Protocol

DISTRACTOR = "0000"
MARKET_COUNTS = {"train": (751, 12_936), "query": (750, 3_368), "gallery": (751, 15_913)}
DUKE_COUNTS = {"train": (702, 16_522), "query": (702, 2_228), "gallery": (1_110, 17_661)}


def read_market1501(root: Path, options: Mapping[str, str]) -> Listed:
    """Reads Market-1501.

    Args:
      root: the folder, or its parent.
      options: `distractors`, a folder of the 500,000 further distractors, which are added to the
        gallery.

    Raises:
      DataError: when it is another data set, or not as published.
    """
    base = begin(root, MARKET_FOLDERS)
    extra = _distractors(base, options["distractors"]) if "distractors" in options else []
    listed = read_market_form(base, "Market-1501", "market1501", MARKET_NAME, 6, MARKET_COUNTS, extra)
    if not extra:
        return listed
    remark = f"{counted(len(extra), 'distractor', 'distractors')} of {options['distractors']} included."
    return dataclasses.replace(listed, remarks=(*listed.remarks, remark))


def read_duke(root: Path, options: Mapping[str, str]) -> Listed:
    """Reads DukeMTMC-reID; `root` is the folder, or its parent; there are no options.

    Raises:
      DataError: when it is another data set, or not as published.
    """
    del options
    return read_market_form(begin(root, MARKET_FOLDERS), "DukeMTMC-reID", "duke", DUKE_NAME, 8, DUKE_COUNTS)


def read_market_form(
    base: Path,
    title: str,
    spec: str,
    grammar: re.Pattern[str],
    cameras: int,
    published: Mapping[str, tuple[int, int]],
    extra: list[Entry] | None = None,
) -> Listed:
    """Reads bounding_box_train, query and bounding_box_test, with further gallery images."""
    check_layout(base, MARKET_FOLDERS, title, spec)
    known = recognized(base)
    if known is not None and known[1] not in (spec, "reid_folder"):
        raise wrong_folder(base, "its images are named otherwise", MARKET_FOLDERS, title, spec)
    instead = f'Images with other names are read by the source "reid_folder:{base}".'
    read = [read_flat(base / part, grammar, title, cameras, instead=instead) for part in MARKET_FOLDERS]
    (train, _), (query, _), (gallery, _) = read
    junk = sum(count for _, count in read)
    remarks = [f"{counted(junk, 'junk image', 'junk images')} left out."] if junk else []
    ignored = sum((scan(base / part).ignored for part in MARKET_FOLDERS), start=Counter())
    remarks += [note] if (note := ignored_note(ignored, str(base), SUFFIXES)) else []
    return Listed(
        title,
        str(base),
        train,
        merged(query, [*gallery, *(extra or [])], key=lambda entry: entry.where),
        cameras,
        Protocol(),
        published,
        remarks=tuple(remarks),
    )


def _distractors(base: Path, name: str) -> list[Entry]:
    folder = base / name
    if not name or not folder.is_dir():
        raise ConfigError(f'The option "distractors" names a folder of Market-1501; there is no folder {folder}.')
    entries, odd = [], []
    for name in image_names(folder):
        match = re.match(r"(?P<identity>-1|\d+)_c(?P<camera>\d+)", name)
        if match is None:
            odd.append(name)
        elif match["identity"] != JUNK:
            path = os.path.join(folder, name)
            entries.append(Entry(path, path, DISTRACTOR, camera_number(match["camera"], 6, "Market-1501", path)))
    if odd or not entries:
        raise DataError(f"{folder}: expected distractors named as 0000_c1s1_000001_00.jpg; got {few(odd) or 'none'}.")
    return entries
