"""`seg_npz:FILE`: images and masks in one NumPy file, encoded or as arrays.

The file has `images`, uint8 (n, h, w, 3), or encoded ones in `jpeg`, `png` or `webp` with their
`…_offsets` (`offsets` alone also serves); `masks`, uint8 (n, h, w), or encoded ones in `mask_png` or
`mask_webp` with `mask_offsets`; and may have `has_mask` (n,), `split` (n,) as numbers of
`split_names`, `class_names` or `mask_class_names` by stored value, and `frame` (n,), names.
"""

import io
import itertools
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from drep_jax.data.arrays import text_of
from drep_jax.data.geometry import IGNORED
from drep_jax.data.masks.coding import Coding
from drep_jax.data.masks.listing import MaskSet, Pair
from drep_jax.data.masks.options import ignored_values
from drep_jax.data.splits import SPLITS
from drep_jax.errors import DataError, DrepError, did_you_mean

FORMATS = ("jpeg", "png", "webp")
SPLIT_NAMES = {"val": "validation", "train2017": "train", "val2017": "validation"}
NOT_A_CLASS = ("unlabeled", "unlabelled", "void", "ignore", "ignored")


def read_packed(path: Path, options: Mapping[str, str], ignore: str | None = None) -> MaskSet:
    """Reads a file.

    Args:
      path: of the file.
      options: `ignore`, stored values that are no class; without it those named "unlabeled" or
        "void", and 255.
      ignore: the same, where the option is not given.

    Raises:
      DataError: for a file that is absent, damaged or without masks.
    """
    arrays = _read(path)
    images, masks = _members(arrays, ("", "image_"), path, "images"), _members(arrays, ("mask_",), path, "masks")
    count = len(images)
    if len(masks) != count:
        raise DataError(f"{path} holds {count} images and {len(masks)} masks; expected as many.")
    has_mask = arrays.get("has_mask", np.ones(count, bool))
    frames = text_of(arrays["frame"], str(path)) if "frame" in arrays else None
    for name, column in (("has_mask", has_mask), ("frame", frames), ("split", arrays.get("split"))):
        if column is not None and column.shape != (count,):
            raise DataError(f'{path}: "{name}" has the shape {column.shape}, expected ({count},).')
    pairs = [
        Pair(
            str(place if frames is None else frames[place]),
            image,
            mask if has_mask[place] and mask else None,
            f"{path}, image {place}",
            f"{path}, mask {place}",
        )
        for place, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    coding, names = _classes(arrays, path, options.get("ignore", ignore))
    return MaskSet(str(path), _by_split(arrays, pairs, path), coding, names)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"There is no file {path} (looked for {path.absolute()}).")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except DrepError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _members(arrays: Mapping[str, np.ndarray], prefixes: tuple[str, ...], path: Path, what: str) -> list[bytes]:
    """Returns the encoded images or masks; arrays become PNG."""
    if what in arrays:
        array = arrays[what]
        if array.dtype != np.uint8 or array.ndim not in (3, 4):
            raise DataError(
                f'{path}: "{what}" is {array.dtype} {array.shape}; expected uint8 (n, height, width) or (…, 3).'
            )
        return [_png(member, path, what) for member in array]
    for prefix, form in itertools.product(prefixes, FORMATS):
        name = f"{prefix}{form}"
        if name not in arrays:
            continue
        offsets = next(
            (arrays[key] for key in (f"{name}_offsets", f"{prefix}offsets") if key in arrays), np.zeros(0, np.int64)
        ).astype(np.int64)
        data = arrays[name]
        in_order = offsets.ndim == 1 and len(offsets) > 1 and (np.diff(offsets) >= 0).all()
        if not in_order or not 0 <= offsets[0] <= offsets[-1] <= data.size:
            raise DataError(f'{path}: the offsets of "{name}" are absent or do not divide its {data.size} bytes.')
        return [data[start:stop].tobytes() for start, stop in itertools.pairwise(offsets.tolist())]
    expected = ", ".join(f'"{prefixes[-1]}{form}"' for form in FORMATS)
    raise DataError(f'{path} holds no {what}: expected "{what}", or encoded ones in {expected} with their offsets.')


def _png(member: np.ndarray, path: Path, what: str) -> bytes:
    stream = io.BytesIO()
    try:
        Image.fromarray(member).save(stream, "PNG", compress_level=0)
    except (TypeError, ValueError) as error:
        raise DataError(f'{path}: "{what}" are arrays of {member.shape}, which are no images.') from error
    return stream.getvalue()


def _classes(arrays: Mapping[str, np.ndarray], path: Path, ignore: str | None) -> tuple[Coding, tuple[str, ...]]:
    """Returns the coding, and the names of the classes: stored values with a name that are not ignored."""
    key = next((name for name in ("mask_class_names", "class_names") if name in arrays), None)
    if key is None:
        raise DataError(
            f'{path} names no classes: expected "class_names", an array of text with one name for each stored value; an empty '
            "name for a value that does not occur."
        )
    names = [str(name) for name in text_of(arrays[key], str(path)).tolist()]
    ignored = {value for value, name in enumerate(names) if name.lower() in NOT_A_CLASS} | {IGNORED}
    if ignore is not None:
        ignored = set(ignored_values(ignore))
    values = tuple(value for value, name in enumerate(names) if name and value not in ignored)
    return Coding(values, frozenset(ignored - set(values))), tuple(names[value] for value in values)


def _by_split(arrays: Mapping[str, np.ndarray], pairs: list[Pair], path: Path) -> dict[str, list[Pair]]:
    if "split" not in arrays:
        return {"train": pairs}
    split_names = [str(name) for name in arrays.get("split_names", np.array(["train", "val", "test"])).tolist()]
    strange = next((name for name in split_names if SPLIT_NAMES.get(name, name) not in SPLITS), None)
    if strange is not None:
        raise DataError(
            f'{path}: unknown split "{strange}" in split_names.{did_you_mean(strange, [*SPLITS, *SPLIT_NAMES])}'
        )
    splits: dict[str, list[Pair]] = {}
    for pair, number in zip(pairs, arrays["split"].tolist(), strict=True):
        if not 0 <= number < len(split_names):
            raise DataError(f'{path}: the split {number} has no name; "split_names" are {", ".join(split_names)}.')
        splits.setdefault(SPLIT_NAMES.get(split_names[number], split_names[number]), []).append(pair)
    return splits
