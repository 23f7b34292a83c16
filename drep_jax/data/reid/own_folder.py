"""`reid_folder:DIR`: images whose names, folders or images.csv hold identity and camera.

The parts are DIR/train, DIR/query and DIR/gallery (or Market-1501's bounding_box_train, query and
bounding_box_test), or DIR/train and DIR/test, or none: then identities are split by a hash of their
names. The first of these grammars that fits half of the names is used, and must then fit all of
them (case does not matter):

- IDENTITY_cCAMERA…, IDENTITY_camCAMERA…: `anna_cam2_17.jpg`, `0001_c1s1_000451_03.jpg`,
  `0005_c2_f0046985.jpg`
- IDENTITY_CAMERA_NUMBER: `0001_2_0007.png`
- cCAMERA/IDENTITY/…: `cam1/anna/0003.jpg`
- IDENTITY/…cCAMERA…: `anna/c1_0003.jpg`, `anna/cam2/17.jpg`
- IDENTITY/…, without cameras: `anna/0003.jpg`
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from drep_jax.data.folder import SUFFIXES, leads_back
from drep_jax.data.labels import ignored_note
from drep_jax.data.reid.layout import MARKET_FOLDERS
from drep_jax.data.reid.listing import JUNK, Entry, Listed, check_listed_files, counted, few, in_order, merged
from drep_jax.data.reid.split import drawn_by_hash, query_and_gallery, seed_of, share_of
from drep_jax.data.text import read_text_lines, separator_of
from drep_jax.errors import ConfigError, DataError, did_you_mean
from drep_jax.metrics.protocol import Protocol

CSV = "images.csv"
COLUMNS = ("path", "identity", "camera", "view", "split")
PARTS = ("train", "query", "gallery", "test")
GRAMMARS = (
    r"(?:.*/)?(?P<identity>-?[^/]+?)_c(?:am(?:era)?)?(?P<camera>\d+)(?!\d)[^/]*",
    r"(?:.*/)?(?P<identity>[^/_]+)_(?P<camera>\d+)_\d+\.\w+",
    r"c(?:am(?:era)?)?[-_ ]?(?P<camera>\d+)/(?P<identity>[^/]+)/.*",
    r"(?P<identity>[^/]+)/(?:.*[^a-z])?c(?:am(?:era)?)?[-_]?(?P<camera>\d+)(?!\d).*",
    r"(?P<identity>[^/]+)/.*",
)
FORM_OF_GRAMMAR = (
    "IDENTITY_cCAMERA_….jpg",
    "IDENTITY_CAMERA_NUMBER.jpg",
    "cCAMERA/IDENTITY/….jpg",
    "IDENTITY/cCAMERA_….jpg",
    "IDENTITY/….jpg",
)
FORMS = f"{', '.join(FORM_OF_GRAMMAR[:-1])} or {FORM_OF_GRAMMAR[-1]}"
CAMERA_NAME = re.compile(r"c(?:am(?:era)?)?[-_ ]?\d+", re.IGNORECASE)
GROUPS = ("identity", "camera", "view")


class NamedImage(NamedTuple):
    """An image before cameras are numbered: its file, and what its name or line says."""

    path: str
    identity: str
    camera: str | None
    view: int
    part: str | None


def read_reid_folder(root: Path, options: Mapping[str, str]) -> Listed:
    """Reads the user's images.

    Args:
      root: the folder.
      options: `pattern`, a regular expression with the group identity and, if wanted, camera and
        view, that fits the whole path below the folder of the part; `test` and `seed`, the fraction
        of test identities and the seed of the split, where there are no parts.

    Raises:
      DataError: naming the file or line that cannot be used.
    """
    if not root.is_dir():
        raise DataError(f"There is no directory {root} (looked for {root.absolute()}).")
    table = root / CSV
    if table.is_file() and "pattern" in options:
        raise ConfigError(f"{table} has identities and cameras: leave out the option pattern, or move the file away.")
    named, read_as = (list(_from_csv(table)), []) if table.is_file() else _from_names(root, options.get("pattern"))
    images = [image for image in named if image.identity != JUNK]
    junk = len(named) - len(images)
    names = in_order(image.camera for image in images if image.camera is not None)
    lacking = [image.path for image in images if image.camera is None]
    if names and lacking:
        raise DataError(f"{lacking[0]}: no camera, but other images have one. Give it for all images or for none.")
    numbers = {name: number for number, name in enumerate(names)}
    entries = [
        (image.part, Entry(image.path, image.path, image.identity, numbers.get(image.camera or "", 0), image.view))
        for image in images
    ]
    remarks = list(read_as)
    remarks += [f"Cameras {few([f'{number} = {name}' for name, number in numbers.items()])}."] if names else []
    remarks += [] if names else ["No cameras are known: queries look for all other images of their identity."]
    remarks += [f"{counted(junk, 'junk image', 'junk images')} left out."] if junk else []
    return divided(root, entries, max(len(names), 1), options, remarks)


def divided(
    root: Path,
    entries: Sequence[tuple[str | None, Entry]],
    cameras: int,
    options: Mapping[str, str],
    remarks: Sequence[str],
) -> Listed:
    """Returns the data set of images with their parts, divided by identity where they have none."""
    protocol = Protocol(cross_camera=cameras > 1)
    parts = {part: [entry for named, entry in entries if named == part] for part in (*PARTS, None)}
    if parts[None]:
        identities = {entry.identity for entry in parts[None]}
        share, seed = share_of(options.get("test", "0.5"), "test"), seed_of(options.get("seed", "0"))
        chosen = drawn_by_hash(identities, share, seed, str(root))
        train = [entry for entry in parts[None] if entry.identity not in chosen]
        test = query_and_gallery([entry for entry in parts[None] if entry.identity in chosen])
        remark = (
            f"Divided by a hash of the identity: {len(identities) - len(chosen)} for training, {len(chosen)} for test."
        )
        return Listed("reid_folder", str(root), train, test, cameras, protocol, remarks=(*remarks, remark))
    for name in ("test", "seed"):
        if name in options:
            raise ConfigError(f'{root} is divided already: the option "{name}" has no meaning. Leave it out.')
    if parts["test"] and (parts["query"] or parts["gallery"]):
        raise DataError(f"{root} has both a test part and queries or gallery. Use one of the two.")
    test = query_and_gallery(parts["test"]) or merged(parts["query"], parts["gallery"], lambda entry: entry.where)
    return Listed("reid_folder", str(root), parts["train"], test, cameras, protocol, remarks=tuple(remarks))


def _from_names(root: Path, pattern: str | None) -> tuple[list[NamedImage], list[str]]:
    """Returns the images of a folder, and remarks: the form of their names, and ignored files."""
    fits = [_compiled(pattern)] if pattern is not None else [re.compile(g, re.IGNORECASE) for g in GRAMMARS]
    folders = _part_folders(root)
    ignored: Counter[str] = Counter()
    files = [(part, folder, path) for part, folder in folders for path in _below(folder, ignored)]
    if not files:
        raise DataError(
            f"No images in {root}: expected {FORMS}, in train, query and gallery, in train and test, or in none."
        )
    names = [path[len(str(folder)) + 1 :].replace(os.sep, "/") for _, folder, path in files]
    matched = [[grammar.fullmatch(name) for name in names] for grammar in fits]
    best = next((matches for matches in matched if 2 * sum(map(bool, matches)) >= len(names)), matched[0])
    odd = [path for (_, _, path), match in zip(files, best, strict=True) if match is None]
    if odd:
        wanted = f"the pattern {pattern}" if pattern is not None else FORMS
        raise DataError(
            f"{root}: the names of {counted(len(odd), 'image', 'images')} of {len(files):,} do not fit {wanted}: {few(odd)}. "
            "Rename or remove them, give the option pattern, or write images.csv."
        )
    form = f"the pattern {pattern}"
    if pattern is None:
        form = FORM_OF_GRAMMAR[matched.index(best)]
        if form == FORM_OF_GRAMMAR[-1]:
            _check_identities(root, names)
    note = ignored_note(ignored, str(root), SUFFIXES)
    images = [
        NamedImage(path, groups["identity"], groups.get("camera"), _view(groups.get("view"), path), part)
        for (part, _, path), match in zip(files, best, strict=True)
        if match is not None
        for groups in [match.groupdict()]
    ]
    return images, [f"Names read as {form}.", *([note] if note else [])]


def _check_identities(root: Path, names: Sequence[str]) -> None:
    """Refuses folders that are taken for identities and seem to be cameras.

    Raises:
      DataError: where all are named as cameras, or the folders below repeat from one to the next and
        are more of them.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        first, *deeper = name.split("/")
        folders.setdefault(first, set()).update(deeper[:1] if len(deeper) > 1 else ())
    if all(map(CAMERA_NAME.fullmatch, folders)):
        raise DataError(
            f"{root}: the folders {few(sorted(folders))} are named as cameras, and nothing below them names an identity. "
            f"Expected {FORMS}. If they are identities, give the option pattern=(?P<identity>[^/]+)/.*"
        )
    inner = Counter(name for inside in folders.values() for name in inside)
    repeated = sorted(name for name, count in inner.items() if count > 1)
    if len(inner) > len(folders) and 2 * len(repeated) > len(inner):
        raise DataError(
            f"{root}: the folders {few(sorted(folders))} hold folders of the same names ({few(repeated)}). If the first are "
            "cameras and the second identities, give the option pattern=(?P<camera>[^/]+)/(?P<identity>[^/]+)/.*; if the first "
            "are identities, pattern=(?P<identity>[^/]+)/.*"
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"The option pattern={pattern} is not a regular expression: {error}.") from error
    unknown = sorted(set(compiled.groupindex) - set(GROUPS))
    if unknown or "identity" not in compiled.groupindex:
        raise ConfigError(
            f"The option pattern={pattern} needs the group (?P<identity>…), and may have camera and view; "
            f"it has {', '.join(compiled.groupindex) or 'no named groups'}."
        )
    return compiled


def _part_folders(root: Path) -> list[tuple[str | None, Path]]:
    for names, parts in (
        (MARKET_FOLDERS, ("train", "query", "gallery")),
        (("train", "query", "gallery"), ("train", "query", "gallery")),
        (("train", "test"), ("train", "test")),
    ):
        there = [name for name in names if (root / name).is_dir()]
        if len(there) == len(names):
            return [(part, root / name) for part, name in zip(parts, names, strict=True)]
        if set(there) - {"query"} and not (set(there) == {"train"} and (root / "test").is_dir()):
            absent = [name for name in names if name not in there]
            raise DataError(f"{root} has {', '.join(there)}, but lacks {', '.join(absent)}: all parts are needed.")
    return [(None, root)]


def _below(folder: Path | str, ignored: Counter[str]) -> Iterator[str]:
    """Yields the images below a folder, and counts other entries by kind."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith("."):
            ignored["hidden"] += 1
        elif leads_back(path):
            ignored["links to a folder above them"] += 1
        elif name.lower().endswith(SUFFIXES):
            yield path
        elif os.path.isdir(path):
            yield from _below(path, ignored)
        else:
            ignored[os.path.splitext(name)[1].lower() or "without an ending"] += 1


def _from_csv(file: Path) -> Iterator[NamedImage]:
    try:
        lines = read_text_lines(file)
        separator = separator_of(lines[0], "path") or ","
        rows = list(
            csv.reader((f"{line}\n" for line in lines), strict=True, skipinitialspace=True, delimiter=separator)
        )
    except csv.Error as error:
        raise DataError(f"{file} cannot be read as CSV: {error}.") from error
    header = [name.strip() for name in rows[0]] if rows else []
    unknown = [name for name in header if name not in COLUMNS]
    if unknown or len(set(header)) < len(header) or not {"path", "identity"} <= set(header):
        raise DataError(
            f"{file}, line 1: expected a header of {', '.join(COLUMNS)}, of which path and identity are needed; "
            f"got {', '.join(header) or 'nothing'}.{did_you_mean(unknown[0], COLUMNS) if unknown else ''}"
        )
    images, paths = [], []
    for line, cells in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise DataError(f"{file}, line {line}: {len(cells)} cells, expected {len(header)} ({','.join(header)}).")
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        empty = [name for name in header if not row[name] and name != "view"]
        if empty:
            raise DataError(f"{file}, line {line}: no {empty[0]}.")
        part = row.get("split")
        if part is not None and part not in PARTS:
            raise DataError(f'{file}, line {line}: unknown split "{part}".{did_you_mean(part, PARTS)}')
        path = os.path.join(file.parent, row["path"])
        view = _view(row.get("view") or None, f"{file}, line {line}")
        images.append(NamedImage(path, row["identity"], row.get("camera"), view, part))
        paths.append((line, path))
    check_listed_files(paths, file)
    yield from images


def _view(text: str | None, where: str) -> int:
    if text is None:
        return -1
    if not re.fullmatch(r"-1|\d{1,6}", text):
        raise DataError(f'{where}: a view is a whole number from 0, or -1 where it is unknown; got "{text}".')
    return int(text)
