"""Image sources with random access, and the registry that opens one by its name."""

import functools
from collections.abc import Callable

from drep_jax.data import digits, folder, idx_source, list_file, npz_source, random_images, splits, tfds_source
from drep_jax.data.fits import parse_fit
from drep_jax.data.masks import open_masks
from drep_jax.data.masks.tfds_masks import open_seg_tfds
from drep_jax.data.objects import open_objects
from drep_jax.data.reid import open_reid
from drep_jax.data.source import Source
from drep_jax.errors import ConfigError, lookup

__all__ = ["SOURCES", "Source", "open_source"]


# Another source is one opener: (what follows the colon, split, (height, width), resize, data_dir)
# -> Source.
SOURCES: dict[str, Callable[[str, str, tuple[int, int], str, str | None], Source]] = {
    "ade20k": functools.partial(open_masks, "ade20k"),
    "camvid": functools.partial(open_masks, "camvid"),
    "cityscapes": functools.partial(open_masks, "cityscapes"),
    "coco": functools.partial(open_objects, "coco"),
    "coco_stuff": functools.partial(open_masks, "coco_stuff"),
    "cuhk03": functools.partial(open_reid, "cuhk03"),
    "det_folder": functools.partial(open_objects, "det_folder"),
    "det_npz": functools.partial(open_objects, "det_npz"),
    "det_voc": functools.partial(open_objects, "det_voc"),
    "digits": digits.open_digits,
    "duke": functools.partial(open_reid, "duke"),
    "folder": folder.open_folder,
    "idx": idx_source.open_idx,
    "list": list_file.open_list,
    "market1501": functools.partial(open_reid, "market1501"),
    "msmt17": functools.partial(open_reid, "msmt17"),
    "npz": npz_source.open_npz,
    "random": random_images.open_random,
    "reid_folder": functools.partial(open_reid, "reid_folder"),
    "reid_npz": functools.partial(open_reid, "reid_npz"),
    "reid_tfds": functools.partial(open_reid, "reid_tfds"),
    "seg_folder": functools.partial(open_masks, "seg_folder"),
    "seg_npz": functools.partial(open_masks, "seg_npz"),
    "seg_tfds": open_seg_tfds,
    "tfds": tfds_source.open_tfds,
    "vehicleid": functools.partial(open_reid, "vehicleid"),
    "veri": functools.partial(open_reid, "veri"),
    "voc": functools.partial(open_masks, "voc"),
}


def open_source(
    spec: str, split: str, *, image_size: tuple[int, int], resize: str = "crop", data_dir: str | None = None
) -> Source:
    """Opens a data set for reading.

    Args:
      spec: `digits`, `folder:DIR`, `idx:DIR`, `list:FILE`, `npz:NAME`, `npz:FILE.npz`,
        `tfds:NAME[/config]`, `random:COUNT[:CLASSES]`, or a data set for re-identification:
        `market1501:DIR` (duke, msmt17, cuhk03, vehicleid, veri), `reid_folder:DIR`, `reid_npz:FILE`
        or `reid_tfds:NAME[/config]`, with options as in `?held_out=0.1`; or one with masks:
        `ade20k:DIR` (cityscapes, voc, coco_stuff, camvid), `seg_folder:DIR`, `seg_npz:FILE` or
        `seg_tfds:NAME[/config]`; or one with boxes: `coco:DIR`, `det_voc:DIR`, `det_folder:DIR` or
        `det_npz:FILE`.
      split: `train`, `validation` or `test`.
      image_size: (height, width) in pixels of every image that the source gives.
      resize: `crop` (short side to the target, then the center), `crop:0.875` (so that 87.5 % of
        the short side is kept), `squash` (both sides), `exact` (refuse other sizes), or `pad` (so
        that the image fits, padded at the bottom and on the right). With `keep` every image keeps
        its own size, for evaluation in buckets (`drep_jax.data.buckets`); with `keep:32` it is
        padded up to multiples of 32. See `drep_jax.data.fits`.
      data_dir: where data sets are kept; None means TFDS_DATA_DIR or ~/tensorflow_datasets (tfds),
        DREP_DATA (npz), or that the directory is given in full (idx).

    Raises:
      ConfigError: for an unknown source, split or way of resizing.
      DataError: when the images are absent or not laid out as expected.
    """
    kind, _, argument = spec.partition(":")
    opener = lookup(SOURCES, kind, "data source")
    splits.check_split(split)
    parse_fit(resize)
    if len(image_size) != 2 or min(image_size) < 1:
        raise ConfigError(f"The image size is (height, width), both at least 1; got {tuple(image_size)}.")
    height, width = image_size
    return opener(argument, split, (int(height), int(width)), resize, data_dir)
