"""The training loop of one stage: progress, logs, checkpoints, resuming, NaN and Ctrl-C."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import tqdm

from drep_jax.errors import DrepError, NonFiniteError
from drep_jax.training import parallel
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.training.logging import MetricWriter
from drep_jax.training.state import TrainState

Tree = Any


class Interrupted(DrepError):
    """The user pressed Ctrl-C; the state was saved first."""


class InterruptFlag:
    """Turns the first Ctrl-C into a request to stop after the current step; a second one stops at once."""

    def __init__(self) -> None:
        self.raised = False

    def __call__(self, number: int, frame: Any) -> None:
        """Handles the signal."""
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True


@contextlib.contextmanager
def catching_interrupt() -> Iterator[InterruptFlag]:
    """Installs an `InterruptFlag` for SIGINT for as long as the block runs."""
    flag = InterruptFlag()
    previous = signal.signal(signal.SIGINT, flag)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def run_stage(
    name: str,
    state: TrainState,
    frozen: Tree,
    step_fn: Callable[..., tuple[TrainState, dict[str, Any]]],
    batches: Callable[[int], Iterator[dict[str, Any]]],
    *,
    steps: int,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    log_every: int,
    checkpoint_every: int,
    progress: bool = True,
) -> tuple[TrainState, float]:
    """Trains until `steps`, resuming from the last checkpoint if there is one.

    Order: restore state and data position, drop log lines beyond it, then step; at every multiple of `log_every` the
    losses of all steps since are checked and logged; at every multiple of `checkpoint_every`, at the end and at Ctrl-C
    the state is saved, after that check, so a saved state is always a good one.

    Args:
      name: of the stage, in logs and messages.
      state: fresh state, not replicated.
      frozen: the parameters that are not trained.
      step_fn: from `make_step`.
      batches: first step number ↦ endless iterator of batches from that step on.
      steps: how many in all.
      checkpointer, writer: of this stage and run.
      log_every, checkpoint_every: in steps.
      progress: whether to show a bar.

    Returns:
      The final state (one copy) and the seconds spent in all, earlier parts of a resumed stage included.

    Raises:
      NonFiniteError: naming the step and what was not finite; the last checkpoint stays as it was.
      Interrupted: after saving.
    """
    spent = 0.0
    if checkpointer.latest() is not None:
        state, _, meta = checkpointer.restore(state, frozen)
        spent = float(meta["seconds"])
    start = int(state.step)
    if start >= steps:
        return state, spent
    writer.rewind(name, start)
    many, kept = parallel.replicate(state), parallel.replicate(frozen)
    began = time.perf_counter()
    pending: list[tuple[int, dict[str, Any]]] = []
    bar = tqdm.tqdm(total=steps, initial=start, desc=name, disable=not progress, unit="step", mininterval=0.5)

    def flush() -> None:
        values = {n: parallel.unreplicate(m) for n, m in pending}
        for number, metrics in values.items():
            for key, value in metrics.items():
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"Stage {name}: {key} became {value} at step {number}. Training stopped; the last good checkpoint "
                        f"(step {checkpointer.latest() or 0}) in {checkpointer.directory} is kept. Lower the learning rate "
                        "or check the images, then run again."
                    )
        if values:
            number = max(values)
            scalars = {key: float(value) for key, value in values[number].items()}
            scalars["seconds"] = spent + time.perf_counter() - began
            writer.write(name, number, scalars)
            bar.set_postfix(loss=f"{scalars['loss']:.4f}", refresh=False)
        pending.clear()

    def save() -> None:
        seconds = spent + time.perf_counter() - began
        one = parallel.unreplicate(many)
        checkpointer.save(one, frozen, {"stage": name, "seconds": seconds, "data_position": int(one.step)})

    with bar, catching_interrupt() as interrupt:
        iterator = batches(start)
        for number in range(start + 1, steps + 1):
            many, metrics = step_fn(many, kept, parallel.shard(next(iterator)))
            pending.append((number, metrics))
            bar.update()
            if number % log_every == 0 or number == steps or interrupt.raised or number == start + 1:
                flush()
            if number % checkpoint_every == 0 or number == steps or interrupt.raised:
                flush()
                save()
            if interrupt.raised and number < steps:
                raise Interrupted(
                    f"Stopped by Ctrl-C in stage {name} after step {number} of {steps}; the state is saved."
                )
    return parallel.unreplicate(many), spent + time.perf_counter() - began
