"""Pascal VOC: Annotations/NAME.xml, JPEGImages/NAME.jpg, ImageSets/Main/SPLIT.txt.

Its pixels count from 1 and both ends belong to a box: x0 = xmin − 1, x1 = xmax. Difficult objects
are ignored.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from drep_jax.data.objects.listing import Annotated, Counts, ObjectSet, annotated, present
from drep_jax.errors import DataError, did_you_mean

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SPLIT_FILES = {"train": "train", "validation": "val", "test": "test"}


def read_voc(root: Path, options: Mapping[str, str]) -> ObjectSet:
    """Reads DIR, or DIR/VOCdevkit/VOC2012 or VOC2007 below it.

    Raises:
      DataError: for another folder, missing images or annotations, and boxes that cannot be.
    """
    year = options.get("year", "")
    places = [root, *sorted([*root.glob(f"VOC{year or '*'}"), *root.glob(f"VOCdevkit/VOC{year or '*'}")])]
    bases = [place for place in places if (place / "Annotations").is_dir() and (place / "ImageSets/Main").is_dir()]
    if not bases:
        raise DataError(f"{root} is not Pascal VOC: there is no folder Annotations beside ImageSets/Main.")
    if len(bases) > 1:
        listed = ", ".join(base.name for base in bases)
        raise DataError(f"{root} holds {listed}: name one of them, or choose by ?year={bases[-1].name[3:]}.")
    base, counts, number = bases[0], Counts(), 0
    splits: dict[str, list[Annotated]] = {}
    for split, name in SPLIT_FILES.items():
        listing = base / "ImageSets/Main" / f"{name}.txt"
        names = (
            [line.split()[0] for line in listing.read_text().splitlines() if line.strip()] if listing.is_file() else []
        )
        images = [base / "JPEGImages" / f"{stem}.jpg" for stem in names]
        present(images, str(listing), base / "JPEGImages")
        notes = [base / "Annotations" / f"{stem}.xml" for stem in names]
        if split == "test" and not any(note.is_file() for note in notes):
            continue  # its annotations are withheld
        present(notes, str(listing), base / "Annotations")
        splits[split] = []
        for image, note in zip(images, notes, strict=True):
            number += 1
            splits[split].append(read_xml(note, image, number, counts))
    return ObjectSet(str(base), splits, CLASSES, tuple(range(1, len(CLASSES) + 1)), counts.remarks())


def read_xml(file: Path, image: Path, number: int, counts: Counts) -> Annotated:
    """Reads the annotations of one image.

    Raises:
      DataError: naming the file and what is wrong.
    """
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as XML: {error}.") from error
    boxes, classes, difficult = [], [], []
    for entry in tree.iter("object"):
        name = (entry.findtext("name") or "").strip()
        if name not in CLASSES:
            raise DataError(
                f'{file}: "{name}" is none of the 20 classes of Pascal VOC.{did_you_mean(name, CLASSES)} For classes of '
                "your own use det_folder with COCO's JSON."
            )
        low_x, low_y, high_x, high_y = (_number(entry, side, file) for side in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append([low_x - 1, low_y - 1, high_x, high_y])
        classes.append(CLASSES.index(name))
        difficult.append((entry.findtext("difficult") or "0").strip() == "1")
    size = None
    if tree.find("size") is not None:
        size = tuple(int(_number(tree, f"size/{side}", file)) for side in ("height", "width"))
    return annotated(
        image,
        image.name,
        str(file),
        number,
        boxes=boxes,
        classes=classes,
        ignore=difficult,
        size=size,  # type: ignore[arg-type]
        counts=counts,
    )


def _number(tree: ElementTree.Element, name: str, file: Path) -> float:
    text = tree.findtext(f"bndbox/{name}") if "/" not in name else tree.findtext(name)
    try:
        return float(text or "")
    except ValueError:
        if text is not None and text.strip().lower() == "nan":
            return math.nan
        raise DataError(f"{file}: {name} is {text!r}; expected a number.") from None
