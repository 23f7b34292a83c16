"""Images in NumPy files: `DIR/NAME_train.npz` and `DIR/NAME_test.npz`, or one `FILE.npz`.

A file has either `images`, uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), or pictures `webp_00`,
`webp_01`, …, each a `grid` of (rows, columns) images in row-major order, or encoded images one
behind the other, `webp` (`jpeg`, `png`) with `webp_offsets` (N + 1). Of other channels the option
`?channels=…` says which are shown. It may have `labels` (N,), numbers from 0 or names; -1 or an
empty name stands for a missing label.
"""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.data.arrays import shown, text_of
from drep_jax.data.decode import as_rgb, decode, fit
from drep_jax.data.labels import MISSING, check_range
from drep_jax.data.options import parsed
from drep_jax.data.splits import SPLITS, Part, check_split, plan
from drep_jax.data.stored import ENCODED, cut_encoded
from drep_jax.errors import ConfigError, DataError, DrepError
from drep_jax.files import expanded

MOST_CLASSES = 1_000_000


class ArraySource:
    """One split of a data set that is an array of images.

    Attributes:
      labels: of the images, int32 (n,), -1 where there is none; None if the split has none.
      stored: the stored split that the images come from.
    """

    in_memory = True

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None,
        class_names: tuple[str, ...] | None,
        note: str | None,
        stored: str | None = None,
    ) -> None:
        self.name = name
        self.stored = stored
        self.class_names = class_names
        self.num_classes = None if class_names is None else len(class_names)
        self.note = note
        self._images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"image": self._images[index]}
        return item if self.labels is None else {**item, "label": self.labels[index]}


def cut(
    name: str,
    part: Part,
    images: np.ndarray,
    labels: np.ndarray | None,
    class_names: tuple[str, ...] | None,
    image_size: tuple[int, int],
    resize: str,
) -> ArraySource:
    """Returns the tenths of the stored arrays, in stored order, that serve as a split."""
    start, stop = (len(images) * tenth // 10 for tenth in (part.start, part.stop))
    chosen = images[start:stop]
    if chosen.shape[1:] != (*image_size, 3):
        chosen = np.stack(
            [fit(as_rgb(image, f"{name} {i}"), image_size, resize, f"{name} {i}") for i, image in enumerate(chosen)]
        )
    chosen_labels = None if labels is None else labels[start:stop].astype(np.int32)
    if chosen_labels is not None and chosen_labels.size and (chosen_labels == MISSING).all():
        chosen_labels = class_names = None
    return ArraySource(name, chosen, chosen_labels, class_names, part.note, part.stored)


def open_npz(argument: str, split: str, image_size: tuple[int, int], resize: str, data_dir: str | None) -> ArraySource:
    """Opens `npz:NAME`, the files NAME_train.npz, NAME_validation.npz, NAME_test.npz.

    They are in `data_dir` or in $DREP_DATA, or NAME is a path. The option `?channels=…` names the
    channels that are shown (`drep_jax.data.arrays.shown`).

    `npz:FILE.npz` is one file, whose path may be relative to `data_dir`. Of every ten images the
    first eight are train, one is validation and one test, so that a file sorted by class has all
    classes in each. The option `?tenths=3+1+6` gives other numbers of them.

    Raises:
      ConfigError: for options that it does not have.
      DataError: when there is no such file, or it does not hold images and labels that fit.
    """
    if not argument:
        raise ConfigError('The data source "npz" needs a name, as in "npz:cifar10" for cifar10_train.npz.')
    path, options = parsed("npz", argument, ("channels", "tenths"))
    if path.endswith(".npz"):
        return _open_file(argument, path, options, split, image_size, resize, data_dir)
    if "tenths" in options:
        raise ConfigError(
            f'"npz:{argument}": tenths divide one file, npz:FILE.npz; several files are the parts themselves.'
        )
    folder = data_dir or os.environ.get("DREP_DATA", "")
    base = os.path.join(expanded(folder), path)
    stored = {name: f"{base}_{name}.npz" for name in SPLITS if os.path.isfile(f"{base}_{name}.npz")}
    if not stored:
        raise DataError(
            f"There is no {base}_train.npz or {base}_test.npz. Say where the files are with --config.data.data_dir=DIR or "
            "the environment variable DREP_DATA."
        )
    classes, unlabeled = _classes_of(stored)
    part = plan(stored, split, f"npz:{argument}", unlabeled)
    images, labels, names = read_npz(stored[part.stored], part, classes, channels=options.get("channels"))
    whole = Part(part.stored, note=part.note)
    return cut(f"npz:{argument}", whole, images, labels, names, image_size, resize)


def _open_file(
    argument: str,
    path: str,
    options: Mapping[str, str],
    split: str,
    image_size: tuple[int, int],
    resize: str,
    data_dir: str | None,
) -> ArraySource:
    part = _part(argument, path, options.get("tenths"), split)
    path = os.path.join(expanded(data_dir or ""), expanded(path))
    if not os.path.isfile(path):
        raise DataError(f"There is no file {path} (looked for {os.path.abspath(path)}).")
    images, labels, names = read_npz(path, Part("train"), channels=options.get("channels"))
    tenth = np.arange(len(images)) % 10
    chosen = (tenth >= part.start) & (tenth < part.stop)
    if not chosen.any():
        raise DataError(
            f"{path} holds {len(images)} images, none of which falls into the {split} part. Give at least 10."
        )
    whole = Part(part.stored, note=part.note)
    chosen_labels = None if labels is None else labels[chosen]
    return cut(f"npz:{argument}", whole, images[chosen], chosen_labels, names, image_size, resize)


def _part(argument: str, path: str, tenths: str | None, split: str) -> Part:
    """Returns which of every ten images are a split."""
    if tenths is None:
        return plan(("train",), split, path)
    counts = [int(count) if count.isdecimal() else 0 for count in tenths.split("+")]
    if len(counts) != len(SPLITS) or sum(counts) != 10 or not all(counts):
        raise ConfigError(
            f'"npz:{argument}": expected how many of every ten images are train, validation and test, each at least one, '
            f'such as tenths=8+1+1; got "{tenths}".'
        )
    check_split(split)
    start = sum(counts[: SPLITS.index(split)])
    shares = ", ".join(f"{count} {name}" for count, name in zip(counts, SPLITS, strict=True))
    return Part("train", start, start + counts[SPLITS.index(split)], f"Of every ten images of {path}: {shares}.")


def _classes_of(paths: Mapping[str, str]) -> tuple[tuple[str, ...] | None, list[str]]:
    """Returns the class names over all splits where labels are names, and the splits without labels.

    Over all splits, so that a class which one of them lacks does not shift the labels of the others.
    """
    names: set[str] = set()
    listed = False
    unlabeled = []
    for split, path in paths.items():
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                labels = text_of(file["labels"], path) if "labels" in file.files else np.zeros(0, np.int32)
                listed |= "label_names" in file.files
        except DrepError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
        if labels.dtype.kind == "U":
            names |= set(labels.tolist())
        if not labels.size or (labels == ("" if labels.dtype.kind == "U" else MISSING)).all():
            unlabeled.append(split)
    return tuple(sorted(names - {"", str(MISSING)})) or None if not listed else None, unlabeled


def read_npz(
    path: str, part: Part, names_of_all: tuple[str, ...] | None = None, *, channels: str | None = None
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    """Returns images, labels and class names of one part of a file; the rest is not decoded.

    Args:
      path: of the file.
      part: which of its images.
      names_of_all: the class names of all files of the set, if labels are names and no file lists
        them.
      channels: which channels are shown, as for `drep_jax.data.arrays.shown`.

    Raises:
      DataError: naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = file.files
            labels = text_of(file["labels"], path) if "labels" in names else None
            classes = tuple(map(str, text_of(file["label_names"], path))) if "label_names" in names else None
            if "images" in names:
                images = shown(file["images"], channels, path)
                start, stop = (len(images) * tenth // 10 for tenth in (part.start, part.stop))
                images, total, first = images[start:stop], len(images), start
            elif encoded := next((name for name in ENCODED if f"{name}_offsets" in names), None):
                pieces = cut_encoded(file[encoded], file[f"{encoded}_offsets"], path, encoded)
                first, stop = (len(pieces) * tenth // 10 for tenth in (part.start, part.stop))
                decoded = [decode(piece, f"{path}: image {first + i}") for i, piece in enumerate(pieces[first:stop])]
                images, total = _together(decoded), len(pieces)
            else:
                pictures = sorted(name for name in names if re.fullmatch(r"webp_\d+", name))
                if not pictures or "grid" not in names:
                    raise DataError(
                        f'{path} holds neither "images", nor encoded ones such as "webp" with "webp_offsets", nor pictures '
                        '"webp_00", … with their "grid".'
                    )
                rows, columns = map(int, file["grid"])
                total = len(pictures) * rows * columns
                start, stop = (total * tenth // 10 for tenth in (part.start, part.stop))
                low, high = start // (rows * columns), -(-stop // (rows * columns))
                parts = [_tiles(file[name].tobytes(), rows, columns, f"{path}:{name}") for name in pictures[low:high]]
                first = start
                images = np.concatenate(parts)[start - low * rows * columns :][: stop - start]
                images = shown(images, channels, path)
    except DrepError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if labels is None:
        return images, None, None
    labels, classes = _numbered(path, labels, total, classes or names_of_all)
    return images, labels[first : first + len(images)], classes


def _numbered(
    path: str, labels: np.ndarray, count: int, classes: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns labels as numbers, and one name a class."""
    if labels.shape != (count,):
        raise DataError(
            f"{path}: {len(np.atleast_1d(labels))} labels for {count} images; their shape is {labels.shape}, not ({count},)."
        )
    if labels.dtype.kind == "U":
        present = set(labels.tolist()) - {"", str(MISSING)}
        names = classes or tuple(sorted(present))
        unknown = sorted(present - set(names))
        if unknown:
            raise DataError(f'{path}: the label "{unknown[0]}" is not among its label_names.')
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers.get(name, MISSING) for name in labels.tolist()], np.int32), names
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels are {labels.dtype}; expected whole numbers from 0, or names.")
    labels = labels.astype(np.int64)
    check_range(labels, MOST_CLASSES if classes is None else len(classes), path)
    return labels, classes or tuple(map(str, range(int(labels.max(initial=-1)) + 1)))


def _together(images: Sequence[np.ndarray]) -> np.ndarray:
    """Returns images as one array, of objects if their sizes differ."""
    if len({image.shape for image in images}) == 1:
        return np.stack(images)
    array = np.empty(len(images), object)
    array[:] = list(images)
    return array


def _tiles(encoded: bytes, rows: int, columns: int, where: str) -> np.ndarray:
    picture = decode(encoded, where)
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    if (height * rows, width * columns) != picture.shape[:2]:
        raise DataError(f"{where}: a picture of {picture.shape[:2]} pixels is no grid of {rows} by {columns} images.")
    tiles = picture.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, height, width, 3)
