"""Progress bars of work that takes more than a moment: one way for all of them."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import tqdm

SHOWN_AFTER = 2.0
"""Seconds after which a bar appears."""

PULSE = 1.0
"""Seconds between two drawings of a bar whose steps are long."""


def bar(
    over: Iterable[Any] | None, name: str, total: int, unit: str, *, shown: bool, delay: float = SHOWN_AFTER
) -> tqdm.tqdm:
    """Returns a bar with the time left, which iterates over what it is given.

    Args:
      over: what is iterated over; None for a bar that is moved by `update`.
      name: of the work.
      total: number of steps.
      unit: what a step is.
      shown: whether it is drawn at all.
      delay: seconds after which it appears.
    """
    return tqdm.tqdm(over, name, total, unit=unit, disable=not shown, delay=delay)


@contextlib.contextmanager
def pulsing(name: str, total: int, unit: str, *, shown: bool) -> Iterator[tqdm.tqdm]:
    """Yields a bar that is drawn every second, for steps that run for minutes inside of one compiled program."""
    ended = threading.Event()
    with bar(None, name, total, unit, shown=shown, delay=0.0) as steps:

        def draw() -> None:
            while not ended.wait(PULSE):
                steps.refresh()

        thread = threading.Thread(target=draw, daemon=True)
        if shown:
            thread.start()
        try:
            yield steps
        finally:
            ended.set()
            if shown:
                thread.join()
