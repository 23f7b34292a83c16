"""Labels without decoding: images that lack one, labels out of range, classes of one split unknown to another."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from drep_jax.data.columns import Columns
from drep_jax.data.geometry import IGNORED
from drep_jax.data.source import raw_item
from drep_jax.errors import DataError
from drep_jax.typing import Batch

MISSING = -1
"""The label of an image that has none."""

PROBED = 32
"""Number of images that are looked at where a source does not know its labels."""

SHOWN = 5


def labels_of(source: Any) -> np.ndarray | None:
    """Returns the label of every image without decoding, int32 (n,); -1 where it is missing.

    Args:
      source: the images; None is returned if it has no labels, or knows them by reading only.
    """
    table = getattr(source, "table", {})
    return table["label"] if "label" in table else getattr(source, "labels", None)


def spread(length: int, count: int) -> list[int]:
    """Returns up to `count` indices below `length`, evenly spread, the first and the last among them.

    >>> spread(100, 3), spread(2, 3)
    ([0, 50, 99], [0, 1])
    """
    return np.unique(np.round(np.linspace(0, length - 1, min(length, count))).astype(int)).tolist() if length else []


def labeled_images(source: Any) -> np.ndarray | None:
    """Returns which images have a label, bool (n,); None if all have one, or if it is not known."""
    labels = labels_of(source)
    return None if labels is None or np.all(labels != MISSING) else labels != MISSING


def check_form(source: Any, columns: Columns) -> None:
    """Refuses labels of a form that the task does not declare, such as masks where one number an image is needed.

    Args:
      source: the images.
      columns: label columns that the task declares.

    Raises:
      DataError: naming the column.
    """
    declared = {column.name for column in columns}
    strange = next((column for column in getattr(source, "columns", ()) if column.name not in declared), None)
    if strange is not None:
        form = "maps of the pixels (masks)" if strange.geometry == "mask" else "one value for each object"
        raise DataError(
            f'The labels "{strange.name}" of {source.name} are {form}, which this task cannot use. Choose a task for '
            "such labels with --config.task, or give images with one label each (docs/data.md)."
        )


def check_scorable(source: Any, what: str = "test images", columns: Columns = ()) -> None:
    """Refuses images without any label, labels outside the classes, and labels of another form.

    Where the source does not know its labels without reading, some images are looked at.

    Args:
      source: the images.
      what: what to call them.
      columns: label columns that the task declares.

    Raises:
      DataError: with what to do.
    """
    check_form(source, columns)
    labels, which = labels_of(source), "its"
    if labels is None and source.num_classes is not None and len(source):
        if getattr(source, "columns", ()):
            return  # checked where they are decoded
        items = [raw_item(source, place) for place in spread(len(source), PROBED)]
        labels = np.array([item.get("label", MISSING) for item in items])
        if labels.ndim > 1 or labels.dtype.kind not in "iu":
            return  # of another form, for a task that declares it
        which = f"{len(labels)} of its"
    if source.num_classes is None or (labels is not None and len(labels) and (labels == MISSING).all()):
        raise DataError(
            f"None of {which} {len(source):,} {what} of {source.name} has a label, so nothing can be scored. Give labeled "
            "images (a split folder `test` or `val` with class folders, or labels other than -1), or remove the split: "
            "then a part of the training images serves (docs/data.md)."
        )
    if labels is not None:
        check_range(labels, source.num_classes, source.name)


def check_range(labels: np.ndarray, classes: int | None, source: str, index: np.ndarray | None = None) -> None:
    """Refuses labels outside 0 … classes − 1, other than -1 for a missing one, and 255 in masks.

    Args:
      labels: (n,), or masks (n, height, width).
      classes: number of classes; None for any.
      source: name of the source, for messages.
      index: (n,) indices of the images; None for 0 … n − 1.

    Raises:
      DataError: with the number of such labels and an example.
    """
    if labels.ndim > 1:
        _check_masks(labels, classes, source, index)
        return
    outside = np.flatnonzero((labels < MISSING) | (labels >= (np.inf if classes is None else classes)))
    if len(outside):
        first = int(outside[0])
        place = first if index is None else int(index[first])
        limit = "…" if classes is None else f"… {classes - 1}"
        raise DataError(
            f"{source}: {len(outside):,} of {len(labels):,} labels lie outside 0 {limit}, such as {int(labels[first])} of "
            f"image {place}. Correct them; -1 stands for a missing label."
        )


def _check_masks(masks: np.ndarray, classes: int | None, source: str, index: np.ndarray | None) -> None:
    """Raises DataError for masks (n, height, width) with a value that is no class and not ignored."""
    most = IGNORED if classes is None else classes
    outside = ((masks < 0) | (masks >= most)) & (masks != IGNORED)
    images = np.flatnonzero(outside.any(axis=(1, 2)))
    if len(images):
        first = int(images[0])
        value = int(masks[first][outside[first]][0])
        raise DataError(
            f"{source}: the masks of {len(images):,} of {len(masks):,} images hold values outside 0 … {most - 1}, such as "
            f"{value} of image {first if index is None else int(index[first])}, {100 * outside[first].mean():.2g} % of its "
            "pixels. If 0 means no class, all others are one too large (reduce_zero_label). Values that mean no class are 255."
        )


def labeled_maps(masks: np.ndarray) -> np.ndarray:
    """Returns which masks, (n, height, width), have a pixel that is not ignored, bool (n,).

    >>> labeled_maps(np.array([[[255, 255]], [[255, 3]]], np.uint8)).tolist()
    [False, True]
    """
    return (masks != IGNORED).reshape(len(masks), -1).any(axis=1)


def checked(batches: Iterable[Batch], source: Any) -> Iterator[Batch]:
    """Yields batches for a stage that trains with labels.

    Raises:
      DataError: for an image without a label, or with one out of range.
    """
    for batch in batches:
        labels = batch.get("label")
        if labels is not None and labels.ndim in (1, 3):
            check_range(labels, source.num_classes, source.name, batch["index"])
            if labels.ndim == 1 and (missing := np.flatnonzero(labels == MISSING)).size:
                raise DataError(
                    f"{source.name}: image {int(batch['index'][missing[0]])} has no label (-1), and this stage trains with "
                    "labels. Remove such images, or give the source an attribute `labels`, by which they are left out."
                )
        yield batch


def check_classes(train: Any, test: Any, *, unknown: str, setting: str, also: Any = None) -> str | None:
    """Refuses test images whose classes the training images do not have.

    A class is compared by its name where the source has names, otherwise by its number. Where the
    labels of all images are known, only classes with an image count.

    Args:
      train, test: the two splits.
      unknown: "refuse", or "score" where the backbone knows the classes from elsewhere.
      setting: name of the setting that `unknown` comes from, for messages.
      also: a split that was divided from the same images as both, or None. Its classes are known,
        and a class that fell into the test part alone is only mentioned.

    Returns:
      A sentence for the user, or None.

    Raises:
      DataError: if no class is in common, if test images have unknown classes, or if the same class
        has another number.
    """
    if train.num_classes is None or test.num_classes is None:
        return None
    # A list of numbers stands for no names: a file without names is compared with one that has them by number.
    named = train.class_names is not None and test.class_names is not None
    named = named and _numbered(train.class_names) == _numbered(test.class_names)
    known, tested = set(_classes(train, named)), set(_classes(test, named))
    if also is not None and also.num_classes is not None:
        known |= set(_classes(also, named))
    lists = f"Training: {_listed(known)}. Test: {_listed(tested)}."
    if not known & tested:
        raise DataError(
            f"The test images of {test.name} and the training images of {train.name} have no class in common, so every score "
            f"would be 0. {lists} Name the folders or labels of both splits alike."
        )
    if named:
        numbers = {name: number for number, name in enumerate(train.class_names)}
        moved = [n for i, n in enumerate(test.class_names) if n in tested and numbers.get(n, i) != i]
        if moved:
            raise DataError(
                f'The class "{moved[0]}" of {test.name} has another number in the test split than in the training split. '
                f"{lists} Give both splits the same list of classes."
            )
    strange = tested - known
    if not strange:
        return None
    if also is None and unknown == "refuse":
        raise DataError(
            f"{len(strange):,} of the {len(tested):,} classes of the test images of {test.name} have no training image: "
            f"{_listed(strange)}. {lists} Name the classes of both splits alike or leave those images out; if the backbone "
            f'knows the classes from elsewhere, set --config.{setting}="score".'
        )
    return f"{len(strange):,} of {len(tested):,} classes of the test images have no training image: {_listed(strange)}."


def _numbered(names: Sequence[str]) -> bool:
    return all(name == str(number) for number, name in enumerate(names))


def _classes(source: Any, named: bool) -> list[str]:
    """Returns the names, or numbers as text, of the classes that have images."""
    labels = labels_of(source)
    numbers: Sequence[int] = range(source.num_classes)
    if labels is not None:
        numbers = [number for number in np.unique(labels).tolist() if number != MISSING]
    names = source.class_names if named else None
    return [names[number] if names is not None and 0 <= number < len(names) else str(number) for number in numbers]


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    more = f" and {len(ordered) - SHOWN:,} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more or "none"


def ignored_note(suffixes: Counter[str], where: str, read: Sequence[str]) -> str | None:
    """Returns a sentence on the entries of a folder that are no images, with counts, or None.

    >>> ignored_note(Counter({".jfif": 2, "hidden": 1}), "DIR", (".jpg", ".png"))
    'Ignored 3 entries below DIR (2 .jfif, 1 hidden): images end in .jpg, .png.'
    """
    if not (total := sum(suffixes.values())):
        return None
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in suffixes.most_common(SHOWN))
    more = ", …" if len(suffixes) > SHOWN else ""
    return (
        f"Ignored {total:,} {'entry' if total == 1 else 'entries'} below {where} ({kinds}{more}): images end in "
        f"{', '.join(read)}."
    )


def described(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the report's `data`: of each part its source, counts, and what the source has to say.

    Args:
      parts: name of a part ↦ source, or None for one that there is not.
    """
    result = {}
    for part, source in parts.items():
        if source is None:
            continue
        labels = labels_of(source)
        unlabeled = len(source) if source.num_classes is None else None
        if labels is not None:
            unlabeled = int(np.sum(labels == MISSING))
        result[part] = {
            "source": source.name,
            "images": len(source),
            "classes": source.num_classes,
            "unlabeled": unlabeled,
            "notes": [source.note] if source.note else [],
        }
    return result
