"""Data sets for re-identification, read as published: `NAME:DIR?option=value&option=value`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from drep_jax.data.options import parsed
from drep_jax.data.reid import cuhk03, market, msmt17, own_folder, packed, tfds_set, vehicleid, veri
from drep_jax.data.reid.listing import Listed
from drep_jax.data.reid.source import ReidSource, split_source
from drep_jax.data.reid.split import share_of
from drep_jax.errors import lookup
from drep_jax.files import expanded

HELD_OUT = "0.1"


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a data set is read from its folder or file and its options, and their names."""

    read: Callable[[Path, Mapping[str, str]], Listed]
    options: tuple[str, ...] = ()


# Another data set is one reader here, one line in drep_jax/data/__init__.py and, for TFDS, one
# class in builders.py.
READERS: dict[str, Reader] = {
    "market1501": Reader(market.read_market1501, ("distractors",)),
    "duke": Reader(market.read_duke),
    "msmt17": Reader(msmt17.read_msmt17, ("version",)),
    "cuhk03": Reader(cuhk03.read_cuhk03, ("boxes",)),
    "vehicleid": Reader(vehicleid.read_vehicleid, ("size",)),
    "veri": Reader(veri.read_veri, ("views",)),
    "reid_folder": Reader(own_folder.read_reid_folder, ("pattern", "test", "seed")),
    "reid_npz": Reader(packed.read_reid_npz, ("gallery", "test", "seed")),
    "reid_tfds": Reader(tfds_set.read_prepared),
}


def open_reid(
    kind: str, argument: str, split: str, image_size: tuple[int, int], resize: str, data_dir: str | None
) -> ReidSource:
    """Opens a split of a data set for re-identification.

    Args:
      kind: a key of READERS.
      argument: its folder or file, relative to `data_dir` where that is given, and its options
        after a `?`. All take `held_out`, the fraction of the training identities that becomes the
        validation split.
      split, image_size, resize, data_dir: as for `drep_jax.data.open_source`.

    Raises:
      ConfigError: for unknown options.
      DataError: for a data set that is absent, or another one, or not laid out as expected.
    """
    reader = lookup(READERS, kind, "data set for re-identification")
    path, options = parsed(kind, argument, (*reader.options, "held_out"))
    share = share_of(options.pop("held_out", HELD_OUT), "held_out")
    listed = reader.read(Path(expanded(data_dir or "")) / expanded(path), options)
    return split_source(listed, split, share, name=f"{kind}:{argument}", image_size=image_size, resize=resize)
