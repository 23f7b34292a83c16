"""What an evaluation needs of the test images, checked before any work, and what the sources have to say."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from drep_jax.data import Source
from drep_jax.data.collate import read_or_mask
from drep_jax.data.labels import check_classes, check_scorable, described
from drep_jax.errors import DataError, DrepError
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.run.setup import Setup
from drep_jax.run.side import check_seen
from drep_jax.tasks import Task
from drep_jax.typing import Config

UNKNOWN = "evaluate.unknown_classes"
"""The setting for classes of the test images without a training image."""


def check_scoring(config: Config, setup: Setup) -> dict[str, dict[str, Any]]:
    """Refuses test images that cannot be scored, and returns the report's `data`.

    Labels are looked at where they are known without decoding. One image of every test split is
    read, and the program of the evaluation is traced for it.

    Raises:
      DrepError: its subclasses name the split, what is wrong with it, and what to do.
    """
    task, unknown = setup.task, config["evaluate"].get("unknown_classes", "refuse")
    data = described(setup.parts)
    task.check_scoring(setup)
    if setup.test is not None:
        task.check_test(setup.test)
        data["test"]["notes"] += check_seen(task, setup)
        if task.test_needs_head:
            divided = getattr(setup.test, "stored", None) is not None and _stored(setup.test) == _stored(setup.train)
            also = setup.held_out if divided else None
            note = check_classes(setup.train, setup.test, unknown=unknown, setting=UNKNOWN, also=also)
            data["test"]["notes"] += [note] if note else []
        mixtures = [Statistics.parse(text) for text in config["evaluate"]["statistics"]]
        _trace(setup, task, setup.test, mixtures)
    for other in setup.others:
        if other.gallery is not None:
            check_classes(other.gallery, other.test, unknown="score", setting=UNKNOWN)  # the gallery is a sample
            check_scorable(other.gallery, "training images")
            check_scorable(other.test)
        else:
            task.check_test(other.test)
    return data


def _stored(source: Source) -> str | None:
    return getattr(source, "stored", None)


def _trace(setup: Setup, task: Task, source: Source, mixtures: Sequence[Statistics]) -> None:
    """Reads one test image and traces its way to statistics, also with mixed ones of BatchNorms.

    Raises:
      ConfigError: for a backbone without BatchNorms that could mix.
      DataError: for an image or labels that the task cannot use.
    """
    batch = read_or_mask(source, np.zeros(1, np.int32), 1, task.columns, sizes=setup.sizes)
    labels = {name: column for name, column in batch.items() if name != "image"}
    try:
        task.has_label(labels)
        images = jax.eval_shape(setup.inputs, batch)
        variables = setup.abstract

        def statistics(variables: Any, images: Any, labels: Any) -> Any:
            return task.statistics(task.predict(setup.backbone, variables, images, labels), labels)

        jax.eval_shape(statistics, variables, images, labels)
        for mixture in mixtures:
            mixed: Any = MixedStatistics(setup.backbone, mixture)
            jax.eval_shape(lambda *inputs, mixed=mixed: task.predict(mixed, *inputs), variables, images, labels)
    except DrepError:
        raise
    except Exception as error:
        raise DataError(
            f"The evaluation cannot use the test images of {source.name}: {type(error).__name__}: {error}. An image of it has "
            f"the columns {', '.join(sorted(batch.keys() - {'index', 'mask'}))}."
        ) from error
