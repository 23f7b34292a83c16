"""`cityscapes:DIR`: leftImg8bit and gtFine, 19 classes."""

from collections.abc import Mapping
from pathlib import Path

from drep_jax.data.masks.coding import Coding, in_a_row
from drep_jax.data.masks.listing import MaskSet, files_below, paired, root_of
from drep_jax.data.masks.names import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, CITYSCAPES_IDS
from drep_jax.errors import ConfigError, DataError

IMAGE = "_leftImg8bit"
SPLITS = {"train": "train", "validation": "val", "test": "test"}
KINDS = ("labelIds", "labelTrainIds")


def read_cityscapes(path: Path, options: Mapping[str, str]) -> MaskSet:
    """Reads the frames and the fine annotations.

    Args:
      path: of the folder with leftImg8bit and gtFine, or the one that holds it as cityscapes.
      options: `labels`, which masks: labelIds, as published, made training numbers here (the
        default where they are there), or labelTrainIds, as cityscapesscripts writes them.

    Raises:
      DataError: for a folder that is not laid out so.
    """
    root = root_of(path, ("leftImg8bit", "gtFine"), ("cityscapes", "Cityscapes"), "Cityscapes (leftImg8bit, gtFine)")
    annotations = files_below(root / "gtFine")
    there = [kind for kind in KINDS if any(stem.endswith(f"_gtFine_{kind}") for stem in annotations)]
    kind = options.get("labels", there[0] if there else KINDS[0])
    if kind not in KINDS:
        raise ConfigError(f"The option labels={kind} is {' or '.join(KINDS)}.")
    if kind not in there:
        other = sorted({stem.rpartition("_gtFine_")[2] for stem in annotations})[:3]
        raise DataError(
            f"{root / 'gtFine'} has no masks CITY/…_gtFine_{kind}.png; it has {', '.join(other) or 'none at all'}. Those with "
            "instanceIds and color cannot be used."
        )
    ending = f"_gtFine_{kind}"
    splits = {}
    for split, name in SPLITS.items():
        folder = root / "leftImg8bit" / name
        if not folder.is_dir():
            continue
        images = {f"{name}/{stem.removesuffix(IMAGE)}": file for stem, file in files_below(folder).items()}
        masks = {
            stem.removesuffix(ending): file
            for stem, file in annotations.items()
            if stem.startswith(f"{name}/") and stem.endswith(ending)
        }
        splits[split] = paired(images, masks, f"{root}, {name}")
    coding = Coding(CITYSCAPES_IDS, None) if kind == "labelIds" else in_a_row(19)
    remark = f"Masks …{ending}.png."
    return MaskSet(str(root), splits, coding, CITYSCAPES_CLASSES, CITYSCAPES_COLORS, (remark,))
