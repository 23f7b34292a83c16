"""Data sets of images with masks, read as published: `NAME:DIR?option=value&option=value`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from drep_jax.data.masks import ade20k, camvid, cityscapes, coco_stuff, own_folder, packed, voc
from drep_jax.data.masks.listing import MaskSet
from drep_jax.data.masks.source import MaskSource, split_source
from drep_jax.data.options import parsed
from drep_jax.data.steps import Size
from drep_jax.errors import lookup
from drep_jax.files import expanded


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a data set is read from its folder or file and its options, and their names."""

    read: Callable[[Path, Mapping[str, str]], MaskSet]
    options: tuple[str, ...] = ()


# Another data set is one reader here and one line in drep_jax/data/__init__.py.
READERS: dict[str, Reader] = {
    "ade20k": Reader(ade20k.read_ade20k, ("reduce_zero",)),
    "camvid": Reader(camvid.read_camvid, ("cluster",)),
    "cityscapes": Reader(cityscapes.read_cityscapes, ("labels",)),
    "coco_stuff": Reader(coco_stuff.read_coco_stuff),
    "seg_folder": Reader(own_folder.read_seg_folder, own_folder.OPTIONS),
    "seg_npz": Reader(packed.read_packed, ("ignore",)),
    "voc": Reader(voc.read_voc, ("aug",)),
}


def open_masks(kind: str, argument: str, split: str, image_size: Size, resize: str, data_dir: str | None) -> MaskSource:
    """Opens a split of a data set with masks.

    Args:
      kind: a key of READERS.
      argument: its folder or file, relative to `data_dir` where that is given, and its options
        after a `?`.
      split, image_size, resize, data_dir: as for `drep_jax.data.open_source`.

    Raises:
      ConfigError: for unknown options.
      DataError: for a data set that is absent, or another one, or masks that cannot be used.
    """
    reader = lookup(READERS, kind, "data set with masks")
    path, options = parsed(kind, argument, reader.options)
    listed = reader.read(Path(expanded(data_dir or "")) / expanded(path), options)
    return split_source(listed, split, name=f"{kind}:{argument}", image_size=image_size, resize=resize)
