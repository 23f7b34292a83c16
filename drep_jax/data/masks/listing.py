"""What a reader of masks gives: pairs of image and mask by stored split, the coding, and names."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from drep_jax.data.folder import SUFFIXES, scan
from drep_jax.data.masks.coding import Coding
from drep_jax.data.masks.stored_mask import Stored
from drep_jax.errors import DataError

SHOWN = 5


class Pair(NamedTuple):
    """An image and its mask.

    Attributes:
      name: of the image within its set; images are divided by it where a split is missing.
      image: file, or bytes.
      mask: file, or bytes; None for an image without one.
      where, mask_where: what to call them in messages.
      cluster: what images depend on each other, such as a video; "" where nothing is known.
    """

    name: str
    image: Stored
    mask: Stored | None
    where: str
    mask_where: str
    cluster: str = ""


@dataclasses.dataclass(frozen=True)
class MaskSet:
    """A data set of images with masks.

    Attributes:
      where: the folder or file.
      splits: pairs of each stored split: train, validation, test.
      coding: which label a stored value stands for.
      class_names: one a class.
      palette: color of each class, (r, g, b); () where none is usual.
      remarks: sentences for the user.
    """

    where: str
    splits: Mapping[str, Sequence[Pair]]
    coding: Coding
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] = ()
    remarks: tuple[str, ...] = ()


def files_below(folder: Path) -> dict[str, Path]:
    """Returns the images below a folder by their path relative to it without ending, in order.

    Raises:
      DataError: for two files that differ in their ending only.
    """
    folders, files = [folder], []
    while folders:
        listing = scan(folders.pop())
        folders += listing.folders
        files += listing.images
    by_stem: dict[str, Path] = {}
    for file in sorted(files):
        stem = file.relative_to(folder).with_suffix("").as_posix()
        if stem in by_stem:
            raise DataError(
                f"{folder} holds both {by_stem[stem].name} and {file.name}; pairs go by the name without its ending. Keep one."
            )
        by_stem[stem] = file
    return by_stem


def paired(images: Mapping[str, Path], masks: Mapping[str, Path], where: str) -> list[Pair]:
    """Returns pairs of images and masks of the same key.

    Args:
      images, masks: files by what they have in common, such as the name without ending.
      where: what to call the split in messages.

    Returns:
      Pairs in the order of the images; without masks if there are none at all.

    Raises:
      DataError: for images without a mask and masks without an image, counted and listed; and for
        no images.
    """
    if not images:
        raise DataError(f"No images in {where}: looked for files ending in {', '.join(SUFFIXES)}.")
    if not masks:
        return [Pair(name, file, None, str(file), "") for name, file in images.items()]
    alone, stray = [name for name in images if name not in masks], [name for name in masks if name not in images]
    if alone or stray:
        raise DataError(
            f"{where}: {len(alone):,} of {len(images):,} images have no mask{_some(alone)}, and {len(stray):,} of "
            f"{len(masks):,} masks no image{_some(stray)}. Image and mask have the same name, ending apart. Add what is "
            "missing or remove the rest."
        )
    return [Pair(name, file, masks[name], str(file), str(masks[name])) for name, file in images.items()]


def root_of(base: Path, needed: Sequence[str], inner: Iterable[str], what: str) -> Path:
    """Returns the folder that holds these entries: the one given, or one of those in it.

    Args:
      base: as the user gave it.
      needed: names that are to be there.
      inner: folders of `base` to look in, too.
      what: the data set, for messages.

    Raises:
      DataError: for a folder that is absent, or lacks them.
    """
    if not base.is_dir():
        raise DataError(f"There is no directory {base} (looked for {base.absolute()}).")
    for folder in [base, *(base / name for name in inner)]:
        if all((folder / name).exists() for name in needed):
            return folder
    there = sorted(path.name for path in base.iterdir())[:SHOWN]
    raise DataError(
        f"{base} is not laid out as {what}: expected {', '.join(needed)} in it; it has {', '.join(there) or 'nothing'}."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f" ({', '.join(names[:SHOWN])}{more})" if names else ""
