"""`ade20k:DIR`: ADE20K's 150 classes, the scene parsing challenge's folder ADEChallengeData2016."""

from collections.abc import Mapping
from pathlib import Path

from drep_jax.data.masks.coding import Coding, in_a_row
from drep_jax.data.masks.listing import MaskSet, files_below, paired, root_of
from drep_jax.data.masks.names import ADE20K_CLASSES
from drep_jax.data.masks.options import yes
from drep_jax.data.text import read_text_lines
from drep_jax.errors import DataError

FOLDERS = {"train": "training", "validation": "validation"}
FULL = "*_seg.png"
"""Names of the masks of the full ADE20K, colored by class and instance."""


def read_ade20k(path: Path, options: Mapping[str, str]) -> MaskSet:
    """Reads images/training, annotations/training and the same of validation.

    Args:
      path: of ADEChallengeData2016, or of the folder that it was unpacked into.
      options: `reduce_zero`: yes (the default) where 0 is "other" and 1 … 150 are the classes, as
        published; no where the masks were reduced already: 0 … 149, and 255.

    Raises:
      DataError: for the full ADE20K, and any other folder that is not laid out so.
    """
    try:
        what = "ADEChallengeData2016 (images/training, annotations/training, …)"
        root = root_of(path, ("images", "annotations"), ("ADEChallengeData2016",), what)
    except DataError as error:
        full = next(path.rglob(FULL), None) if path.is_dir() else None
        if full is None:
            raise
        raise DataError(
            f"{path} is the full ADE20K, with masks colored by more than 3,000 classes and their instances, such as "
            f"{full.name}. The 150 classes of the benchmark are in another download, ADEChallengeData2016.zip of the MIT "
            "scene parsing benchmark, with images/training and annotations/training."
        ) from error
    reduce_zero = yes(options.get("reduce_zero", "yes"), "reduce_zero")
    splits = {}
    for split, name in FOLDERS.items():
        images, masks = root / "images" / name, root / "annotations" / name
        if images.is_dir():
            splits[split] = paired(files_below(images), files_below(masks) if masks.is_dir() else {}, f"{root}, {name}")
    return MaskSet(str(root), splits, _coding(reduce_zero), _names(root))


def _coding(reduce_zero: bool) -> Coding:
    if not reduce_zero:
        advice = (
            "With reduce_zero=no the masks were to hold 0 … 149 and 255. They hold 150, so they are as published: leave the "
            "option out."
        )
        return in_a_row(150, advice=advice)
    advice = "As published they hold 0 … 150, where 0 is other. 255 says that they were reduced already: give reduce_zero=no."
    return in_a_row(150, (0,), first=1, advice=advice)


def _names(root: Path) -> tuple[str, ...]:
    """Returns the first name of each class from objectInfo150.txt, or those known here."""
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return ADE20K_CLASSES
    rows = [line.split("\t") for line in read_text_lines(file) if line.strip()][1:]
    names = tuple(row[-1].replace(";", ",").split(",")[0].strip() for row in rows)
    if len(names) != len(ADE20K_CLASSES) or not all(names):
        raise DataError(
            f"{file} has {len(names)} classes; expected 150, a line each, below a header. Restore or remove it."
        )
    return names
