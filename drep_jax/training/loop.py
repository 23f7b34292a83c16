"""The training loop of one stage: progress, logs, checkpoints, resuming, NaN and Ctrl-C."""

import contextlib
import math
import signal
import statistics
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
    step_of: Callable[[int], Callable[..., tuple[TrainState, dict[str, Any]]]],
    batches: Callable[[int], Iterator[dict[str, Any]]],
    *,
    steps: int,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    log_every: int,
    checkpoint_every: int,
    progress: bool = True,
    probe: Callable[[Tree], dict[str, float]] | None = None,
) -> tuple[TrainState, float]:
    """Trains until `steps`, resuming from the last checkpoint if there is one.

    Order: restore state and data position, drop log lines beyond it, then step; at every multiple of `log_every` the
    losses of all steps since are checked and their mean is logged; at every multiple of `checkpoint_every`, at the end
    and at Ctrl-C the state is saved, after that check, so a saved state is always a good one.

    Args:
      name: of the stage, in logs and messages.
      state: fresh state, not replicated.
      frozen: the parameters that are not trained.
      step_of: number of a step, the first is 1 ↦ the step, from `make_step`.
      batches: first step number ↦ endless iterator of batches from that step on.
      steps: how many in all.
      checkpointer, writer: of this stage and run.
      log_every, checkpoint_every: in steps.
      progress: whether to show a bar.
      probe: trained parameters ↦ further numbers for the log and the bar, such as the gap to a known optimum.

    Returns:
      The final state (one copy) and the seconds spent in all, earlier parts of a resumed stage included.

    Raises:
      NonFiniteError: naming the step and what was not finite; the last checkpoint stays as it was.
      Interrupted: after saving.
    """
    spent = 0.0
    unlogged: list[dict[str, float]] = []  # what each step returned since the last line of the log
    if checkpointer.latest() is not None:
        state, _, meta = checkpointer.restore(state, frozen)
        spent, unlogged = float(meta["seconds"]), list(meta["unlogged"])
    start = int(state.step)
    if start >= steps:
        return state, spent
    writer.rewind(name, start)
    many, kept = parallel.replicate(state), parallel.replicate(frozen)
    began = time.perf_counter()
    waiting: list[tuple[int, dict[str, Any]]] = []
    bar = tqdm.tqdm(total=steps, initial=start, desc=name, disable=not progress, unit="step", mininterval=0.5)

    def check() -> None:
        """Fetches what the steps since the last check returned, and stops at the first number that is not finite."""
        for number, metrics in waiting:
            values = {key: float(value) for key, value in parallel.unreplicate(metrics).items()}
            bad = [key for key, value in values.items() if not math.isfinite(value)]
            if bad:
                sites = [key for key in bad if key != "loss"] or bad  # their sum says nothing if one of them is known
                more = f" (and {len(sites) - 1} more: {', '.join(sites[1:6])})" if sites[1:] else ""
                raise NonFiniteError(
                    f"Stage {name}: {sites[0]}{more} became {values[sites[0]]} at step {number}. Training stopped; the last "
                    f"good checkpoint (step {checkpointer.latest() or 0}) in {checkpointer.directory} is kept. Check the "
                    "images and the weights, or run with a lower learning rate in another --workdir."
                )
            unlogged.append(values)
        waiting.clear()

    def log(number: int) -> None:
        check()
        names = dict.fromkeys(key for values in unlogged for key in values)  # steps in turn report different things
        scalars = {key: statistics.fmean(values[key] for values in unlogged if key in values) for key in names}
        unlogged.clear()
        extra = probe(parallel.unreplicate(many.params)) if probe else {}
        writer.write(name, number, {**scalars, **extra, "seconds": spent + time.perf_counter() - began})
        shown = {"loss": scalars["loss"], **extra}
        bar.set_postfix({key: f"{value:.4f}" for key, value in shown.items()}, refresh=False)

    def save() -> None:
        check()
        one = parallel.unreplicate(many)
        seconds = spent + time.perf_counter() - began
        meta = {"stage": name, "seconds": seconds, "data_position": int(one.step), "unlogged": unlogged}
        checkpointer.save(one, frozen, meta)

    with bar, catching_interrupt() as interrupt:
        iterator = batches(start)
        for number in range(start + 1, steps + 1):
            many, metrics = step_of(number)(many, kept, parallel.shard(next(iterator)))
            waiting.append((number, metrics))
            bar.update()
            if number % log_every == 0 or number in (1, steps):
                log(number)
            if number % checkpoint_every == 0 or number == steps or interrupt.raised:
                save()
            if interrupt.raised:
                raise Interrupted(
                    f"Stopped by Ctrl-C in stage {name} after step {number} of {steps}; the state is saved."
                )
    return parallel.unreplicate(many), spent + time.perf_counter() - began
