"""Images as they are stored, before they get a size: folders of images or of pairs, or one `.npz` file."""

import fnmatch
import itertools
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drep_jax.data.arrays import text_of
from drep_jax.data.decode import as_rgb, decode
from drep_jax.data.folder import SUFFIXES, scan
from drep_jax.data.labels import ignored_note
from drep_jax.errors import ConfigError, DataError, DrepError, did_you_mean
from drep_jax.files import expanded

CLEAN, CORRUPTED = "clean", "corrupted"
SIDES = (CLEAN, CORRUPTED)
MEMBERS = {CLEAN: ("clean", "mean"), CORRUPTED: ("corrupted", "noisy", "real")}
"""Side of a pair ↦ the names that its images may have in an `.npz` file."""
ENCODED = ("webp", "jpeg", "png")
SHOWN = 3


class Stored:
    """Images or pairs of images, decoded on demand.

    Attributes:
      name: the place, as the user gave it.
      columns: what is known of each image, text (n,) by name; "name" is always there.
      note: which entries of the folders were ignored, or None.
    """

    def __init__(
        self,
        name: str,
        images: Mapping[str, Sequence[Any]],
        columns: Mapping[str, np.ndarray],
        note: str | None = None,
    ) -> None:
        self.name, self.note = name, note
        self.columns = dict(columns)
        self._images = dict(images)

    def __len__(self) -> int:
        return len(self.columns["name"])

    def image(self, index: int, side: str = CORRUPTED) -> np.ndarray:
        """Returns one image, uint8 (H, W, 3).

        Raises:
          DataError: if it cannot be read.
        """
        stored, where = self._images[side][index], self.where(index, side)
        return as_rgb(stored, where) if isinstance(stored, np.ndarray) else decode(stored, where)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the clean and the corrupted image of a pair, uint8 (H, W, 3).

        Raises:
          DataError: if one cannot be read, or if the two differ in size.
        """
        clean, corrupted = (self.image(index, side) for side in SIDES)
        (height, width), other = clean.shape[:2], corrupted.shape[:2]
        if other != (height, width):
            raise DataError(
                f"{self.where(index, CLEAN)} is {height} x {width} pixels (height x width), but "
                f"{self.where(index, CORRUPTED)} is {other[0]} x {other[1]}. The two must show the same scene at the same size."
            )
        return clean, corrupted

    def where(self, index: int, side: str = CORRUPTED) -> str:
        """Returns what to call an image in messages."""
        stored = self._images[side][index]
        return str(stored) if isinstance(stored, Path) else f"{self.name}: {side} {self.columns['name'][index]}"

    def chosen(self, filters: Mapping[str, str]) -> "Stored":
        """Returns the images whose columns match.

        Args:
          filters: column ↦ patterns joined by `+`, such as "Canon*+Sony"; all columns must match.

        Raises:
          ConfigError: for a column that there is not.
          DataError: if no image matches, with the values that there are.
        """
        places = np.arange(len(self))
        for column, patterns in filters.items():
            if column not in self.columns:
                raise ConfigError(
                    f'{self.name} has no column "{column}" to choose images by; there is {", ".join(self.columns)}.'
                    f"{did_you_mean(column, self.columns)}"
                )
            values = self.columns[column]
            matched = [
                place
                for place in places
                if any(fnmatch.fnmatchcase(values[place], pattern) for pattern in patterns.split("+"))
            ]
            if not matched:
                examples = list(dict.fromkeys(values.tolist()))[:SHOWN]
                raise DataError(
                    f'{self.name}: no image has a "{column}" like "{patterns}" (and fits the other choices). Values are '
                    f"{', '.join(examples)}, …"
                )
            places = np.array(matched)
        images = {side: [stored[int(place)] for place in places] for side, stored in self._images.items()}
        columns = {name: values[places] for name, values in self.columns.items()}
        return Stored(self.name, images, columns, self.note)


def stored_pairs(place: str) -> Stored:
    """Opens pairs: a folder with DIR/clean/NAME and DIR/corrupted/NAME, or FILE.npz.

    In a file each side is an array uint8 (n, H, W, 3) called `clean` (or `mean`) and `corrupted`
    (or `noisy`, `real`), or encoded images one behind the other: `clean_jpeg` (png, webp), uint8,
    with `clean_offsets`, (n + 1,). Other arrays of n entries are columns to choose by.

    Raises:
      DataError: when a folder or the file is absent or empty, or an image has no partner.
    """
    if place.endswith(".npz"):
        return _read_file(place, SIDES)
    root = Path(expanded(place))
    absent = [str(root / side) for side in SIDES if not (root / side).is_dir()]
    if absent:
        raise DataError(
            f"There is no directory {' and no '.join(absent)}. Pairs are DIR/clean/NAME and DIR/corrupted/NAME."
        )
    (clean, ignored), (corrupted, more) = (names_below(root / side) for side in SIDES)
    if clean != corrupted:
        raise DataError(
            f"Not every image in {root} has a partner of the same name, ending included. "
            f"{_listed('Only clean', clean - corrupted)} {_listed('Only corrupted', corrupted - clean)} Add or remove them."
        )
    names = sorted(clean)
    images = {side: [root / side / name for name in names] for side in SIDES}
    return Stored(place, images, {"name": np.array(names)}, ignored_note(ignored + more, str(root), SUFFIXES))


def stored_images(place: str) -> Stored:
    """Opens noisy images without clean ones: all below a folder, or the noisy side of FILE.npz.

    Raises:
      DataError: when it is absent or empty, or a folder of pairs.
    """
    if place.endswith(".npz"):
        return _read_file(place, (CORRUPTED,))
    root = Path(expanded(place))
    if not root.is_dir():
        raise DataError(f"There is no directory {root} (looked for {root.absolute()}).")
    if all((root / side).is_dir() for side in SIDES):
        raise DataError(f"{root} holds pairs, the clean images among them. Name {root / CORRUPTED}.")
    names, ignored = names_below(root)
    ordered = sorted(names)
    note = ignored_note(ignored, str(root), SUFFIXES)
    return Stored(place, {CORRUPTED: [root / name for name in ordered]}, {"name": np.array(ordered)}, note)


def names_below(base: Path) -> tuple[set[str], Counter[str]]:
    """Returns the images below a folder, and counts of ignored entries by kind.

    Raises:
      DataError: if there are none.
    """
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


def _read_file(place: str, sides: Sequence[str]) -> Stored:
    path = expanded(place)
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path} (looked for {Path(path).absolute()}).") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    try:
        images = {side: _side(path, arrays, side) for side in sides}
    except DrepError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    counts = {side: len(stored) for side, stored in images.items()}
    count = counts[sides[-1]]
    if len(set(counts.values())) > 1 or not count:
        raise DataError(f"{path} holds {counts} images; expected as many of each, and at least one.")
    columns = {
        name: np.array([str(value) for value in (text_of(array, path) if array.dtype.kind in "SU" else array)])
        for name, array in arrays.items()
        if array.shape == (count,) and array.dtype.kind in "SUiub"
    }
    return Stored(place, images, {"name": np.array([str(i) for i in range(count)]), **columns})


def _side(path: str, arrays: Mapping[str, np.ndarray], side: str) -> Sequence[Any]:
    """Returns the images of a side: an array, or the bytes of each."""
    for name in MEMBERS[side]:
        if name in arrays:
            return list(arrays[name])
        encoded = next((arrays[key] for key in arrays if re.fullmatch(f"{name}_({'|'.join(ENCODED)})", key)), None)
        if encoded is None:
            continue
        if f"{name}_offsets" not in arrays:
            raise DataError(
                f'{path} holds encoded images "{name}" without "{name}_offsets", where each begins and ends.'
            )
        return cut_encoded(encoded, arrays[f"{name}_offsets"], path, name)
    expected = " or ".join(f'"{name}"' for name in MEMBERS[side])
    raise DataError(
        f"{path} holds no {side} images: expected an array uint8 (n, H, W, 3) called {expected}, or encoded ones, such as "
        f'"{MEMBERS[side][0]}_jpeg" with "{MEMBERS[side][0]}_offsets".'
    )


def cut_encoded(encoded: np.ndarray, offsets: np.ndarray, path: str, name: str) -> list[bytes]:
    """Returns the bytes of each of the encoded images that lie one behind the other.

    Args:
      encoded: uint8, (bytes,).
      offsets: where each begins and the last ends, (n + 1,).
      path, name: of the file and of the images, for messages.

    Raises:
      DataError: if the offsets do not divide the bytes.
    """
    offsets = offsets.astype(np.int64)
    if offsets.ndim != 1 or (np.diff(offsets) <= 0).any() or not 0 <= offsets[0] <= offsets[-1] <= encoded.size:
        raise DataError(f'{path}: "{name}_offsets" does not divide the {encoded.size} bytes of the images.')
    return [encoded[start:stop].tobytes() for start, stop in itertools.pairwise(offsets)]


def _listed(what: str, names: set[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what}: {', '.join(sorted(names)[:SHOWN]) or 'none'}{more}."
