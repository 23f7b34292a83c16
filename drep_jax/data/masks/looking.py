"""A look at some masks of a split: a histogram of their labels for the user, and what cannot be right."""

from collections.abc import Sequence

import numpy as np

from drep_jax.data.decode import stored_gray, stored_size
from drep_jax.data.geometry import IGNORED
from drep_jax.data.labels import spread
from drep_jax.data.masks.coding import Coding
from drep_jax.data.masks.listing import Pair
from drep_jax.data.masks.stored_mask import StoredMask
from drep_jax.data.steps import Size
from drep_jax.errors import DataError, UnreadableError

LOOKED_AT = 16
LISTED = 6


def look(
    pairs: Sequence[Pair],
    coding: Coding,
    class_names: Sequence[str],
    image_size: Size,
    where: str,
    ignored_only: bool = False,
) -> str | None:
    """Reads some masks of a split, evenly spread.

    Args:
      pairs: of the split.
      coding, class_names: of its set.
      image_size: (height, width) that images are fitted to.
      where: what to call the split in messages.
      ignored_only: whether to return None, instead of an error, where all pixels are ignored.

    Returns:
      A sentence with the classes by decreasing share of the pixels, the ignored share, and how many
      images are smaller than that size.

    Raises:
      DataError: if none can be read, if no pixel has a class, if 255 is ignored and seems to be a class, and for masks
        that cannot be used.
    """
    counts = np.zeros(256, np.int64)
    smaller = gray = read = 0
    unreadable: UnreadableError | None = None
    for pair in (pairs[place] for place in spread(len(pairs), LOOKED_AT)):
        if pair.mask is None:
            continue
        try:
            mask = StoredMask(pair.mask, pair.mask_where, coding, (pair.image, pair.where))
            values = mask.values()
            coding.labels(values, f"The mask {pair.mask_where}")
            size = stored_size(pair.image, pair.where)
            gray += stored_gray(pair.image, pair.where)
        except UnreadableError as error:
            unreadable = unreadable or error  # counted, tolerated or refused where images are read
            continue
        counts += np.bincount(values.ravel(), minlength=256)
        smaller += size[0] < image_size[0] or size[1] < image_size[1]
        read += 1
    if not read and unreadable is not None:
        raise unreadable
    if not read:
        return None
    by_class, total = counts[list(coding.values)], int(counts.sum())
    ignored = total - int(by_class.sum())
    histogram = _stored_histogram(counts)
    if not by_class.any():
        if ignored_only:
            return None
        raise DataError(
            f"{where}: none of the {read} masks looked at has a pixel with a class: all of them are ignored. Stored values, in "
            f"% of the pixels: {histogram}. {coding.words} If these values are classes, correct reduce_zero or ignore, or give "
            "the masks of this set."
        )
    seen = np.flatnonzero(by_class)
    values_there = np.flatnonzero(counts).tolist()
    if len(seen) == 1 and values_there == [coding.values[seen[0]], IGNORED] and len(pairs) > 1:
        raise DataError(
            f"{where}: the {read} masks looked at hold {values_there[0]} and 255 only, and 255 is ignored, so that one class "
            f"remains. If 255 is the object, write classes.txt with the lines '{values_there[0]} background' and '255 object', "
            "and give the option ignore=none."
        )
    order = seen[np.argsort(-by_class[seen], kind="stable")]
    parts = [f"{class_names[label]} {100 * by_class[label] / total:.3g}" for label in order[:LISTED]]
    more = f" and {len(order) - LISTED} more classes" if len(order) > LISTED else ""
    absent = len(class_names) - len(seen)
    sentence = (
        f"Labels of {read} of its {len(pairs):,} masks, in % of the pixels: {', '.join(parts)}{more}; "
        f"{100 * ignored / total:.3g} % ignored; {absent} of {len(class_names)} classes do not occur."
    )
    if gray:
        sentence += f" {gray} of these images are gray: they are read as RGB with equal channels."
    if smaller:
        sentence += (
            f" {smaller} of these images are smaller than {image_size[0]} x {image_size[1]} pixels: random crops pad them, "
            "with ignored labels."
        )
    return sentence


def _stored_histogram(counts: np.ndarray) -> str:
    there = np.flatnonzero(counts)
    largest = there[np.argsort(-counts[there], kind="stable")]
    shown = ", ".join(f"{value}: {100 * counts[value] / counts.sum():.3g}" for value in largest[:LISTED].tolist())
    return shown + (f" and {len(there) - LISTED} more" if len(there) > LISTED else "")
