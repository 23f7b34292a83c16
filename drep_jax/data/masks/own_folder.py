"""`seg_folder:DIR`: the user's own images and masks, pairs by the name without its ending.

The folders are DIR/images and DIR/masks, with or without folders train, val (or validation) and test
in both; or DIR/train/images and DIR/train/masks, …. `DIR/classes.txt` names the classes, a line each:

    road                 the classes are stored as 0, 1, 2, …
    7 road               7 is stored for road; the order of the lines is that of the labels
    128,64,128 road      for masks in RGB: the color of road
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from drep_jax.data.geometry import IGNORED
from drep_jax.data.masks.coding import MOST_CLASSES, Coding, in_a_row
from drep_jax.data.masks.listing import MaskSet, Pair, files_below, paired
from drep_jax.data.masks.options import ignored_values, yes
from drep_jax.data.masks.stored_mask import StoredMask
from drep_jax.data.text import read_text_lines
from drep_jax.errors import ConfigError, DataError

NAMES = "classes.txt"
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
COLOR = re.compile(r"(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})[\s,;:]+(\S.*)")
VALUE = re.compile(r"(\d{1,3})[\s,;:]+(\S.*)")
OPTIONS = ("classes", "ignore", "images", "masks", "reduce_zero", "suffix")
LOOKED_AT = 8


def read_seg_folder(root: Path, options: Mapping[str, str]) -> MaskSet:
    """Reads the user's images and masks.

    Args:
      root: the folder.
      options: `classes`, their number, where there is no classes.txt; `ignore`, stored values that
        are no class (255, or "none"); `reduce_zero`, yes where 0 is no class and 1, 2, … are
        classes; `images` and `masks`, names of the two folders; `suffix`, what the names of masks
        have more than those of images, such as "_mask".

    Raises:
      ConfigError: for options that contradict each other.
      DataError: for images without a mask, masks without an image, and classes that are not told.
    """
    if not root.is_dir():
        raise DataError(f"There is no directory {root} (looked for {root.absolute()}).")
    names = (options.get("images", "images"), options.get("masks", "masks"))
    suffix = options.get("suffix", "")
    splits = {split: _pairs(*folders, suffix, f"{root}, {split}") for split, folders in _folders(root, *names).items()}
    coding, classes, colors, remarks = _classes(root, options, [pair for pairs in splits.values() for pair in pairs])
    return MaskSet(str(root), splits, coding, classes, colors, remarks)


def _folders(root: Path, images: str, masks: str) -> dict[str, tuple[Path, Path]]:
    """Returns the folders of images and of masks by stored split."""
    inside = {name: (root / name / images, root / name / masks) for name in SPLITS if (root / name / images).is_dir()}
    if not inside and not (root / images).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir())[:6]
        raise DataError(
            f"{root} has no folder {images}: expected {images} and {masks} in it, with the same names in both. It has "
            f"{', '.join(there) or 'no folders'}; name others with the options images=… and masks=…."
        )
    if not inside:
        inside = {
            name: (root / images / name, root / masks / name) for name in SPLITS if (root / images / name).is_dir()
        }
    inside = inside or {"train": (root / images, root / masks)}
    if {"val", "validation"} <= set(inside):
        raise DataError(f'{root} has both a "val" and a "validation" folder. Keep one of them.')
    return {SPLITS[name]: folders for name, folders in inside.items()}


def _pairs(images: Path, masks: Path, suffix: str, where: str) -> list[Pair]:
    by_stem = files_below(masks) if masks.is_dir() else {}
    if suffix:
        by_stem = {stem.removesuffix(suffix): file for stem, file in by_stem.items() if stem.endswith(suffix)}
    return paired(files_below(images), by_stem, where)


def _classes(
    root: Path, options: Mapping[str, str], pairs: Sequence[Pair]
) -> tuple[Coding, tuple[str, ...], tuple[tuple[int, int, int], ...], tuple[str, ...]]:
    """Returns the coding, the names, the colors of masks in RGB, and remarks."""
    file, count = root / NAMES, options.get("classes")
    reduce_zero = yes(options.get("reduce_zero", "no"), "reduce_zero")
    ignore = {0, IGNORED} if reduce_zero else {IGNORED}
    if "ignore" in options:
        ignore = set(ignored_values(options["ignore"])) | ({0} if reduce_zero else set())
    if count is not None and not (re.fullmatch(r"\d{1,3}", count) and 1 <= int(count) <= MOST_CLASSES):
        raise ConfigError(f"The option classes={count} is a number of classes, from 1 to {MOST_CLASSES}.")
    if not file.is_file():
        if count is None:
            raise DataError(_which_classes(root, pairs))
        coding = in_a_row(int(count), tuple(ignore), first=int(reduce_zero))
        return (
            coding,
            tuple(map(str, range(int(count)))),
            (),
            ("The classes have no names; they are called by number.",),
        )
    lines = [line.strip() for line in read_text_lines(file)]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"{file} names no classes: expected a line for each, such as road, 7 road or 128,64,128 road.")
    if count is not None and int(count) != len(lines):
        raise ConfigError(f"{file} has {len(lines)} lines, but the option classes={count}. Leave the option out.")
    colored, numbered = [COLOR.fullmatch(line) for line in lines], [VALUE.fullmatch(line) for line in lines]
    if all(colored):
        return _by_color(file, [match.groups() for match in colored if match], reduce_zero)
    if any(colored):
        odd = next(line for line, match in zip(lines, colored, strict=True) if not match)
        raise DataError(f'{file}: "{odd}" has no color, but other lines have one. Write all as "R,G,B NAME".')
    if all(numbered):
        if reduce_zero:
            raise ConfigError(
                f"{file} gives the stored value of each class, so reduce_zero has no meaning. Leave it out."
            )
        values = tuple(int(match[1]) for match in numbered if match)
        return Coding(values, frozenset(ignore - set(values))), tuple(match[2] for match in numbered if match), (), ()
    return in_a_row(len(lines), tuple(ignore), first=int(reduce_zero)), tuple(lines), (), ()


def _by_color(
    file: Path, rows: Sequence[tuple[str | None, ...]], reduce_zero: bool
) -> tuple[Coding, tuple[str, ...], tuple[tuple[int, int, int], ...], tuple[str, ...]]:
    """Returns the same of a table of colors. Colors named "ignored" or "void" are no class."""
    if reduce_zero:
        raise ConfigError(
            f'{file} gives the color of each class: name the one that is no class "ignored", and leave out reduce_zero.'
        )
    colors, names, values, ignored = [], [], [], set()
    for place, (red, green, blue, name) in enumerate(rows):
        color = (int(red or 0), int(green or 0), int(blue or 0))
        if max(color) > 255 or color in colors:
            raise DataError(f"{file}: the color {red},{green},{blue} is beyond 255 or there twice.")
        colors.append(color)
        if str(name).lower() in ("ignored", "void"):
            ignored.add(place)
        else:
            names.append(str(name))
            values.append(place)
    palette = tuple(colors[value] for value in values)
    coding = Coding(tuple(values), frozenset(ignored), colors=tuple(colors))
    return coding, tuple(names), palette, (f"Masks in RGB, by the colors of {NAMES}.",)


def _which_classes(root: Path, pairs: Sequence[Pair]) -> str:
    """Returns the message for classes that are not told, with the values of some masks."""
    anything = Coding((0,), None)
    values: set[int] = set()
    looked_at = [pair for pair in pairs if pair.mask is not None][:LOOKED_AT]
    for pair in looked_at:
        values |= set(StoredMask(pair.mask or b"", pair.mask_where, anything).values().ravel().tolist())
    ordered = sorted(values)
    shown = ", ".join(map(str, ordered[:20])) + (", …" if len(ordered) > 20 else "")
    most = max((value for value in ordered if value != IGNORED), default=0)
    return (
        f"{root} does not say which classes there are. The first {len(looked_at)} masks hold the values {shown}. Write "
        f"{root / NAMES} with a name a line, or give the number of classes behind the path: ?classes={most + 1}, or "
        f"?classes={max(most, 1)}&reduce_zero=yes if 0 is no class."
    )
