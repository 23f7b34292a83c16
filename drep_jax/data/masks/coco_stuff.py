"""`coco_stuff:DIR`: COCO-Stuff 164k, 171 classes."""

from collections.abc import Mapping
from pathlib import Path

from drep_jax.data.masks.coding import Coding, in_a_row
from drep_jax.data.masks.listing import MaskSet, files_below, paired
from drep_jax.data.masks.names import COCO_CATEGORIES, COCO_REMOVED
from drep_jax.errors import DataError

IMAGES = ("images", ".")
MASKS = ("stuffthingmaps", "annotations", "stuffthingmaps_trainval2017")
SPLITS = {"train": "train2017", "validation": "val2017"}
TRAIN_IDS = "_labelTrainIds"
KEPT = tuple(number for number in range(1, len(COCO_CATEGORIES) + 1) if number not in COCO_REMOVED)
"""Numbers of the categories that are classes."""


def read_coco_stuff(path: Path, options: Mapping[str, str]) -> MaskSet:
    """Reads images/train2017, stuffthingmaps/train2017 or annotations/train2017, and the same of val2017.

    Masks are those of stuffthingmaps_trainval2017.zip, which hold the number of the category less
    one, or `…_labelTrainIds.png`, which hold 0 … 170.

    Raises:
      DataError: for a folder that is not laid out so.
    """
    del options
    if not path.is_dir():
        raise DataError(f"There is no directory {path} (looked for {path.absolute()}).")
    splits, train_ids = {}, False
    for split, name in SPLITS.items():
        images, folders = _folder(path, IMAGES, name), _folder(path, MASKS, name)
        if images is None:
            continue
        masks = files_below(folders) if folders is not None else {}
        train_ids |= any(stem.endswith(TRAIN_IDS) for stem in masks)
        if train_ids:
            masks = {stem.removesuffix(TRAIN_IDS): file for stem, file in masks.items() if stem.endswith(TRAIN_IDS)}
        splits[split] = paired(files_below(images), masks, f"{path}, {name}")
    if not splits or all(pair.mask is None for pairs in splits.values() for pair in pairs):
        raise DataError(
            f"{path} is not laid out as COCO-Stuff 164k: expected images/train2017, and masks in "
            f"{' or '.join(f'{folder}/train2017' for folder in MASKS)}; the same of val2017."
        )
    advice = (
        "The masks are those of stuffthingmaps_trainval2017.zip; pixel maps of stuff alone (92 … 183) and panoptic PNG are "
        "other downloads."
    )
    classes = tuple(COCO_CATEGORIES[number - 1] for number in KEPT)
    if train_ids:
        return MaskSet(
            str(path), splits, in_a_row(len(KEPT), advice=advice), classes, remarks=(f"Masks …{TRAIN_IDS}.png.",)
        )
    coding = Coding(tuple(number - 1 for number in KEPT), frozenset({255}), advice=advice)
    return MaskSet(str(path), splits, coding, classes)


def _folder(root: Path, names: tuple[str, ...], split: str) -> Path | None:
    return next((root / name / split for name in names if (root / name / split).is_dir()), None)
