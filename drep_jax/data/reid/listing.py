"""A data set for re-identification before its images are decoded, and checks for all of them."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from drep_jax.data.folder import SUFFIXES
from drep_jax.data.text import read_text_lines
from drep_jax.errors import DataError
from drep_jax.metrics.protocol import Protocol

SHOWN = 5
JUNK = "-1"
"""Identity of wrong boxes that show no other person either: none of its images is used."""

PERSONS = Protocol()
"""Single query, without gallery images of the same identity and camera."""

NOTHING: Mapping[str, int] = MappingProxyType({})


class Entry(NamedTuple):
    """One image.

    Attributes:
      image: path of its file, its bytes, or a function that returns its bytes.
      where: what to call it in messages.
      identity: name of who or what it shows, as in the data set.
      camera: from 0.
      view: from 0; -1 where it is unknown.
      query, gallery: whether a test image is a query, and whether it is in the gallery.
      attributes: other labels, by name.
    """

    image: str | bytes | Callable[[], bytes]
    where: str
    identity: str
    camera: int
    view: int = -1
    query: bool = False
    gallery: bool = False
    attributes: Mapping[str, int] = NOTHING


@dataclasses.dataclass(frozen=True)
class Listed:
    """A data set: its images for training, and those for testing.

    Attributes:
      title: name of the data set.
      where: its folder or file, for messages.
      train: images to learn from, of all training identities.
      test: queries, then the rest of the gallery.
      cameras: number of cameras.
      protocol: how it is evaluated.
      published: (identities, images) of "train", "query", "gallery" or "test" in the literature;
        empty for other images.
      one_numbering: whether a name means the same identity in train and test.
      remarks: what else the user should know.
    """

    title: str
    where: str
    train: Sequence[Entry]
    test: Sequence[Entry]
    cameras: int
    protocol: Protocol = PERSONS
    published: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    one_numbering: bool = True
    remarks: tuple[str, ...] = ()

    @property
    def views(self) -> int:
        """Number of views; 0 where none is known."""
        return max((entry.view for entry in (*self.train, *self.test)), default=-1) + 1

    @property
    def parts(self) -> dict[str, list[Entry]]:
        """The images by part: train, query and gallery, or train and test."""
        if self.protocol.trials:
            return {"train": list(self.train), "test": list(self.test)}
        return {
            "train": list(self.train),
            "query": [entry for entry in self.test if entry.query],
            "gallery": [entry for entry in self.test if entry.gallery],
        }


def checked(listed: Listed) -> Listed:
    """Returns the data set, if it is fit for training and evaluation.

    Raises:
      DataError: for a part without images, an identity in both train and test, or queries that all
        lack a match.
    """
    where = f"{listed.title} in {listed.where}"
    for name, entries in listed.parts.items():
        if not entries:
            raise DataError(f"{where}: the {name} part has no images; each part needs some.")
    both = {entry.identity for entry in listed.train} & {entry.identity for entry in listed.test}
    if both and listed.one_numbering:
        raise DataError(
            f"{where}: {counted(len(both), 'identity', 'identities')} both in train and in test: "
            f"{few(sorted(both))}. What is tested must not have been learned; move or remove the images."
        )
    lacking = sum(not match for match in matches(listed))
    queries = sum(entry.query for entry in listed.test)
    if lacking == queries:
        elsewhere = " by another camera" if listed.protocol.cross_camera else ""
        raise DataError(
            f"{where}: none of the {queries:,} queries has a gallery image of its identity{elsewhere}, so nothing can be "
            "found. Are query and gallery of the same data set, and the cameras right?"
        )
    return listed


def matches(listed: Listed) -> Iterator[bool]:
    """Yields, for each query, whether the gallery has a match that the protocol counts."""
    seen = Counter((entry.identity, entry.camera) for entry in listed.test if entry.gallery)
    total = Counter(entry.identity for entry in listed.test if entry.gallery)
    for entry in listed.test:
        if entry.query:
            excluded = seen[entry.identity, entry.camera] if listed.protocol.cross_camera else int(entry.gallery)
            yield total[entry.identity] > excluded


def note_of(listed: Listed, split: str) -> str:
    """Returns the counts of a split's identities and images, the published ones, and remarks."""
    names = [name for name in listed.parts if (name == "train") != (split == "test")]
    counts = [_count(name, listed.parts[name], listed.published.get(name)) for name in names]
    remarks = list(listed.remarks)
    if split == "test":
        lacking = sum(not match for match in matches(listed))
        if lacking:
            elsewhere = " by another camera" if listed.protocol.cross_camera else ""
            remarks.append(
                f"{counted(lacking, 'query has', 'queries have')} no gallery image of the identity{elsewhere}."
            )
    return " ".join([f"{listed.title}: {'; '.join(counts)}.", *remarks])


def _count(name: str, entries: Sequence[Entry], published: tuple[int, int] | None) -> str:
    identities, images = len({entry.identity for entry in entries}), len(entries)
    text = f"{name} {counted(identities, 'identity', 'identities')}, {counted(images, 'image', 'images')}"
    if published is None:
        return text
    if published == (identities, images):
        return f"{text}, as published"
    return f"{text} (published: {published[0]:,} and {published[1]:,})"


def merged(query: Iterable[Entry], gallery: Iterable[Entry], key: Callable[[Entry], object]) -> list[Entry]:
    """Returns queries, then gallery images; one that is both, by its key, is there once."""
    queries = [entry._replace(query=True) for entry in query]
    places = {key(entry): place for place, entry in enumerate(queries)}
    rest = []
    for entry in gallery:
        place = places.get(key(entry))
        if place is None:
            rest.append(entry._replace(gallery=True))
        else:
            queries[place] = queries[place]._replace(gallery=True)
    return queries + rest


def camera_number(text: str, cameras: int, title: str, where: str) -> int:
    """Returns a camera's number from 0, of one written from 1.

    Raises:
      DataError: for one that the data set does not have.
    """
    if not 1 <= int(text) <= cameras:
        raise DataError(f"{where}: camera {int(text)}, but {title} has the cameras 1 to {cameras}.")
    return int(text) - 1


def read_flat(
    folder: Path, grammar: re.Pattern[str], title: str, cameras: int, *, instead: str = ""
) -> tuple[list[Entry], int]:
    """Reads a folder of images whose names hold identity and camera.

    Args:
      folder: with the images directly in it; other files are ignored.
      grammar: of a name, with the groups identity and camera.
      title: of the data set, for messages.
      cameras: number of cameras.
      instead: what to advise where names do not fit.

    Returns:
      The images in the order of their names, and how many more are junk.

    Raises:
      DataError: for names that do not fit and cameras that do not exist.
    """
    matched = [(name, grammar.fullmatch(name)) for name in image_names(folder)]
    odd = [name for name, match in matched if match is None]
    if odd:
        raise DataError(
            f"{counted(len(odd), 'image', 'images')} of {len(matched):,} in {folder} are not named as in {title}: "
            f"{few(odd)}. {instead}".rstrip()
        )
    used = [
        (os.path.join(folder, name), match)
        for name, match in matched
        if match is not None and match["identity"] != JUNK
    ]
    entries = [
        Entry(path, path, match["identity"], camera_number(match["camera"], cameras, title, path))
        for path, match in used
    ]
    return entries, len(matched) - len(used)


def read_lines(file: Path, words: int, what: str) -> list[tuple[int, list[str]]]:
    """Returns the words of each line that is not blank, with the line's number from 1.

    Raises:
      DataError: for a file that is absent or not text, and for a line with another number of words
        than `words`.
    """
    if not file.exists():
        raise DataError(f"There is no list {file}: expected lines of {what}.")
    lines = [(number, line.split()) for number, line in enumerate(read_text_lines(file), 1) if line.strip()]
    for number, line_words in lines:
        if len(line_words) != words:
            raise DataError(f"{file}, line {number}: expected {what}; got {' '.join(line_words)!r}.")
    return lines


def image_names(folder: Path | str) -> list[str]:
    """Returns the names of the image files directly in a folder, sorted.

    Names instead of `Path`s, as paths are strings in this package: of 126,000 images, making
    `Path`s takes ten seconds.
    """
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and not name.startswith("."))


def check_listed_files(paths: Sequence[tuple[int, str]], file: Path) -> None:
    """Raises DataError, naming the line, unless every image in a list is there and listed once.

    Each folder is listed once, which is faster than a system call for every image.
    """
    lines: dict[str, int] = {}
    names_in: dict[str, set[str]] = {}
    absent = []
    for line, path in paths:
        if path in lines:
            raise DataError(f"{file}, line {line}: {path} is already in line {lines[path]}.")
        lines[path] = line
        folder, name = os.path.split(path)
        if folder not in names_in:
            names_in[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in names_in[folder]:
            absent.append(f"{path} (line {line})")
    if absent:
        raise DataError(f"{len(absent):,} of the {len(paths):,} images that {file} names are not there: {few(absent)}.")


def in_order(names: Iterable[str]) -> list[str]:
    """Returns the distinct names, sorted: numbers by value, then other names."""
    return sorted(set(names), key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))


def few(names: Sequence[str]) -> str:
    """Returns the first names of a list as text, and the number of the others."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def counted(number: int, one: str, many: str) -> str:
    """Returns a number with its noun."""
    return f"{number:,} {one if number == 1 else many}"
