"""Side information, such as the camera of an image: what the backbone knows of it, and what it is told."""

from collections.abc import Sequence

import numpy as np

from drep_jax.data.datasets import Images
from drep_jax.data.metadata import table_of
from drep_jax.errors import ConfigError, DataError
from drep_jax.tasks import Task

SHOWN = 10


def side_information(task: Task, images: Images) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[int, ...], ...]]:
    """Returns side-information columns with their cardinalities, and what the backbone is told.

    Args:
      task: names the columns, and what becomes of values that training never saw.
      images: of the run.

    Returns:
      ((column, number of values that the backbone knows), …), and for each column a table from a
      value to the one that is told, -1 for none; () where all are told as they are.

    Raises:
      ConfigError: for images that have no such column, and for values that cannot be told.
      DataError: for values that training never saw, unless the task says what becomes of them.
    """
    side, tables, changed = [], [], False
    for place, name in enumerate(task.side_columns):
        columns: list[tuple[str, np.ndarray]] = []
        counts = []
        for part, source in (("training", images.train), ("held-out", images.held_out), ("test", images.test)):
            if source is None or not len(source):
                continue
            column = table_of(source).get(name)
            if column is None or np.min(column) < 0:
                raise ConfigError(
                    f'{task.name}.side names "{name}", which {source.name} does not give for every image. '
                    "Leave it out, or give it (veri:DIR?views=known leaves out the images without)."
                )
            columns.append((f"{part} images of {source.name}", column))
            counts += [int(np.max(column)) + 1, int(getattr(source, f"{name}s", 0))]  # of the whole set, if known
        known = task.side_known[place] if task.side_known else max(counts)
        seen = set() if task.side_known else set(columns[0][1].tolist())
        told = _told(task, name, known, seen, columns)
        changed |= told != tuple(range(len(told)))
        side.append((name, known))
        tables.append(told)
    return tuple(side), tuple(tables) if changed else ()


def _told(
    task: Task, name: str, known: int, seen: set[int], columns: Sequence[tuple[str, np.ndarray]]
) -> tuple[int, ...]:
    """Returns the value that is told for every value of a column."""
    largest = max(int(np.max(column)) for _, column in columns)
    unseen = sorted({value for _, column in columns for value in column.tolist()} - seen)
    told = list(range(largest + 1))
    if not unseen:
        return tuple(told)
    setting, ways = f"--config.{task.name}.unseen", "drop (no embedding), map:VALUE (that of another one) or keep"
    if task.side_unseen == "refuse":
        where, column = next((w, c) for w, c in columns[::-1] if np.isin(c, unseen).any())
        count = int(np.isin(column, unseen).sum())
        numbers = ", ".join(map(str, unseen[:SHOWN])) + (", …" if len(unseen) > SHOWN else "")
        why = "the backbone was trained on another set" if task.side_known else "no training image has it"
        raise DataError(
            f"{task.name}.side tells the backbone the {name} of each image. {count:,} of {len(column):,} {where} have one that "
            f"it does not know ({name} {numbers}; {why}), whose embedding means nothing. Say what it is told: {setting}={ways}."
        )
    if task.side_unseen == "keep":
        if largest >= known:
            raise ConfigError(
                f"{setting}=keep: {name} {largest} is beyond the {known} that the backbone knows. Take drop."
            )
        return tuple(told)
    value = -1
    if task.side_unseen.startswith("map:"):
        value = int(task.side_unseen.removeprefix("map:"))
        if value >= known or (seen and value not in seen):
            raise ConfigError(f"{setting}={task.side_unseen}: the backbone knows no {name} {value}.")
    return tuple(number if number in seen else value for number in told)
