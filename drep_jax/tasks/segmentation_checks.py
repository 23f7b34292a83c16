"""Checks of segmentation before any work: the head against the classes, and the labels against both."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from drep_jax.data.columns import Column
from drep_jax.data.geometry import IGNORED
from drep_jax.data.labels import spread
from drep_jax.data.source import Source, original_size_of, raw_item
from drep_jax.errors import ConfigError, DataError, UnreadableError
from drep_jax.models import output_shape
from drep_jax.tasks.base import StagePlan, check_unmerged
from drep_jax.typing import Config

LOOKED_AT = 16
"""Maps of a split that are looked at before any work; all others are checked where they are read."""

LISTED = 8
"""Labels in a histogram."""


def check_run(task: Any, config: Config, setup: Any, plans: Sequence[StagePlan], *, chooses: bool) -> None:
    """Refuses images that the task cannot learn from or choose on.

    Args:
      task: the run's `drep_jax.tasks.segmentation.Segmentation`.
      config, setup: of the run.
      plans: the labeled stages of the run.
      chooses: whether a learner of the run chooses on held-out images.

    Raises:
      DrepError: its subclasses name the setting or the images.
    """
    check_unmerged(setup.others, "pixels")
    if plans:
        check_maps(setup.train, setup.train.num_classes, "training images")
    if chooses and config["select"]["labels"] and setup.held_out.num_classes is not None:
        check_maps(setup.held_out, setup.held_out.num_classes, "held-out images")


def check_head(task: Any, setup: Any) -> None:
    """Refuses a backbone whose outputs are no logits of the pixels, or of other classes than the labels.

    Args:
      task: as for `check_run`.
      setup: of the run or evaluation.

    Raises:
      ConfigError: with both numbers of classes, and what to do.
    """
    name = type(setup.backbone).__name__
    shape = output_shape(setup.backbone, setup.abstract, setup.images)
    if len(shape) != 4:
        raise ConfigError(
            f"{name} gives outputs of shape {shape} for images of shape {setup.images.shape}, and task {task.name} needs "
            "logits (batch, height, width, classes) at any fraction of the image. Take a backbone with such a "
            "head (docs/models.md)."
        )
    void = task.void_outputs
    if void and max(void) >= shape[-1]:
        raise ConfigError(
            f"{task.name}.void_outputs={void}, but the head of {name} has the outputs 0 … {shape[-1] - 1}."
        )
    classes, labels = task.classes(shape[-1]), setup.num_classes
    if labels is None or classes == labels:
        return
    without = f", {classes} of them classes" if void else ""
    more = (
        f"Outputs that stand for no class are named by --config.{task.name}.void_outputs=({labels},), for the last one; they "
        "may be any. "
        if classes > labels
        else ""
    )
    raise ConfigError(
        f"The head of {name} has {shape[-1]} outputs{without}, and the labels of {setup.train.name} have {labels} classes. "
        f"{more} If 0 means no class in the masks, and is counted as one, reduce the labels by one (docs/segmentation.md). "
        "Otherwise take images or weights of the same classes."
    )


def check_maps(source: Source, classes: int | None, what: str) -> None:
    """Looks at some label maps of a split.

    Args:
      source: the images.
      classes: number of classes; None for images without labels.
      what: what to call the images in messages.

    Raises:
      DataError: for labels that are no maps of the image's size, that are no classes, or that leave
        nothing to learn.
    """
    if classes is None:
        raise DataError(f"The {what} of {source.name} have no labels. Give images with masks (docs/data.md).")
    counts = np.zeros(256, np.int64)
    read = with_strange = 0
    for place in spread(len(source), LOOKED_AT):
        try:
            item = raw_item(source, place)
            if "label" not in item:
                continue
            labels = _map_of(item, source, place)
        except UnreadableError:
            continue  # counted, tolerated or refused where images are read
        counts += np.bincount(labels.reshape(-1), minlength=256)
        with_strange += bool(((labels >= classes) & (labels != IGNORED)).any())
        read += 1
    if not read:
        return
    where = f"{source.name}, {what}"
    if with_strange:
        raise DataError(
            f"{where}: {with_strange} of the {read} label maps looked at hold labels outside 0 … {classes - 1}. Labels, in % "
            f"of the pixels: {_histogram(counts)}. If 0 means no class, all labels are one too large: reduce them by one "
            f"(docs/segmentation.md). If there are more classes, say so to the source; what is no class is {IGNORED}."
        )
    present = np.flatnonzero(counts[:classes])
    if not len(present):
        raise DataError(
            f"{where}: all pixels of the {read} label maps looked at are {IGNORED}, which is ignored, so there is nothing to "
            "learn or score. If labels were reduced by one and 0 is a class, do not reduce them; if the masks of this split "
            "are not published, leave it out."
        )
    if len(present) == 1 and counts[IGNORED] and read > 1:
        raise DataError(
            f"{where}: the {read} label maps looked at hold {present[0]} and {IGNORED} only, and {IGNORED} is ignored, so one "
            f"class is left, which is right everywhere. If {IGNORED} is the object, store it as another number "
            "(docs/segmentation.md)."
        )


def _map_of(item: dict[str, Any], source: Source, place: int) -> np.ndarray:
    """Returns the label map of an item, integers (h, w)."""
    labels, where = np.asarray(item["label"]), item["where"]
    if labels.ndim == 3:
        raise DataError(
            f"{where}: its label map is an array of {labels.shape}, of colors; expected (height, width), a class for each "
            "pixel. Give the table of colors (seg_folder with classes.txt, docs/data.md), or store classes."
        )
    size = item["image"].shape[:2] if isinstance(item["image"], np.ndarray) else original_size_of(source, place)
    Column("label", labels.dtype, geometry="mask").value(labels, size, where)
    if labels.dtype.kind not in "iu" or (labels.size and not 0 <= labels.min() <= labels.max() <= IGNORED):
        raise DataError(f"{where}: its label map holds {labels.dtype}; expected whole numbers from 0 to {IGNORED}.")
    return labels.astype(np.int64)


def _histogram(counts: np.ndarray) -> str:
    """Returns the largest labels and all the largest counts, in % of the pixels."""
    there = np.flatnonzero(counts)
    order = there[np.argsort(-counts[there], kind="stable")]
    shown = sorted({*order[:LISTED].tolist(), *there[there < IGNORED][-2:].tolist()})
    parts = [f"{label}: {100 * counts[label] / counts.sum():.3g}" for label in shown]
    return ", ".join(parts) + (f", and {len(there) - len(shown)} more labels" if len(there) > len(shown) else "")
