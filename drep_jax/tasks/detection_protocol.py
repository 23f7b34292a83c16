"""How detections were scored, in sentences of the report."""

import math
from typing import Any

import numpy as np

from drep_jax.data.fits import KEEP, parse_fit
from drep_jax.data.source import Source, fit_of, image_size_of, varies
from drep_jax.metrics.detection import AREAS
from drep_jax.tasks.base import Items

THRESHOLDS = ("rule", "score", "objectness", "iou", "nms", "candidates", "keep")
"""Fields of a network that say what it finds."""


def protocol_of(task: Any, source: Source, items: Items) -> tuple[str, ...]:
    """Returns the sentences.

    Args:
      task: the run's `drep_jax.tasks.detection.Detection`.
      source: the test images.
      items: of the unchanged network.
    """
    truths = np.asarray(items.statistics["truths"])
    totals = truths.sum(axis=(0, 1))
    counts = ", ".join(f"{total:,} {area}" for total, area in zip(totals[1:], list(AREAS)[1:], strict=True))
    present = int((truths[:, :, 0].sum(axis=0) > 0).sum())
    absent = [area for total, area in zip(totals, AREAS, strict=True) if not total]
    missing = f" No object of this set is {' or '.join(absent)}, so there is no such AP." if absent else ""
    areas = "as annotated" if getattr(source, "has_areas", True) else "of the boxes, since the set states none"
    return (
        f"AP is COCO's: the mean over IoUs of 0.50 to 0.95 and over the {present} classes that have an object, of the "
        f"precision interpolated at 101 recalls, with at most 100 boxes of a class in an image. {len(truths):,} images with "
        f"{totals[0]:,} objects: {counts}.{missing}",
        f"Objects are small below 32² pixels of the stored image, and medium up to 96²; areas are {areas}.",
        _resizing(task, source),
        "Intervals resample images, each with all its boxes, and recompute AP. AP of a resample is biased upward, since rare "
        "classes vanish or repeat, so only differences of two arms on the same resamples have intervals.",
    )


def _resizing(task: Any, source: Source) -> str:
    name, *numbers = parse_fit(fit_of(source))
    if not varies(source):
        height, width = image_size_of(source)
        text = f'Images are brought to {height} x {width} pixels ("{fit_of(source)}")'
    elif name == KEEP:
        padded = f", padded to multiples of {numbers[0]:g} pixels" if numbers[0] > 1 else ""
        text = f"Images keep their size{padded}"
    else:
        short, long, multiple = numbers
        at_most = f", the long one to {long:g} at most" if math.isfinite(long) else ""
        rounded = f", both sides rounded up to multiples of {multiple:g}" if multiple > 1 else ""
        text = f"The short side of images is resized to {short:g} pixels{at_most}{rounded}"
    if varies(source) and task.padding > 1:
        text += f", and they are padded with 0 after normalizing, to multiples of {task.padding} pixels"
    return f"{text}; boxes are clipped to the image and taken back to the stored one, where they are matched."
