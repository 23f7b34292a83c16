"""Ctrl-C and SIGTERM: the first asks to stop after the current step and save; a second one ends the process at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from drep_jax.errors import DrepError

NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""The signals that are heard, as they are called in messages."""


class Interrupted(DrepError):
    """A signal asked to stop, and the state was saved first."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        """Takes the message and the signal's number."""
        super().__init__(message)
        self.number = number


class Terminated(BaseException):
    """SIGTERM outside of training, where nothing is to be saved; to SIGTERM what `KeyboardInterrupt` is to Ctrl-C."""


class StopRequest:
    """Remembers the first signal; the second one is left to the system, which ends the process wherever it is."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def raised(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def __call__(self, number: int, frame: Any) -> None:
        """Handles the signal."""
        self.number = number
        _leave_to_the_system()


@contextlib.contextmanager
def hearing_signals() -> Iterator[StopRequest]:
    """Installs a `StopRequest` for as long as the block runs (in the main thread; others get no signals)."""
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
def raising_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM a `Terminated` while the block runs, so that what is open is closed and the exit status is ours."""

    def handle(number: int, frame: Any) -> None:
        _leave_to_the_system()
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave_to_the_system() -> None:
    for number in NAMES:
        signal.signal(number, signal.SIG_DFL)
