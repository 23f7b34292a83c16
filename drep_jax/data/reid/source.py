"""A split of a data set for re-identification as a source; its labels need no decoding."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from drep_jax.data.decode import fitted, fitted_size
from drep_jax.data.reid.listing import Entry, Listed, checked, in_order, note_of
from drep_jax.data.reid.split import held_out
from drep_jax.errors import DataError


class ReidSource:
    """One split: images with label, camera and view, in the test split also query and gallery.

    Attributes:
      table: the columns of the items without the images, int32 (n,) by name.
      protocol: how the data set is evaluated.
      cameras, views: numbers of those in the data set, over all splits; 0 views where none is
        known.
      attributes: other labels, int32 (n,) by name, -1 where unknown.
    """

    def __init__(
        self, listed: Listed, split: str, share: Fraction, *, name: str, image_size: tuple[int, int], resize: str
    ) -> None:
        entries, identities = _part(listed, split, share)
        self.name = name
        seen = len({entry.identity for entry in entries})
        remark = {"train": f" {seen} identities to learn from.", "validation": f" {seen} of them held out.", "test": ""}
        self.note: str | None = note_of(listed, split) + remark[split]
        self.num_classes: int | None = len(identities)
        self.class_names: tuple[str, ...] | None = tuple(identities)
        self.protocol, self.cameras, self.views = listed.protocol, listed.cameras, listed.views
        self.table = _table(entries, identities, test=split == "test")
        names = sorted({name for entry in entries for name in entry.attributes})
        self.attributes = {
            name: np.array([entry.attributes.get(name, -1) for entry in entries], np.int32) for name in names
        }
        self.image_size = image_size
        self._entries = entries
        self.resize = resize

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return fitted(self.raw(index), self.image_size, self.resize)

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image from its header."""
        return fitted_size(self.raw(index), self.image_size, self.resize)

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item with the file or the bytes of its image, and "where", what to call it."""
        entry = self._entries[index]
        stored = entry.image() if callable(entry.image) else entry.image
        return {
            "image": stored,
            "where": entry.where,
            **{name: values[index] for name, values in self.table.items()},
        }


def split_source(
    listed: Listed, split: str, share: Fraction, *, name: str, image_size: tuple[int, int], resize: str
) -> ReidSource:
    """Returns a split of a data set that passes the checks.

    Args:
      listed: the data set.
      split: train, validation or test.
      share: fraction of the training identities that is held out for validation.
      name: as the user gave it.
      image_size: (height, width) in pixels.
      resize: a way of `drep_jax.data.fits.transform_of_fit`.

    Raises:
      DataError: for a data set that cannot be trained with or evaluated on, and for a split without
        images.
    """
    return ReidSource(checked(listed), split, share, name=name, image_size=image_size, resize=resize)


def _part(listed: Listed, split: str, share: Fraction) -> tuple[Sequence[Entry], list[str]]:
    """Returns the images of a split, and the names of its identities by label."""
    if split == "test":
        return listed.test, in_order(entry.identity for entry in listed.test)
    identities = in_order(entry.identity for entry in listed.train)
    validation = held_out(identities, share)
    wanted = split == "validation"
    entries = [entry for entry in listed.train if (entry.identity in validation) == wanted]
    if not entries and not (wanted and share == 0):  # nothing is held out, as requested
        problem = f"held_out={float(share):g} of {len(identities)} training identities leaves none for {split}"
        raise DataError(f"{listed.title} in {listed.where}: {problem}. Choose another fraction, from 0 to below 1.")
    return entries, identities


def _table(entries: Sequence[Entry], identities: Sequence[str], *, test: bool) -> dict[str, np.ndarray]:
    numbers = {identity: number for number, identity in enumerate(identities)}
    columns: dict[str, list[int]] = {
        "label": [numbers[entry.identity] for entry in entries],
        "camera": [entry.camera for entry in entries],
        "view": [entry.view for entry in entries],
    }
    if test:
        columns |= {"query": [entry.query for entry in entries], "gallery": [entry.gallery for entry in entries]}
    return {name: np.array(values, np.int32) for name, values in columns.items()}
