"""Pairs of a clean and a corrupted image of a scene, and noisy images without clean ones, fitted to a size."""

from typing import Any

import numpy as np

from drep_jax.data.decode import fit
from drep_jax.data.fits import pads, parse_fit, picture_size, transform_of_fit
from drep_jax.data.options import parsed
from drep_jax.data.stored import CLEAN, CORRUPTED, Stored, stored_images, stored_pairs
from drep_jax.errors import ConfigError


class PairedSource:
    """Pairs of images in the order of their names, read on demand.

    Attributes:
      name: as the user gave it.
      names: of the pairs, relative to the two folders.
      num_classes: None, since pairs have no labels.
      note: which entries of the folders were ignored, or None.
    """

    def __init__(self, name: str, stored: Stored, image_size: tuple[int, int], resize: str) -> None:
        self.name, self.note = name, stored.note
        self.num_classes: int | None = None
        self.names = tuple(stored.columns["name"].tolist())
        self._stored = stored
        self._size, self._resize = image_size, resize

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        images = dict(zip((CLEAN, CORRUPTED), self._stored.pair(index), strict=True))
        fitted = {
            side: fit(image, self._size, self._resize, self._stored.where(index, side))
            for side, image in images.items()
        }
        if not pads(self._resize):
            return fitted
        transform = transform_of_fit(images[CLEAN].shape[:2], self._size, self._resize)
        return {**fitted, "size": np.array(picture_size(transform), np.int32)}


class NoisySource:
    """Noisy images without labels, read on demand.

    Attributes:
      name: as the user gave it.
      num_classes, class_names: None.
      note: which entries of the folder were ignored, or None.
    """

    def __init__(self, name: str, stored: Stored, image_size: tuple[int, int], resize: str) -> None:
        self.name, self.note = name, stored.note
        self.num_classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        self.image_size, self.resize = image_size, resize
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        where = self._stored.where(index)
        return {"image": fit(self._stored.image(index), self.image_size, self.resize, where)}

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item as it is stored, decoded."""
        return {"image": self._stored.image(index), "where": self._stored.where(index)}


def open_pairs(place: str, image_size: tuple[int, int], resize: str = "crop") -> PairedSource:
    """Opens pairs. The first pair is read at once, so that a wrong folder fails early.

    Args:
      place: a directory with the folders `clean` and `corrupted`, which hold images of the same
        names, in the same subfolders; or FILE.npz (`drep_jax.data.stored`). Options choose some:
        "FILE.npz?camera=Sony+Canon*".
      image_size: (height, width) in pixels of every image that the source gives.
      resize: a way of `drep_jax.data.fits.transform_of_fit`, the same for both images of a pair.

    Returns:
      A source of `{"clean": uint8 (height, width, 3), "corrupted": likewise}`; where `resize` pads,
      with "size", int32 (2,), the height and width without padding.

    Raises:
      ConfigError: for an image size below 1, an unknown way of resizing, or an unknown column.
      DataError: when a folder is absent or empty, an image has no partner, or the first pair cannot
        be read.
    """
    size = _checked_size(image_size, resize)
    if not place:
        raise ConfigError('Pairs of images need a directory: "pairs:DIR".')
    path, filters = parsed("pairs", place)
    source = PairedSource(f"pairs:{place}", stored_pairs(path).chosen(filters), size, resize)
    source[0]
    return source


def open_noisy(place: str, image_size: tuple[int, int], resize: str = "crop") -> NoisySource:
    """Opens noisy images that have no clean ones beside them; the first is read at once.

    Args:
      place: a directory, with all images below it, or FILE.npz, whose noisy side is taken.
      image_size, resize: as for `open_pairs`.

    Raises:
      ConfigError, DataError: as `open_pairs`.
    """
    size = _checked_size(image_size, resize)
    path, filters = parsed("unpaired", place)
    source = NoisySource(f"unpaired:{place}", stored_images(path).chosen(filters), size, resize)
    source[0]
    return source


def _checked_size(image_size: tuple[int, int], resize: str) -> tuple[int, int]:
    parse_fit(resize)
    if len(image_size) != 2 or min(image_size) < 1:
        raise ConfigError(f"The image size is (height, width), both at least 1; got {tuple(image_size)}.")
    height, width = image_size
    return int(height), int(width)
