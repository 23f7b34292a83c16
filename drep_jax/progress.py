"""Progress bars of work that takes more than a moment: one way for all of them."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")

SHOWN_AFTER = 2.0
"""Seconds after which a bar appears."""

PULSE = 1.0
"""Seconds between two drawings of a bar whose steps are long."""


class Steps:
    """Steps of work, of which each may take long; they are drawn while one runs.

    A bar appears once the work has taken `SHOWN_AFTER` seconds, so what is quick stays silent.
    """

    def __init__(self, name: str, total: int, unit: str, *, shown: bool) -> None:
        """Starts the clock.

        Args:
          name: of the work.
          total: number of steps.
          unit: what a step is.
          shown: whether anything is drawn at all.
        """
        self._name, self._total, self._unit, self._shown = name, total, unit, shown
        self._began, self._done, self._text = time.monotonic(), 0, ""
        self._bar: tqdm.tqdm | None = None
        self._lock = threading.Lock()

    def update(self, steps: int = 1, text: str = "") -> None:
        """Says that steps are done, and something about the last one."""
        with self._lock:
            self._done, self._text = self._done + steps, text or self._text
        self.draw()

    def finish(self) -> None:
        """Says that all steps are done."""
        self.update(max(0, self._total - self._done))

    def draw(self) -> None:
        """Draws the bar if it is time."""
        with self._lock:
            elapsed = time.monotonic() - self._began
            if not self._shown or elapsed < SHOWN_AFTER:
                return
            if self._bar is None:
                self._bar = tqdm.tqdm(desc=self._name, total=self._total, unit=self._unit)
                self._bar.start_t -= elapsed
            self._bar.n = self._done
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.refresh()

    def close(self) -> None:
        """Draws the bar for the last time, if it has appeared."""
        if self._bar is not None:
            self.draw()
            self._bar.close()


@contextlib.contextmanager
def pulsing(name: str, total: int, unit: str, *, shown: bool) -> Iterator[Steps]:
    """Yields steps that are drawn every second, for those that run for minutes inside of one call."""
    ended = threading.Event()
    steps = Steps(name, total, unit, shown=shown)

    def draw() -> None:
        while not ended.wait(PULSE):
            steps.draw()

    thread = threading.Thread(target=draw, daemon=True)
    if shown:
        thread.start()
    try:
        yield steps
        steps.finish()
    finally:
        ended.set()
        if shown:
            thread.join()
        steps.close()


def bar(over: Iterable[T], name: str, total: int, unit: str, *, shown: bool) -> Iterator[T]:
    """Yields what it is given, with a bar that shows the time left.

    Args:
      over: what is iterated over.
      name, total, unit, shown: see `Steps`.
    """
    with pulsing(name, total, unit, shown=shown) as steps:
        for item in over:
            yield item
            steps.update()
