"""Side information, such as the camera of an image: what the backbone knows of it, and what it is told."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from drep_jax.data.metadata import table_of
from drep_jax.errors import ConfigError, DataError
from drep_jax.tasks import Task

SHOWN = 10

Side = tuple[tuple[str, int], ...]
"""Side-information columns, each with the number of its values that the backbone knows."""

SideTables = tuple[tuple[int, ...], ...]
"""For each column, value of an image ↦ value that the backbone is told, -1 for none."""

PARTS = {"train": "training", "held_out": "held-out", "test": "test"}
"""Attribute of `Images` and `Setup` ↦ name of the part in messages."""


def side_information(task: Task, images: Any) -> tuple[Side, SideTables]:
    """Returns side-information columns with their cardinalities, and what the backbone is told.

    Args:
      task: names the columns, and what becomes of values that training never saw.
      images: `drep_jax.data.datasets.Images` of the run.

    Returns:
      ((column, number of values that the backbone knows), …), and for each column a table from a
      value to the one that is told, -1 for none; () where all are told as they are.

    Raises:
      ConfigError: for images that have no such column, and for values that cannot be told.
    """
    side, tables, changed = [], [], False
    for place, name in enumerate(task.side_columns):
        columns = dict(_columns(task, images, name))
        counts = [int(np.max(column)) + 1 for column in columns.values()]
        counts += [int(getattr(getattr(images, part), f"{name}s", 0)) for part in columns]  # of the whole set, if known
        known = task.side_known[place] if task.side_known else max(counts)
        seen = _seen(task, columns)
        value = _instead(task, name, known, seen)
        table = tuple(
            number if value is None or number in seen else value for number in range(max(counts[: len(columns)]))
        )
        changed |= table != tuple(range(len(table)))
        side.append((name, known))
        tables.append(table)
    return tuple(side), tuple(tables) if changed else ()


def check_seen(task: Task, setup: Any) -> list[str]:
    """Refuses held-out and test images with side information that training never saw.

    Args:
      task: of the run.
      setup: of the run.

    Returns:
      Sentences on such images, if the task says what the backbone is told of them.

    Raises:
      DataError: if it does not, or if the backbone knows no such value.
    """
    notes = []
    for name, known in setup.side:
        columns = dict(_columns(task, setup, name))
        seen = _seen(task, columns)
        for part in reversed(columns):
            column = columns[part]
            unseen = np.unique(column[~np.isin(column, list(seen))]).tolist()
            if not unseen or part == "train":
                continue
            count = int(np.isin(column, unseen).sum())
            numbers = ", ".join(map(str, unseen[:SHOWN])) + (", …" if len(unseen) > SHOWN else "")
            why = "the backbone was trained on another set" if task.side_known else "no training image has it"
            said = f"{count:,} of {len(column):,} {PARTS[part]} images have a {name} that the backbone does not know"
            setting = f"--config.{task.name}.unseen"
            if task.side_unseen == "refuse":
                raise DataError(
                    f"{task.name}.side tells the backbone the {name} of each image. {said} ({name} {numbers}; {why}), whose "
                    f"embedding means nothing. Say what it is told: {setting}=drop (no embedding), map:VALUE (that of another "
                    f"{name}) or keep."
                )
            if task.side_unseen == "keep" and max(unseen) >= known:
                raise DataError(
                    f"{setting}=keep: {name} {max(unseen)} is beyond the {known} that the backbone knows. Take drop."
                )
            notes.append(f"{said} ({name} {numbers}; {why}): {setting.removeprefix('--config.')}={task.side_unseen}.")
    return notes


def _columns(task: Task, images: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every part of the images with its values of a column."""
    for part in PARTS:
        source = getattr(images, part)
        if source is None or not len(source):
            continue
        column = table_of(source).get(name)
        if column is None or np.min(column) < 0:
            raise ConfigError(
                f'{task.name}.side names "{name}", which {source.name} does not give for every image. '
                "Leave it out, or give it (veri:DIR?views=known leaves out the images without)."
            )
        yield part, column


def _seen(task: Task, columns: dict[str, np.ndarray]) -> set[int]:
    """Returns the values that the backbone was trained with; none if the images are of another set."""
    return set() if task.side_known else set(columns["train"].tolist())


def _instead(task: Task, name: str, known: int, seen: set[int]) -> int | None:
    """Returns the value told in place of unseen ones, -1 for none; None where they are told as they are."""
    if task.side_unseen in ("refuse", "keep"):
        return None
    if task.side_unseen == "drop":
        return -1
    value = int(task.side_unseen.removeprefix("map:"))
    if value >= known or (seen and value not in seen):
        raise ConfigError(f"--config.{task.name}.unseen={task.side_unseen}: the backbone knows no {name} {value}.")
    return value
