"""The images of `config.data`: one source or several merged, held-out images, and test images."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.data import Source, open_source
from drep_jax.data.decode import limit_pixels
from drep_jax.data.loader import epoch_order
from drep_jax.data.merged import MergedSource, epoch_counts
from drep_jax.data.source import Subset
from drep_jax.data.unreadable import tolerating
from drep_jax.errors import ConfigError, DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclasses.dataclass(frozen=True)
class Labeled:
    """A labeled source whose classes no head knows: test images get their nearest neighbor's.

    Attributes:
      name: of the source.
      gallery: training images of known classes; None where the test images are scored by
        themselves.
      test: images to assign to a class.
    """

    name: str
    gallery: Source | None
    test: Source


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a run.

    Attributes:
      train: images to learn from; unlabeled where several sources are merged.
      held_out: images to choose hyper-parameters on; likewise.
      num_classes: of `data.source`, which the backbone's head knows; None when it is unlabeled. If
        only its test images are labeled, their number of classes.
      test: images of `data.source` to evaluate the head on, or None.
      others: labeled sources to evaluate by nearest neighbors.
    """

    train: Source
    held_out: Source
    num_classes: int | None
    test: Source | None
    others: tuple[Labeled, ...]


def open_images(
    data: Mapping[str, Any],
    *,
    head: bool,
    gallery: int,
    seed: int,
    test_needs_head: bool = True,
    check_test: Callable[[Source], None] = lambda source: None,
    test_resize: str = "",
) -> Images:
    """Opens the images of a run.

    Args:
      data: `config.data`; entries that an older configuration lacks have their defaults.
      head: whether the backbone has one.
      gallery: how many training images of each further source its test images are compared with.
      seed: of the choice of those.
      test_needs_head: whether test images can be scored only by a head that knows their labels; of
        others each source's test images are scored by themselves.
      check_test: raises for test images that cannot be scored.
      test_resize: how test images get their size where `data.test_resize` does not say.

    Raises:
      ConfigError: for sources or weights that cannot be merged.
      DataError: for images that are not there.
    """
    options = {"image_size": tuple(data["image_size"]), "resize": data["resize"], "data_dir": data["data_dir"] or None}
    test_options = {**options, "resize": data.get("test_resize", "") or test_resize or data["resize"]}
    allowed = data.get("max_unreadable", 0)
    limit_pixels(data.get("max_megapixels", 0))
    specs, weights = sources_of(data)
    if specs[1:]:
        epoch_counts([1] * len(specs), weights)  # weights are refused before images are looked for
        if gallery < 1:
            raise ConfigError(f"evaluate.gallery={gallery} must be at least 1.")
    trains = [open_source(spec, TRAIN, **options) for spec in specs]
    held = [open_source(spec, VALIDATION, **options) for spec in specs]
    others = []
    for spec, train in list(zip(specs, trains, strict=True))[1 if head or not test_needs_head else 0 :]:
        if not test_needs_head:
            others.append(Labeled(train.name, None, tolerating(_checked_test(spec, test_options, check_test), allowed)))
        elif specs[1:] and train.num_classes:
            chosen = np.sort(epoch_order(len(train), seed, 0)[:gallery]).tolist()
            other_test = tolerating(open_source(spec, TEST, **test_options), allowed)
            others.append(Labeled(train.name, tolerating(Subset(train, chosen), allowed), other_test))
    labeled = bool(trains[0].num_classes)
    # A source may hold out nothing (`?held_out=0`), which is no reason not to learn from it.
    choosing = [(part, weight) for part, weight in zip(held, weights, strict=True) if len(part)] or [
        (held[0], weights[0])
    ]
    test: Source | None = None
    if not test_needs_head:
        test = tolerating(_checked_test(specs[0], test_options, check_test), allowed)
    elif head:
        test = _labeled_test(specs[0], test_options) if not labeled else open_source(specs[0], TEST, **test_options)
        test = None if test is None else tolerating(test, allowed)
    return Images(
        train=tolerating(_one(trains, weights), allowed),
        held_out=tolerating(_one(*map(list, zip(*choosing, strict=True))), allowed),
        num_classes=trains[0].num_classes or (test.num_classes if test is not None and test_needs_head else None),
        test=test,
        others=tuple(others),
    )


def sources_of(data: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """Returns the sources of `config.data`, its own first, and their weights.

    Raises:
      ConfigError: where `data.merge` is no list of sources with weights, or has one twice.
    """
    merge = data.get("merge", ())
    for entry in merge:
        if (
            not isinstance(entry, Sequence)
            or isinstance(entry, str)
            or len(entry) != 2
            or not isinstance(entry[0], str)
        ):
            raise ConfigError(
                f"data.merge={merge!r}: expected pairs of a source and its weight, such as (('folder:DIR', 1.0),)."
            )
    specs = [data["source"], *(entry[0] for entry in merge)]
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice is not None:
        raise ConfigError(
            f'data.merge: "{twice}" is there twice. Name every source once and give it the sum of the weights.'
        )
    return specs, [data.get("weight", 1.0), *(entry[1] for entry in merge)]


def _labeled_test(spec: str, options: Mapping[str, Any]) -> Source | None:
    """Returns the test images of a source whose training images have no labels, if they have some."""
    try:
        test = open_source(spec, TEST, **options)
    except DataError:  # too few images for a part of their own
        return None
    return test if test.num_classes else None


def _checked_test(spec: str, options: Mapping[str, Any], check: Callable[[Source], None]) -> Source:
    test = open_source(spec, TEST, **options)
    check(test)
    return test


def _one(sources: list[Source], weights: list[float]) -> Source:
    return MergedSource(sources, weights) if sources[1:] else sources[0]
