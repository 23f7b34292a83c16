"""Images in a folder, with or without folders for splits and classes."""

import dataclasses
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from drep_jax.data.decode import fitted, fitted_size
from drep_jax.data.labels import ignored_note
from drep_jax.data.splits import SPLITS, plan
from drep_jax.errors import ConfigError, DataError
from drep_jax.files import expanded

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
LAYOUTS = "DIR/SPLIT/CLASS/IMAGE, DIR/CLASS/IMAGE, DIR/SPLIT/IMAGE or DIR/IMAGE"


class FolderSource:
    """One split of a folder of images, read on demand.

    Attributes:
      files: of the images.
      labels: of the images, int32 (n,), -1 where there is none; None if the split has none.
      stored: the stored split that the images come from.
    """

    def __init__(
        self,
        files: list[Path],
        labels: list[int] | None,
        class_names: tuple[str, ...] | None,
        *,
        name: str,
        note: str | None,
        image_size: tuple[int, int],
        resize: str,
        stored: str = "train",
    ) -> None:
        self.name = name
        self.note = note
        self.stored = stored
        self.class_names = class_names if labels is not None else None
        self.num_classes = None if self.class_names is None else len(self.class_names)
        self.files = files
        self.labels = None if labels is None else np.array(labels, np.int32)
        self.image_size = image_size
        self.resize = resize

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return fitted(self.raw(index), self.image_size, self.resize)

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (height, width) of an image from its header."""
        return fitted_size(self.raw(index), self.image_size, self.resize)

    def raw(self, index: int) -> dict[str, Any]:
        """Returns an item with the file of its image, and "where", what to call it."""
        raw: dict[str, Any] = {"image": self.files[index], "where": str(self.files[index])}
        return raw if self.labels is None else {**raw, "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Images and folders directly in a folder, by name, and counts of ignored entries by kind."""

    images: list[Path]
    folders: list[Path]
    ignored: Counter[str]


def open_folder(
    argument: str, split: str, image_size: tuple[int, int], resize: str, data_dir: str | None
) -> FolderSource:
    """Opens `folder:DIR`.

    Raises:
      DataError: when there is no such directory, no image in it, an empty class folder, or two
        layouts at once.
    """
    del data_dir
    if not argument:
        raise ConfigError('The data source "folder" needs a directory: "folder:DIR".')
    root = Path(expanded(argument))
    if not root.is_dir():
        raise DataError(f"There is no directory {root} (looked for {root.absolute()}).")
    stored = split_folders(root) or {"train": root}
    flat = [name for name, folder in stored.items() if not class_folders(folder)]
    part = plan(stored, split, str(root), flat)
    base = stored[part.stored]
    images, ignored = list_images(base)
    # Over all splits, so that a class which one of them lacks does not shift the labels of the
    # others.
    class_names = tuple(sorted({name for folder in stored.values() for name in class_folders(folder)}))
    chosen = [(file, name) for file, name in images if part.start <= tenth(file.relative_to(base)) < part.stop]
    if not chosen:
        raise DataError(
            f"None of the {len(images)} images below {base} falls into the {split} part. Give more images, or make the "
            f"folders {', '.join(SPLITS)} below {root}."
        )
    passed_over = ignored_note(ignored, str(base), SUFFIXES)
    return FolderSource(
        [file for file, _ in chosen],
        None if chosen[0][1] is None else [class_names.index(name) for _, name in chosen if name is not None],
        class_names,
        name=f"folder:{argument}",
        note=" ".join(filter(None, (part.note, passed_over))) or None,
        image_size=image_size,
        resize=resize,
        stored=part.stored,
    )


def split_folders(root: Path) -> dict[str, Path]:
    """Returns the folders of `root` that hold a split, by its name; `val` means validation.

    Raises:
      DataError: when there are other images next to them, or a split is there twice.
    """
    listing = scan(root)
    splits: dict[str, Path] = {}
    for folder in listing.folders:
        name = "validation" if folder.name == "val" else folder.name
        if name in splits:
            raise DataError(f'{root} has both a "val" and a "validation" folder. Keep one of them.')
        if name in SPLITS:
            splits[name] = folder
    if not splits:
        return {}
    strangers = [folder for folder in listing.folders if folder not in splits.values() and holds_images(folder)]
    if listing.images or strangers:
        raise DataError(
            f"{root} mixes two layouts: beside the split folders {', '.join(sorted(splits))} there are images in "
            f"{', '.join(path.name for path in [*listing.images, *strangers][:5])}. Use one of {LAYOUTS}."
        )
    return splits


def list_images(base: Path) -> tuple[list[tuple[Path, str | None]], Counter[str]]:
    """Lists the images of a flat folder or of a folder of class folders, ordered by name.

    Returns:
      Pairs of the file and its class (None in a flat folder), and counts of ignored entries by kind.

    Raises:
      DataError: when there are none, when a class folder is empty, or when there are images next to
        class folders.
    """
    listing = scan(base)
    if listing.images:
        mixed = [folder.name for folder in listing.folders if holds_images(folder)]
        if mixed:
            raise DataError(
                f"{base} mixes two layouts: {listing.images[0].name} lies beside folders of images "
                f"({', '.join(mixed[:5])}). Use one of {LAYOUTS}."
            )
        folders = Counter({"folders": len(listing.folders)} if listing.folders else {})
        return [(file, None) for file in listing.images], listing.ignored + folders
    classes = [scan(folder) for folder in listing.folders]
    empty = [folder for folder, inside in zip(listing.folders, classes, strict=True) if not inside.images]
    if len(empty) == len(classes):
        raise DataError(f"No images in {base}: looked for files ending in {', '.join(SUFFIXES)}, as {LAYOUTS}.")
    if empty:
        raise DataError(
            f'The class folder "{empty[0].name}" of {base} has no images directly in it '
            f"({len(empty)} of {len(classes)} class folders are so). Fill or remove it."
        )
    ignored = listing.ignored + Counter({"folders": sum(len(inside.folders) for inside in classes)})
    for inside in classes:
        ignored += inside.ignored
    pairs = zip(listing.folders, classes, strict=True)
    return [(file, folder.name) for folder, inside in pairs for file in inside.images], ignored


def class_folders(base: Path) -> list[str]:
    """Returns the names of the class folders of `base`; none when it is flat."""
    listing = scan(base)
    return [] if listing.images else [folder.name for folder in listing.folders]


def tenth(path: Path) -> int:
    """Returns the tenth, 0 to 9, of an image by its path: new images move no old one."""
    return int.from_bytes(hashlib.sha256(os.fsencode(path.as_posix())).digest()[:8], "big") % 10


def scan(folder: Path) -> Listing:
    """Lists the images and folders directly in a folder; other entries are only counted."""
    images, folders = [], []
    ignored: Counter[str] = Counter()
    with os.scandir(folder) as entries:  # tells files from folders without a system call an entry
        for entry in sorted(entries, key=lambda entry: entry.name):  # file systems list in any order
            if entry.name.startswith("."):
                ignored["hidden"] += 1
            elif leads_back(entry.path):
                ignored["links to a folder above them"] += 1
            elif entry.is_dir():
                folders.append(Path(entry.path))
            elif entry.name.lower().endswith(SUFFIXES):
                images.append(Path(entry.path))
            else:
                ignored[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1
    return Listing(images, folders, ignored)


def leads_back(path: str) -> bool:
    """Returns whether a path is a symbolic link to itself or to a folder that it lies in.

    Below such a link the same files come again, without end. Other links are followed.
    """
    if not os.path.islink(path):
        return False
    try:
        return Path(path).parent.resolve().is_relative_to(Path(path).resolve(strict=True))
    except (OSError, RuntimeError) as error:  # a link to itself
        return not isinstance(error, FileNotFoundError)


def holds_images(folder: Path) -> bool:
    """Returns whether there is an image in a folder or below it."""
    listing = scan(folder)
    return bool(listing.images) or any(map(holds_images, listing.folders))
