"""Data sets of images with boxes, read as published: `NAME:PLACE?option=value`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from drep_jax.data.objects import coco, own_folder, packed, voc
from drep_jax.data.objects.listing import ObjectSet
from drep_jax.data.objects.source import NO_OBJECT, ObjectSource, object_columns, split_source
from drep_jax.data.options import parsed
from drep_jax.data.steps import Size
from drep_jax.errors import lookup
from drep_jax.files import expanded

__all__ = ["NO_OBJECT", "READERS", "ObjectSource", "Reader", "object_columns", "open_objects"]


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a set is read from its place and its options, and their names."""

    read: Callable[[Path, Mapping[str, str]], ObjectSet]
    options: tuple[str, ...] = ()


# Another set is one reader here and one line in drep_jax/data/__init__.py.
READERS: dict[str, Reader] = {
    "coco": Reader(coco.read_coco, ("year",)),
    "det_folder": Reader(own_folder.read_det_folder),
    "det_npz": Reader(packed.read_packed, ("held_out",)),
    "det_voc": Reader(voc.read_voc, ("year",)),
}


def open_objects(
    kind: str, argument: str, split: str, image_size: Size, resize: str, data_dir: str | None
) -> ObjectSource:
    """Opens a split of a set of images with boxes.

    Args:
      kind: a key of `READERS`.
      argument: its folder or file, relative to `data_dir` where that is given, and its options
        after a `?`.
      split, image_size, resize, data_dir: as for `drep_jax.data.open_source`.

    Raises:
      ConfigError: for unknown options.
      DataError: for a set that is absent, or another one, or annotations that cannot be used.
    """
    reader = lookup(READERS, kind, "set of images with boxes")
    path, options = parsed(kind, argument, reader.options)
    listed = reader.read(Path(expanded(data_dir or "")) / expanded(path), options)
    return split_source(listed, split, name=f"{kind}:{argument}", image_size=image_size, resize=resize)
