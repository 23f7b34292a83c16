"""Ctrl-C and SIGTERM: the first one stops training after the current step and saves.

A second one ends the process.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from drep_jax.errors import DrepError

NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""The signals that are handled, with their names in messages."""

GRACE = 10.0
"""Seconds after SIGTERM in which open files are closed and background writes end."""


class Interrupted(DrepError):
    """Training was stopped by a signal, after the state was saved.

    Attributes:
      number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class Terminated(BaseException):
    """SIGTERM outside training, where there is nothing to save.

    What `KeyboardInterrupt` is to Ctrl-C.
    """


class StopRequest:
    """Records the first signal. The system handles the second one: it ends the process at once.

    Attributes:
      number: of the signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def raised(self) -> bool:
        """Whether a signal arrived."""
        return self.number is not None

    def __call__(self, number: int, frame: Any) -> None:
        """Handles the signal."""
        self.number = number
        _leave_to_the_system()


@contextlib.contextmanager
def hearing_signals() -> Iterator[StopRequest]:
    """Installs a `StopRequest` for as long as the block runs (in the main thread.

    Others get no signals).
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request) for number in NAMES}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raising_on_sigterm(otherwise: Callable[[], Any], grace: float = GRACE) -> Iterator[None]:
    """Raises `Terminated` at SIGTERM while the block runs, so that open files are closed.

    Args:
      otherwise: called where the block has not ended `grace` seconds later: the signal may arrive
        in a destructor or a callback of a library, where exceptions are dropped.
      grace: seconds.
    """
    lost: threading.Timer | None = None

    def handle(number: int, frame: Any) -> None:
        nonlocal lost
        _leave_to_the_system()
        lost = threading.Timer(grace, otherwise)
        lost.daemon = True
        lost.start()
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if lost is not None:
            lost.cancel()
        signal.signal(signal.SIGTERM, previous)


def _leave_to_the_system() -> None:
    for number in NAMES:
        signal.signal(number, signal.SIG_DFL)
