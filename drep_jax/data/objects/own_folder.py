"""Boxes of the user's own: a folder of images with COCO's JSON, or with one text file an image as YOLO has them.

JSON, one a split:                          Text, one a file image:
    DIR/SPLIT/_annotations.coco.json            DIR/images/SPLIT/NAME.jpg, DIR/labels/SPLIT/NAME.txt
    DIR/SPLIT.json, DIR/annotations/SPLIT.json  DIR/images/NAME.jpg, DIR/labels/NAME.txt
    (images in DIR/images/SPLIT, DIR/SPLIT,     DIR/SPLIT/images/NAME.jpg, DIR/SPLIT/labels/NAME.txt
    DIR/images or DIR)                          DIR/SPLIT/NAME.jpg, DIR/SPLIT/NAME.txt; or without SPLIT

A line of text is `class center_x center_y width height`, the last four as fractions of the image; a
sixth number is a confidence and passed over; more are a polygon, of which the box is taken. An
image without a text file has no objects. Names of the classes: classes.txt, NAME.names or "names"
in data.yaml.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from drep_jax.data.decode import stored_size
from drep_jax.data.folder import SUFFIXES
from drep_jax.data.objects.coco import STORED, joined, read_instances
from drep_jax.data.objects.listing import Annotated, Counts, ObjectSet, annotated, class_range
from drep_jax.errors import DataError

SLACK = 0.02
"""Of the image by which a fraction may lie outside 0 … 1; pixels would lie further out."""

_NAMES = re.compile(r"^names[ \t]*:[ \t]*(?:#.*)?(\[[^\]]*\]|(?:\n(?:[ \t]+\S|-[ \t]).*)+)", re.MULTILINE)


def read_det_folder(root: Path, options: Mapping[str, str]) -> ObjectSet:
    """Reads a folder, see the module.

    Raises:
      DataError: if it is neither of the two, or something in it is malformed.
    """
    del options
    if not root.is_dir():
        raise DataError(f"There is no directory {root} (looked for {root.absolute()}).")
    files = _json_files(root)
    if files:
        counts, splits, categories = Counts(), {}, {}
        for split, (file, images) in files.items():
            splits[split], categories[file] = read_instances(file, images, counts)
        return joined(str(root), splits, categories, counts)
    return _read_text(root)


def _json_files(root: Path) -> dict[str, tuple[Path, Path]]:
    """Returns the JSON of each split and the folder of its images."""
    found: dict[str, tuple[Path, Path]] = {}
    for name, split in STORED.items():
        candidates = [
            root / name / "_annotations.coco.json",
            root / f"{name}.json",
            *(root / "annotations" / f"{stem}.json" for stem in (name, f"instances_{name}")),
        ]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            continue
        if split in found:
            raise DataError(f"{found[split][0]} and {file} are both of the split {split}. Remove or rename one.")
        places = [root / name, root / "images" / name, root / "images", root]
        found[split] = (file, next(place for place in places if place.is_dir()))
    alone = [root / "annotations.json", root / "_annotations.coco.json", root / "instances.json"]
    file = next((candidate for candidate in alone if candidate.is_file()), None)
    if file is not None and not found:
        found["train"] = (file, root / "images" if (root / "images").is_dir() else root)
    return found


def _read_text(root: Path) -> ObjectSet:
    folders = _text_folders(root)
    listed = {
        split: sorted(file for file in images.rglob("*") if file.suffix.lower() in SUFFIXES)
        for split, (images, _) in folders.items()
    }
    total = sum(map(len, listed.values()))
    texts = {
        file: folders[split][1] / file.relative_to(folders[split][0]).with_suffix(".txt")
        for split, files in listed.items()
        for file in files
    }
    if not total or not any(text.is_file() for text in texts.values()):
        raise DataError(
            f"{root} holds {total} images and no annotations of them: expected COCO's JSON (DIR/train.json, "
            "DIR/annotations/train.json, DIR/train/_annotations.coco.json or DIR/annotations.json), or a text file an image "
            "(DIR/labels/train/NAME.txt for DIR/images/train/NAME.jpg; docs/data.md)."
        )
    names = _class_names(root)
    lines = {file: _lines(text) for file, text in texts.items()}
    highest = max((label for rows in lines.values() for label, _ in rows), default=0)
    names = names or tuple(map(str, range(highest + 1)))
    counts, number = Counts(), 0
    splits: dict[str, list[Annotated]] = {}
    for split, files in listed.items():
        splits[split] = []
        for file in files:
            number += 1
            class_range([label for label, _ in lines[file]], names, str(texts[file]))
            splits[split].append(_of_text(file, texts[file], root, number, lines[file], counts))
    bare = sum(not text.is_file() for text in texts.values())
    remarks = (*counts.remarks(), *([f"{bare:,} images without a text file have no objects."] if bare else []))
    return ObjectSet(str(root), splits, names, tuple(range(len(names))), remarks)


def _text_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Returns the folders of images and texts of each split."""
    found = {}
    for name, split in STORED.items():
        pairs = [
            (root / "images" / name, root / "labels" / name),
            (root / name / "images", root / name / "labels"),
            (root / name, root / name),
        ]
        pair = next((pair for pair in pairs if pair[0].is_dir()), None)
        if pair:
            found[split] = pair
    if found:
        return found
    return {"train": (root / "images", root / "labels") if (root / "images").is_dir() else (root, root)}


def _class_names(root: Path) -> tuple[str, ...]:
    """Returns the names of the classes that a folder lists; () for none."""
    lists = [root / "classes.txt", *sorted(root.glob("*.names"))]
    for file in lists:
        if file.is_file():
            return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    for file in (root / "data.yaml", root / "dataset.yaml"):
        if file.is_file() and (match := _NAMES.search(file.read_text(encoding="utf-8"))):
            text = match[1].strip()
            parts = text.strip("[]").split(",") if text.startswith("[") else text.splitlines()
            cleaned = (re.sub(r"^(-|\d+\s*:)\s*", "", part.strip()).strip("'\" ") for part in parts)
            return tuple(part for part in cleaned if part)
    return ()


Row = tuple[int, list[float]]


def _lines(file: Path) -> list[Row]:
    """Returns class and box (center and size, as fractions) of each line.

    Raises:
      DataError: naming the line.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        where = f"{file}, line {number}"
        try:
            label, values = int(fields[0]), [float(field) for field in fields[1:]]
        except ValueError as error:
            raise DataError(
                f"{where}: {line[:60]!r}; expected the number of a class and fractions of the image."
            ) from error
        if len(values) >= 6 and len(values) % 2 == 0:
            points = np.array(values).reshape(-1, 2)
            low, high = points.min(axis=0), points.max(axis=0)
            values = [*((low + high) / 2).tolist(), *(high - low).tolist()]
        elif len(values) not in (4, 5):
            raise DataError(f"{where} has {len(fields)} numbers; expected class, center x, center y, width, height.")
        x, y, width, height = values[:4]
        sides = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        if max(sides) > 1 + SLACK or min(sides) < -SLACK:
            hint = " These look like pixels." if max(values[:4]) > 2 else ""
            raise DataError(
                f"{where}: the box {values[:4]} lies outside the image; expected center and size as fractions, from 0 to 1."
                f"{hint}"
            )
        rows.append((label, values[:4]))
    return rows


def _of_text(file: Path, text: Path, root: Path, number: int, rows: list[Row], counts: Counts) -> Annotated:
    height, width = stored_size(file, str(file)) if rows else (0, 0)
    centers = np.array([values for _, values in rows], np.float64).reshape(-1, 4)
    half = centers[:, 2:] / 2
    boxes = np.concatenate([centers[:, :2] - half, centers[:, :2] + half], axis=1) * ([width, height] * 2)
    return annotated(
        file,
        file.relative_to(root).as_posix(),
        str(text),
        number,
        boxes=boxes,
        classes=[label for label, _ in rows],
        size=(height, width) if rows else None,
        counts=counts,
    )
