"""A split of a data set with masks as a source: items with `label`, uint8 (height, width), 255 ignored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drep_jax.data.columns import Column
from drep_jax.data.decode import fitted, fitted_size, stored_size
from drep_jax.data.folder import tenth
from drep_jax.data.geometry import IGNORED
from drep_jax.data.masks.listing import MaskSet, Pair
from drep_jax.data.masks.looking import look
from drep_jax.data.masks.stored_mask import StoredMask
from drep_jax.data.splits import SPLITS, plan
from drep_jax.data.steps import Size
from drep_jax.errors import DataError

LABEL = Column("label", np.uint8, geometry="mask", fill=IGNORED)
"""The form of the labels: a map of the image's pixels."""


class MaskSource:
    """One split, read on demand.

    Attributes:
      columns: the form of its labels; () if the split has none.
      num_classes, class_names: of the set; None if the split has no masks.
      palette: color of each class, (r, g, b); () where none is usual.
      clusters: what images depend on each other, such as a video, int32 (n,), for intervals; None
        where nothing is known.
      stored: the stored split that the images come from.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        listed: MaskSet,
        *,
        labeled: bool,
        name: str,
        note: str | None,
        stored: str,
        image_size: Size,
        resize: str,
        clusters: np.ndarray | None = None,
    ) -> None:
        self.name, self.note, self.stored = name, note, stored
        self.columns = (LABEL,) if labeled else ()
        self.class_names = listed.class_names if labeled else None
        self.num_classes = len(listed.class_names) if labeled else None
        self.palette, self.clusters = listed.palette, clusters
        self.image_size, self.resize = image_size, resize
        self._pairs, self._coding = pairs, listed.coding

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = fitted(self.raw(index), self.image_size, self.resize, self.columns)
        return {name: value for name, value in item.items() if name != "transform"}

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item with the file or bytes of its image, and its mask, which is decoded when it is used."""
        pair = self._pairs[index]
        raw: dict[str, Any] = {"image": pair.image, "where": pair.where}
        if pair.mask is None:
            return raw
        return {**raw, "label": StoredMask(pair.mask, pair.mask_where, self._coding, (pair.image, pair.where))}

    def size_of(self, index: int) -> Size:
        """Returns (height, width) of an image from its header."""
        return fitted_size(self.raw(index), self.image_size, self.resize)

    def original_size_of(self, index: int) -> Size:
        """Returns (height, width) of an image as it is stored, and of its mask."""
        pair = self._pairs[index]
        return stored_size(pair.image, pair.where)


def split_source(listed: MaskSet, split: str, *, name: str, image_size: Size, resize: str) -> MaskSource:
    """Returns a split of a data set with masks.

    Images without a mask are left out of a split in which others have one. A test split without
    masks, or with ignored pixels only, is one without labels.

    Args:
      listed: the data set.
      split: train, validation or test.
      name: as the user gave it.
      image_size: (height, width) in pixels.
      resize: a way of `drep_jax.data.fits.transform_of_fit`.

    Raises:
      DataError: for a split without images, and for masks that cannot be used.
    """
    stored = {kind: listed.splits[kind] for kind in SPLITS if listed.splits.get(kind)}
    looked: dict[str, str | None] = {}

    def note_on(kind: str) -> str | None:
        if kind not in looked:
            looked[kind] = look(
                [pair for pair in stored[kind] if pair.mask is not None],
                listed.coding,
                listed.class_names,
                image_size,
                f"{listed.where}, {kind}",
                ignored_only=kind == "test",
            )
        return looked[kind]

    unlabeled = [kind for kind in stored if all(pair.mask is None for pair in stored[kind])]
    if "test" in stored and "test" not in unlabeled and note_on("test") is None:
        unlabeled.append("test")
    part = plan(stored, split, listed.where, unlabeled)
    pairs = [pair for pair in stored[part.stored] if part.start <= tenth(Path(pair.name)) < part.stop]
    if not pairs:
        raise DataError(
            f"None of the {len(stored[part.stored])} images of {listed.where} falls into the {split} part. Give more images, "
            f"or folders {', '.join(SPLITS)}."
        )
    notes = [part.note, *listed.remarks]
    if part.stored in unlabeled:
        pairs = [pair._replace(mask=None) for pair in pairs]
        notes.append(f"No labels in the stored split {part.stored}.")
    else:
        with_mask = [pair for pair in pairs if pair.mask is not None]
        if len(with_mask) < len(pairs):
            notes.append(f"{len(pairs) - len(with_mask):,} images without a mask are left out.")
        pairs = with_mask
        notes += [listed.coding.words, note_on(part.stored)]
    note = " ".join(filter(None, notes)) or None
    return MaskSource(
        pairs,
        listed,
        labeled=part.stored not in unlabeled,
        name=name,
        note=note,
        stored=part.stored,
        image_size=image_size,
        resize=resize,
        clusters=_numbered([pair.cluster for pair in pairs]),
    )


def _numbered(clusters: Sequence[str]) -> np.ndarray | None:
    """Returns the number of each cluster, in the order of their names; None if nothing is known of them."""
    if not any(clusters):
        return None
    return np.unique(np.array(clusters), return_inverse=True)[1].astype(np.int32)
