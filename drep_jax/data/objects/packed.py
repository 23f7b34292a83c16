"""One `.npz` file of encoded images with boxes.

jpeg (or png, webp) uint8, jpeg_offsets (n + 1,)   image i is jpeg[offsets[i] : offsets[i + 1]]
box_image (m,)          row of the image            box_class (m,)     from 0
box_cxcywh (m, 4)       center and size as fractions of width and height; or box_xyxy in pixels
box_class_names (C,)    optional: split (n,)        0 train, 1 validation, 2 test
image_id (n,)           box_crowd, box_area (m,)
"""

import itertools
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from drep_jax.data.arrays import text_of
from drep_jax.data.decode import stored_size
from drep_jax.data.folder import tenth
from drep_jax.data.objects.listing import Annotated, Counts, ObjectSet, annotated, class_range, no_duplicates
from drep_jax.data.splits import SPLITS
from drep_jax.errors import ConfigError, DataError

ENCODINGS = ("jpeg", "png", "webp")


def read_packed(path: Path, options: Mapping[str, str]) -> ObjectSet:
    """Reads a file.

    Args:
      path: of the file.
      options: "held_out", tenths of the training images that are kept for choices, as a fraction. The
        file's validation split is the test split then.

    Raises:
      ConfigError: for another fraction.
      DataError: if it is absent, or its arrays do not fit.
    """
    tenths = _tenths(options)
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            wanted = [n for n in file.files if not n.startswith("mask_")]
            arrays = {name: file[name] for name in wanted}
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path} (looked for {path.absolute()}).") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    encoding = next((name for name in ENCODINGS if name in arrays), None)
    boxes_are = next((name for name in ("box_cxcywh", "box_xyxy") if name in arrays), None)
    needed = ["box_image", "box_class", "box_class_names", f"{encoding or ENCODINGS[0]}_offsets"]
    missing = [name for name in needed if name not in arrays]
    if encoding is None or boxes_are is None or missing:
        raise DataError(
            f"{path} is no file of images with boxes: it lacks "
            f"{', '.join([*missing, *([] if boxes_are else ['box_cxcywh']), *([] if encoding else ['jpeg'])])}."
        )
    offsets = arrays[f"{encoding}_offsets"].astype(np.int64)
    count, boxes = len(offsets) - 1, arrays[boxes_are].astype(np.float64)
    owner, classes = arrays["box_image"].astype(np.int64), arrays["box_class"].astype(np.int64)
    per_box = {name: arrays[name] for name in arrays if name.startswith("box_") and name != "box_class_names"}
    lengths = {name: len(array) for name, array in per_box.items()}
    if len(set(lengths.values())) > 1 or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise DataError(f"{path}: its boxes differ in number or form: {lengths}, {boxes_are} {boxes.shape}.")
    if (np.diff(offsets) <= 0).any() or not 0 <= offsets[0] <= offsets[-1] <= arrays[encoding].size or count < 1:
        raise DataError(
            f'{path}: "{encoding}_offsets" does not divide the {arrays[encoding].size} bytes of the images.'
        )
    if len(owner) and not (owner.min() >= 0 and owner.max() < count):
        raise DataError(f"{path}: box_image names image {owner.max()}; there are {count}.")
    names = tuple(map(str, text_of(arrays["box_class_names"], str(path))))
    class_range(np.unique(classes).tolist(), names, str(path))
    ids = arrays.get("image_id", np.arange(count)).astype(np.int64)
    no_duplicates(ids.tolist(), "image id", str(path))
    split = arrays.get("split", np.zeros(count, np.int64))
    if split.shape != (count,) or ids.shape != (count,) or not np.isin(split, range(len(SPLITS))).all():
        raise DataError(f"{path}: expected one image_id and one split (0, 1 or 2) for each of {count} images.")
    has_test = bool((split == SPLITS.index("test")).any())
    counts = Counts()
    splits: dict[str, list[Annotated]] = {}
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(count + 1))
    encoded = [arrays[encoding][start:stop].tobytes() for start, stop in itertools.pairwise(offsets)]
    for place, image in enumerate(encoded):
        mine = order[bounds[place] : bounds[place + 1]]
        where = f"{path}, image {place}"
        size = stored_size(image, where)
        own = boxes[mine]
        if boxes_are == "box_cxcywh":
            half = own[:, 2:] / 2
            own = np.concatenate([own[:, :2] - half, own[:, :2] + half], axis=1) * ([size[1], size[0]] * 2)
        splits.setdefault(_split_of(int(split[place]), str(ids[place]), tenths, has_test), []).append(
            annotated(
                image,
                str(ids[place]),
                where,
                int(ids[place]),
                boxes=own,
                classes=classes[mine],
                crowd=arrays["box_crowd"][mine] if "box_crowd" in arrays else None,
                area=arrays["box_area"][mine] if "box_area" in arrays else None,
                size=size,
                counts=counts,
            )
        )
    return ObjectSet(str(path), splits, names, tuple(range(len(names))), counts.remarks())


def _tenths(options: Mapping[str, str]) -> int:
    text = options.get("held_out", "0")
    try:
        tenths = round(float(text) * 10)
        fits = abs(float(text) * 10 - tenths) < 1e-6 and 0 <= tenths < 10
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(f"held_out={text}: expected tenths of the training images, from 0.1 to 0.9.")
    return tenths


def _split_of(stored: int, name: str, tenths: int, has_test: bool) -> str:
    """Returns the split of an image, of which some of train may be held out."""
    split = SPLITS[stored]
    if not tenths:
        return split
    if split == "train":
        return "validation" if tenth(Path(name)) >= 10 - tenths else "train"
    return "test" if not has_test else split
