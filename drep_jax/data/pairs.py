"""Pairs of a clean and a corrupted image of a scene: DIR/clean/NAME and DIR/corrupted/NAME."""

from collections import Counter
from pathlib import Path

import numpy as np

from drep_jax.data.decode import decode, fit
from drep_jax.data.fits import parse_fit
from drep_jax.data.folder import SUFFIXES, scan
from drep_jax.data.labels import ignored_note
from drep_jax.errors import ConfigError, DataError
from drep_jax.files import expanded

SIDES = ("clean", "corrupted")
SHOWN = 3


class PairedSource:
    """Pairs of images in the order of their names, read on demand.

    Attributes:
      name: as the user gave it.
      names: of the files, relative to the two folders.
      num_classes: None, since pairs have no labels.
      note: which entries of the folders were ignored, or None.
    """

    def __init__(
        self,
        root: Path,
        names: tuple[str, ...],
        image_size: tuple[int, int],
        resize: str,
        note: str | None = None,
    ) -> None:
        self.name = f"pairs:{root}"
        self.note = note
        self.num_classes: int | None = None
        self.names = names
        self._root = root
        self._size = image_size
        self._resize = resize

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        files = {side: str(self._root / side / self.names[index]) for side in SIDES}
        images = {side: decode(file, file) for side, file in files.items()}
        (height, width, _), other = (images[side].shape for side in SIDES)
        if other[:2] != (height, width):
            raise DataError(
                f"{files['clean']} is {height} x {width} pixels (height x width), but {files['corrupted']} is "
                f"{other[0]} x {other[1]}. The two must show the same scene at the same size."
            )
        return {side: fit(image, self._size, self._resize, files[side]) for side, image in images.items()}


def open_pairs(directory: str, image_size: tuple[int, int], resize: str = "crop") -> PairedSource:
    """Opens a folder of pairs. The first pair is read at once, so that a wrong folder fails early.

    Args:
      directory: with the folders `clean` and `corrupted`, which hold images of the same names, in
        the same subfolders.
      image_size: (height, width) in pixels of every image that the source gives.
      resize: a way of `drep_jax.data.fits.transform_of_fit`, the same for both images of a pair.

    Returns:
      A source of `{"clean": uint8 (height, width, 3), "corrupted": likewise}`.

    Raises:
      ConfigError: for an image size below 1, or an unknown way of resizing.
      DataError: when a folder is absent or empty, an image has no partner, or the first pair cannot
        be read.
    """
    parse_fit(resize)
    if len(image_size) != 2 or min(image_size) < 1:
        raise ConfigError(f"The image size is (height, width), both at least 1; got {tuple(image_size)}.")
    if not directory:
        raise ConfigError('Pairs of images need a directory: "pairs:DIR".')
    root = Path(expanded(directory))
    absent = [str(root / side) for side in SIDES if not (root / side).is_dir()]
    if absent:
        raise DataError(
            f"There is no directory {' and no '.join(absent)}. Pairs are DIR/clean/NAME and DIR/corrupted/NAME."
        )
    (clean, ignored), (corrupted, more) = (_names(root / side) for side in SIDES)
    if clean != corrupted:
        raise DataError(
            f"Not every image in {root} has a partner of the same name, ending included. "
            f"{_listed('Only clean', clean - corrupted)} {_listed('Only corrupted', corrupted - clean)} Add or remove them."
        )
    height, width = image_size
    note = ignored_note(ignored + more, str(root), SUFFIXES)
    source = PairedSource(root, tuple(sorted(clean)), (int(height), int(width)), resize, note)
    source[0]
    return source


def _names(base: Path) -> tuple[set[str], Counter[str]]:
    """Returns the images below a folder, and counts of ignored entries by kind."""
    folders = [base]
    ignored: Counter[str] = Counter()
    names: set[str] = set()
    while folders:
        listing = scan(folders.pop())
        folders += listing.folders
        ignored += listing.ignored
        names.update(file.relative_to(base).as_posix() for file in listing.images)
    if not names:
        raise DataError(f"No images in {base}: looked for files ending in {', '.join(SUFFIXES)}.")
    return names, ignored


def _listed(what: str, names: set[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what}: {', '.join(sorted(names)[:SHOWN]) or 'none'}{more}."
