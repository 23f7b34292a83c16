"""COCO: instances_SPLIT.json, and the folder of a data set (https://cocodataset.org/#format-data).

Boxes are x, y, width, height from the image's corner. Categories become classes 0, 1, … in the
order of their numbers, so COCO's 1 to 90 become its 80 contiguous classes.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drep_jax.data.objects.listing import Annotated, Counts, ObjectSet, annotated, no_duplicates, present
from drep_jax.errors import ConfigError, DataError

STORED = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""Names of splits in files ↦ ours."""

_INSTANCES = re.compile(r"instances_(train|val)(\d*)\.json")


def read_coco(root: Path, options: Mapping[str, str]) -> ObjectSet:
    """Reads DIR/annotations/instances_{train,val}YEAR.json with the images in DIR/{train,val}YEAR or DIR/images/….

    Args:
      root: DIR.
      options: "year" where there are several.

    Raises:
      DataError: if something is missing or malformed.
      ConfigError: for a year that is not there, or has to be given.
    """
    folder = root / "annotations"
    found = sorted(
        (match[2], match[1], file)
        for file in (folder.iterdir() if folder.is_dir() else ())
        if (match := _INSTANCES.fullmatch(file.name))
    )
    years = sorted({year for year, _, _ in found})
    if not found:
        raise DataError(f"There is no {folder}/instances_train2017.json or instances_val2017.json: {root} is not COCO.")
    year = options.get("year", years[0])
    if year not in years or (len(years) > 1 and "year" not in options):
        raise ConfigError(f"{root} has annotations of {', '.join(years)}: choose by ?year={years[-1]}.")
    counts, splits, categories = Counts(), {}, {}
    for of, split, file in found:
        if of == year:
            places = (root / f"{split}{year}", root / "images" / f"{split}{year}")
            images = next((place for place in places if place.is_dir()), None)
            if images is None:
                raise DataError(f"There is no folder {places[0]} or {places[1]} with the images of {file.name}.")
            splits[STORED[split]], categories[file] = read_instances(file, images, counts)
    return joined(str(root), splits, categories, counts)


def joined(
    where: str,
    splits: Mapping[str, list[Annotated]],
    categories: Mapping[Path, dict[int, str]],
    counts: Counts,
) -> ObjectSet:
    """Returns a set of several files, which have to agree on the categories."""
    (first, table), *others = categories.items()
    for file, other in others:
        if other != table:
            differing = sorted(set(table.items()) ^ set(other.items()))[:3]
            raise DataError(
                f"{first} and {file} list different categories, such as {differing}. They are of one data set?"
            )
    ids = tuple(sorted(table))
    return ObjectSet(where, splits, tuple(table[number] for number in ids), ids, counts.remarks())


def read_instances(file: Path, folder: Path, counts: Counts) -> tuple[list[Annotated], dict[int, str]]:
    """Reads one file of annotations.

    Args:
      file: JSON with "images", "annotations" and "categories".
      folder: of the images.
      counts: adds what is left out.

    Returns:
      The images, by number, and the name of each category by its number.

    Raises:
      DataError: naming the entry and what is wrong: no such file, no JSON, a number that is there
        twice, an annotation number below 1, an annotation of an unknown image or category, a box
        that cannot be, missing images.
    """
    content = _json(file)
    images, objects, categories = (_entries(content, key, file) for key in ("images", "annotations", "categories"))
    where = str(file)
    table = {_whole(entry, "id", where, "categories"): str(entry.get("name", entry["id"])) for entry in categories}
    no_duplicates([entry["id"] for entry in categories], "category id", where)
    classes = {number: place for place, number in enumerate(sorted(table))}
    sizes = {}
    for entry in images:
        number = _whole(entry, "id", where, "images")
        if number in sizes:
            raise DataError(f"{where}: the image id {number} is there twice. Each needs its own.")
        sizes[number] = (_whole(entry, "height", where, "images"), _whole(entry, "width", where, "images"))
    names = {entry["id"]: str(entry.get("file_name", "")) for entry in images}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    ids = []
    for entry in objects:
        number = _whole(entry, "id", where, "annotations")
        image, category = (_whole(entry, key, where, "annotations") for key in ("image_id", "category_id"))
        ids.append(number)
        if number < 1:
            raise DataError(
                f"{where}: annotation id {number}; they start at 1, because COCO's own evaluation takes 0 for no match. "
                "Add 1 to all."
            )
        if image not in sizes:
            raise DataError(
                f"{where}: annotation {number} is of image {image}, which is none of its {len(sizes):,} images. Is it a mix "
                "of two splits?"
            )
        if category not in table:
            raise DataError(f"{where}: annotation {number} has the category {category}, which it does not list.")
        by_image[image].append(entry)
    no_duplicates(ids, "annotation id", where)
    files = {number: folder / name for number, name in names.items()}
    present(list(files.values()), where, folder)
    result = []
    for number in sorted(sizes):
        mine = by_image[number]
        boxes = [_box(entry, where) for entry in mine]
        result.append(
            annotated(
                files[number],
                names[number],
                str(files[number]),
                number,
                boxes=[[x, y, x + width, y + height] for x, y, width, height in boxes],
                classes=[classes[entry["category_id"]] for entry in mine],
                crowd=[bool(entry.get("iscrowd", 0)) for entry in mine],
                ignore=[bool(entry.get("ignore", 0)) for entry in mine],
                area=[float(entry.get("area", math.nan)) for entry in mine],
                size=sizes[number],
                counts=counts,
                outlines=[_outline(entry) for entry in mine],
                labels=[f"annotation {entry['id']}" for entry in mine],
            )
        )
    return result, table


def _json(file: Path) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(
            f'{file} is a JSON {type(content).__name__}; expected an object with "images" and "annotations".'
        )
    return content


def _entries(content: Mapping[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        have = ", ".join(sorted(content)) or "nothing"
        raise DataError(f'{file} has no list of "{key}" (it has {have}): it holds no instances as COCO writes them.')
    if not entries and key != "annotations":
        raise DataError(f'{file}: its list of "{key}" is empty.')
    return entries


def _whole(entry: Mapping[str, Any], key: str, where: str, of: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f'{where}: an entry of "{of}" has "{key}": {value!r}; expected a whole number.')
    return value


def _outline(entry: Mapping[str, Any]) -> Any:
    """Returns the polygons or runs of an object, which are the one value whose name begins with "segment"; or None."""
    return next((value for name, value in entry.items() if name.startswith("segment")), None) or None


def _box(entry: Mapping[str, Any], where: str) -> list[float]:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise DataError(f'{where}: annotation {entry["id"]} has "bbox": {box!r}; expected x, y, width, height.')
    return [float(value) for value in box]
