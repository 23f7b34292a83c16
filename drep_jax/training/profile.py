"""Traces of some training steps, written by JAX's profiler for TensorBoard: `--config.profile=FIRST:COUNT`."""

import dataclasses
import os
import re
from typing import Any

import jax

from drep_jax.errors import CheckpointError, ConfigError

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which steps of every stage are traced.

    Attributes:
      first: number of the first step, from 1. The first ones compile, and are not what one wants to see.
      count: how many.
      workdir: where `profile/<stage>` is made.
    """

    first: int
    count: int
    workdir: str

    def of_stage(self, name: str, start: int, steps: int) -> "Trace | None":
        """Returns the trace of a stage that goes from step `start` to `steps`, or None, saying so, if it has no such step."""
        if start >= self.first or self.first > steps:
            reason = f"goes on from step {start}" if start >= self.first else f"has {steps} steps"
            print(f"Stage {name} {reason}, so there is no trace from step {self.first} on.")
            return None
        return Trace(os.path.join(self.workdir, FOLDER, name), self.first, min(self.first + self.count - 1, steps))


def parse_profile(text: str, workdir: str) -> Profile | None:
    """Reads FIRST:COUNT; "" is no profile.

    Raises:
      ConfigError: for anything else.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not int(found[1]) or not int(found[2]):
        raise ConfigError(
            f'profile="{text}" is not FIRST:COUNT, the number of the first step to trace, from 1, and how many: "10:3".'
        )
    return Profile(int(found[1]), int(found[2]), workdir)


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
        """Ends the trace if this was its last step, whose results are waited for."""
        if self._on and number == self._last:
            jax.block_until_ready(results)
            self.close()
            print(f"Trace of steps {self._first} to {self._last}: tensorboard --logdir {self._directory}")

    def close(self) -> None:
        """Ends the trace if it is still on."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
