"""A split of a data set for re-identification as a source of images: labels, cameras and views without decoding."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from drep_jax.data.decode import fitted, fitted_size
from drep_jax.data.reid.listing import Entry, Listed, checked, in_order, note_of
from drep_jax.data.reid.split import held_out
from drep_jax.errors import DataError


class ReidSource:
    """One split: images with label, camera and view; of the test split also whether they are queries and in the gallery.

    Attributes:
      table: all of that but the images, int32 (n,) each, by the names that items have.
      protocol: how the data set is evaluated.
      cameras, views: how many the data set has, over all its splits; 0 views where none is known.
      attributes: what else is known of the images, int32 (n,) by name, -1 where it is not.
    """

    def __init__(
        self, listed: Listed, split: str, share: Fraction, *, name: str, image_size: tuple[int, int], resize: str
    ) -> None:
        entries, identities = _part(listed, split, share)
        self.name = name
        seen = len({entry.identity for entry in entries})
        told = {"train": f" {seen} identities to learn from.", "validation": f" {seen} of them held out.", "test": ""}
        self.note: str | None = note_of(listed, split) + told[split]
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
        """Returns the file or the bytes of an image instead of its pixels, with "where", what to call it."""
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
    """Returns a split of a data set, once that has passed the checks.

    Args:
      listed: the data set.
      split: train, validation or test.
      share: of the training identities, which is held out for validation.
      name: what the user asked for.
      image_size: (height, width) in pixels.
      resize: how images get it.

    Raises:
      DataError: for a data set that cannot be trained with or evaluated on, and for a split without images.
    """
    return ReidSource(checked(listed), split, share, name=name, image_size=image_size, resize=resize)


def _part(listed: Listed, split: str, share: Fraction) -> tuple[Sequence[Entry], list[str]]:
    """Returns the images of a split and the names of all identities that its labels number."""
    if split == "test":
        return listed.test, in_order(entry.identity for entry in listed.test)
    identities = in_order(entry.identity for entry in listed.train)
    validation = held_out(identities, share)
    wanted = split == "validation"
    entries = [entry for entry in listed.train if (entry.identity in validation) == wanted]
    if not entries and not (wanted and share == 0):  # nothing is held out because nothing was asked for
        told = f"held_out={float(share):g} of {len(identities)} training identities leaves none for {split}"
        raise DataError(f"{listed.title} in {listed.where}: {told}. Choose another share, from 0 to below 1.")
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
