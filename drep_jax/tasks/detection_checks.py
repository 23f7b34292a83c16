"""Checks of detection before any work: settings, the network against the classes, and the labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from drep_jax.data.labels import spread
from drep_jax.data.source import Source, raw_item
from drep_jax.errors import ConfigError, DataError, UnreadableError
from drep_jax.models.detectors.base import Detector
from drep_jax.parallel import devices
from drep_jax.tasks.base import StagePlan, check_unmerged
from drep_jax.typing import Config

LOOKED_AT = 32
"""Images of a split that are looked at before any work, where a source does not know its objects."""

EXPLICIT = ("final_only",)
"""Learners whose result is no network, but a way of calling one."""


def check_settings(config: Config) -> None:
    """Refuses settings outside their range.

    Raises:
      ConfigError: naming the setting.
    """
    options = config["detection"]
    if not 0 < options["confidence"] < 1:
        raise ConfigError(f"detection.confidence={options['confidence']} is a score, above 0 and below 1.")
    for name, least in (("objects", 0), ("padding", 1), ("examples", 0)):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"detection.{name}={value!r} must be a whole number of at least {least}.")
    if config["model"].get("num_classes") == -1:
        raise ConfigError(
            "model.num_classes=-1 is a backbone without a head, and task detection scores what one finds. Give the number of "
            "classes, or 0 for that of the images."
        )


def check_detector(task: Any, setup: Any) -> None:
    """Refuses a backbone that does not find objects, or finds those of other classes than the labels.

    Raises:
      ConfigError: with both numbers of classes, and what to do.
    """
    backbone, name = setup.backbone, type(setup.backbone).__name__
    if not isinstance(backbone, Detector):
        missing = [part for part in ("num_classes", "objects", "losses") if not hasattr(backbone, part)]
        raise ConfigError(
            f"{name} finds no objects: it lacks {', '.join(missing)}, which task {task.name} calls (drep_jax.models.detectors."
            "base.Detector). Choose a model that finds objects (docs/detection.md)."
        )
    if setup.num_classes is not None and backbone.num_classes != setup.num_classes:
        raise ConfigError(
            f"The head of {name} has {backbone.num_classes} classes, and the labels of {setup.train.name} have "
            f"{setup.num_classes}. Classes are compared by their numbers, so take images or weights of the same ones, or train "
            "a head for these (model.num_classes=0)."
        )


def check_run(task: Any, config: Config, setup: Any, plans: Sequence[StagePlan], *, chooses: bool) -> None:
    """Refuses images that the task cannot learn from or choose on, and settings that it does not use.

    Args:
      task: the run's `drep_jax.tasks.detection.Detection`.
      config, setup: of the run.
      plans: the labeled stages of the run.
      chooses: whether a learner of the run chooses on held-out images.

    Raises:
      DrepError: its subclasses name the setting or the images.
    """
    check_unmerged(setup.others, "objects")
    explicit = [name for name in (config["learner"], *config["compare"]) if name in EXPLICIT]
    if explicit:
        raise ConfigError(
            f"Learner {explicit[0]} denoises the one final feature of an image, and {task.name} has none."
        )
    for plan in plans:
        if plan.section in config and config[plan.section].get("label_smoothing"):
            raise ConfigError(
                f"{plan.section}.label_smoothing: networks that find objects have their own loss; set it to 0."
            )
    if plans:
        check_objects(setup.train, "training images")
        if getattr(setup.backbone, "masks", False) and not task.masks:
            raise ConfigError(
                f"{type(setup.backbone).__name__} learns masks, too: set --config.{task.name}.masks=True, for labels with "
                "outlines, or take a network without them (model.masks=False)."
            )
        if task.masks and "instances" not in {column.name for column in getattr(setup.train, "columns", ())}:
            raise ConfigError(
                f"{task.name}.masks=True, but the objects of {setup.train.name} have no outlines. Give COCO's JSON with "
                "segmentations, or set it to False."
            )
        if devices.host()[1] > 1 and not task.capacity:
            raise ConfigError(
                f"Several processes train on batches of one shape, so say how many objects an image may have: "
                f"--config.{task.name}.objects=N."
            )
    if chooses and config["select"]["labels"] and setup.held_out.num_classes is not None:
        check_objects(setup.held_out, "held-out images")


def check_objects(source: Source, what: str) -> None:
    """Refuses images without boxes, without a single object that counts, or with classes beyond the set's.

    Args:
      source: the images.
      what: what to call them.

    Raises:
      DataError: with what to do.
    """
    classes = source.num_classes
    objects = getattr(source, "objects", None)
    read = 0
    counted = 0
    for place in spread(len(source), LOOKED_AT):
        try:
            item = raw_item(source, place)
        except UnreadableError:
            continue  # counted, tolerated or refused where images are read
        if "boxes" not in item or classes is None:
            raise DataError(
                f"The {what} of {source.name} have no boxes. Give images with boxes: coco, det_voc, det_folder or det_npz "
                "(docs/detection.md)."
            )
        numbers = np.asarray(item["classes"])
        strange = numbers[(numbers < 0) | (numbers >= classes)]
        if len(strange):
            raise DataError(
                f"{item['where']}: an object has the class {strange[0]}; expected 0 to {classes - 1}. Are numbers of COCO's "
                "categories (1 to 90) meant to be classes (0 to 79)?"
            )
        read += 1
        counted += int(np.sum(~(np.asarray(item["crowd"], bool) | np.asarray(item["ignore"], bool))))
    total = counted if objects is None else int(np.sum(objects))
    if read and not total:
        raise DataError(
            f"{source.name}, {what}: no image has an object that counts; there are none, or only crowds and ignored ones, so "
            "nothing can be scored or learned. Are these the annotations of this split?"
        )
