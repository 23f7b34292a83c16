"""`voc:DIR`: Pascal VOC, 20 classes and the background, which is a class; 255 is the border and ignored."""

from collections.abc import Mapping
from pathlib import Path

from drep_jax.data.masks.coding import in_a_row
from drep_jax.data.masks.listing import MaskSet, files_below, paired, root_of
from drep_jax.data.masks.names import VOC_CLASSES, voc_colors
from drep_jax.data.masks.options import yes
from drep_jax.data.text import read_text_lines
from drep_jax.errors import DataError

MASKS, AUGMENTED = "SegmentationClass", "SegmentationClassAug"
INNER = ("VOC2012", "VOC2007", "VOCdevkit/VOC2012", "VOCdevkit/VOC2007")


def read_voc(path: Path, options: Mapping[str, str]) -> MaskSet:
    """Reads JPEGImages, SegmentationClass and the lists in ImageSets that name images with masks.

    Args:
      path: of VOC2012 or VOC2007, or of a folder that it lies in.
      options: `aug`: yes to train on the list trainaug with the masks SegmentationClassAug, made
        from SBD.

    Raises:
      DataError: for a folder that is not laid out so.
    """
    augmented = yes(options.get("aug", "no"), "aug")
    folder = AUGMENTED if augmented else MASKS
    root = root_of(path, ("JPEGImages", folder), INNER, f"Pascal VOC (JPEGImages, {folder}, ImageSets)")
    lists = next(iter(sorted((root / "ImageSets").glob("Seg*"))), root / "ImageSets")
    images, masks = files_below(root / "JPEGImages"), files_below(root / folder)
    splits = {}
    for split, name in {"train": "trainaug" if augmented else "train", "validation": "val", "test": "test"}.items():
        file = lists / f"{name}.txt"
        if not file.is_file():
            if split == "train":
                raise DataError(f"{root} has no list {file}, which names the images to train on.")
            continue
        # Lists of SBD name image and mask by their paths.
        listed = [Path(line.split()[0]).stem for line in read_text_lines(file) if line.strip()]
        absent = [stem for stem in listed if stem not in images]
        if absent:
            raise DataError(
                f"{file} lists {len(absent):,} of {len(listed):,} images that are not in {root / 'JPEGImages'}, such as "
                f"{absent[0]}."
            )
        with_mask = {stem: masks[stem] for stem in listed if stem in masks}
        splits[split] = paired({stem: images[stem] for stem in listed}, with_mask, f"{root}, {name}")
    remarks = ('The background, 0, is a class ("background").',)
    return MaskSet(str(root), splits, in_a_row(21), VOC_CLASSES, voc_colors(21), remarks)
