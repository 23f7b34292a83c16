"""JAX profiler traces of some training steps, for TensorBoard: `--config.profile=FIRST:COUNT`."""

import dataclasses
import os
import re
from typing import Any

import jax

from drep_jax.errors import CheckpointError, ConfigError

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class Profile:
    """The steps of every stage that are traced.

    Attributes:
      first: number of the first step, from 1. Choose a later one: the first steps of a stage
        compile.
      count: number of steps.
      workdir: directory in which `profile/<stage>` is made.
    """

    first: int
    count: int
    workdir: str

    def of_stage(self, name: str, start: int, steps: int) -> "Trace | None":
        """Returns the trace of a stage that runs from step `start` to `steps`.

        None, with a message, if it lacks the step.
        """
        if start >= self.first or self.first > steps:
            reason = f"goes on from step {start}" if start >= self.first else f"has {steps} steps"
            print(f"Stage {name} {reason}, so there is no trace from step {self.first} on.")
            return None
        return Trace(os.path.join(self.workdir, FOLDER, name), self.first, min(self.first + self.count - 1, steps))


def parse_profile(text: str, workdir: str) -> Profile | None:
    """Reads FIRST:COUNT; "" gives None.

    >>> parse_profile("10:3", "runs/digits")
    Profile(first=10, count=3, workdir='runs/digits')

    Raises:
      ConfigError: for anything else.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise ConfigError(
            f'profile="{text}" is not FIRST:COUNT, the number of the first step to trace, from 1, and the number of '
            'steps, such as "10:3".'
        )
    return Profile(int(match[1]), int(match[2]), workdir)


class Trace:
    """A trace from just before step `first` to just after step `last`."""

    def __init__(self, directory: str, first: int, last: int) -> None:
        self._directory, self._first, self._last = directory, first, last
        self._on = False

    def before(self, number: int) -> None:
        """Starts the trace if this is its first step.

        Raises:
          CheckpointError: if it cannot be written.
        """
        if number != self._first:
            return
        try:
            os.makedirs(self._directory, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"Cannot write a trace to {self._directory}: {error.strerror}.") from error
        jax.profiler.start_trace(self._directory)
        self._on = True

    def after(self, number: int, results: Any) -> None:
        """Waits for the results of a step and ends the trace, if it was the last step."""
        if self._on and number == self._last:
            jax.block_until_ready(results)
            self.close()
            print(f"Trace of steps {self._first} to {self._last}: tensorboard --logdir {self._directory}")

    def close(self) -> None:
        """Ends the trace if it is still on."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
