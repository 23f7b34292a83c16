"""The training loop of a stage: progress, logs, checkpoints, resuming, NaN, signals, traces."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import tqdm

from drep_jax.errors import NonFiniteError
from drep_jax.parallel import devices, processes
from drep_jax.training.checkpoint import Checkpointer
from drep_jax.training.logging import MetricWriter
from drep_jax.training.profile import Profile
from drep_jax.training.signals import NAMES, Interrupted, hearing_signals
from drep_jax.training.state import TrainState, collected, placed
from drep_jax.typing import Tree


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
    log_extra: Callable[[Tree], dict[str, float]] | None = None,
    profile: Profile | None = None,
    sharded: bool = False,
    evaluate: Callable[[Tree], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> tuple[TrainState, float]:
    """Trains until `steps`, resuming from the last checkpoint if there is one.

    Order: restore the state and the data position, drop log lines beyond it, then step. At every
    multiple of `log_every` the losses of all steps since the last line are checked and their mean
    is logged. At every multiple of `checkpoint_every`, at the end and at a signal the state is
    checked and saved, so a saved state is always a good one. Training goes on while a checkpoint is
    written; what is written is a copy, since a step overwrites its buffers.

    Args:
      name: of the stage, in logs and messages.
      state: the initial state, not replicated.
      frozen: the parameters that are not trained.
      step_of: number of a step, from 1 ↦ its function, made by `make_step`.
      batches: number of steps taken ↦ endless iterator of the batches after them.
      steps: total number of steps.
      checkpointer, writer: of this stage and run.
      log_every, checkpoint_every: in steps.
      progress: whether to show a bar.
      log_extra: trained parameters ↦ further numbers for the log and the bar, such as the gap to a
        known optimum.
      profile: the steps to trace, if any.
      sharded: whether the optimizer's state is sharded, as in `make_step`.
      evaluate: trained parameters ↦ numbers of an evaluation, a line of the log of their own.
      evaluate_every: in steps; 0 for never.

    Returns:
      The final state (one copy) and the total seconds, earlier parts of a resumed stage included.

    Raises:
      NonFiniteError: naming the step and the value that is not finite; the last checkpoint stays.
      CheckpointError: if a checkpoint cannot be written, raised by the next one at the latest;
        names its step.
      Interrupted: at a signal, after saving.
    """
    spent = 0.0
    unlogged: list[dict[str, float]] = []  # the metrics of every step since the last log line
    if checkpointer.latest() is not None:
        state, _, meta = checkpointer.restore(state, frozen)
        spent, unlogged = float(meta["seconds"]), list(meta.get("unlogged", ()))
    start = int(state.step)
    if start >= steps:
        return state, spent
    writer.rewind(name, start)
    current, replicated = placed(state, sharded=sharded), devices.replicate(frozen)
    began = time.perf_counter()
    waiting: list[tuple[int, dict[str, Any]]] = []
    pace = _Pace()
    bar = tqdm.tqdm(total=steps, initial=start, desc=name, disable=not progress, unit="step", mininterval=0.5)

    def check() -> None:
        """Fetches the metrics since the last check; raises at the first that is not finite."""
        for number, metrics in waiting:
            values = {key: float(value) for key, value in devices.unreplicate(metrics).items()}
            bad = [key for key, value in values.items() if not math.isfinite(value)]
            if bad:
                sites = [key for key in bad if key != "loss"] or bad  # not the total
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
        speed = pace.images_per_second()
        # Alternating steps report different metrics.
        names = dict.fromkeys(key for values in unlogged for key in values)
        scalars = {key: statistics.fmean(values[key] for values in unlogged if key in values) for key in names}
        unlogged.clear()
        extra = log_extra(devices.unreplicate(current.params)) if log_extra else {}
        clock = {"seconds": spent + time.perf_counter() - began, "images_per_second": speed}
        measured = {key: value for key, value in clock.items() if value is not None}
        writer.write(name, number, {**scalars, **extra, **measured})
        text = {key: f"{value:.4f}" for key, value in {"loss": scalars["loss"], **extra}.items()}
        if speed is not None:
            text["images/s"] = f"{speed:.0f}"
        bar.set_postfix(text, refresh=False)
        pace.restart()

    def save(*, wait: bool) -> None:
        check()
        checkpointer.wait()  # before another copy of the state is made
        one = collected(current, state, sharded=sharded)
        seconds = spent + time.perf_counter() - began
        meta = {"stage": name, "seconds": seconds, "data_position": int(one.step), "unlogged": unlogged}
        checkpointer.save(one, frozen, meta, wait=wait)

    any_host = devices.AnyHost()
    traced = profile.of_stage(name, start, steps) if profile else None
    with bar, hearing_signals() as stop:
        iterator = batches(start)
        try:
            for number in range(start + 1, steps + 1):
                if traced:
                    traced.before(number)
                batch = next(iterator)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    current, metrics = step_of(number)(current, replicated, devices.shard(batch))
                waiting.append((number, metrics))
                pace.count(batch)
                if traced:
                    traced.after(number, metrics)
                bar.update()
                if number % log_every == 0 or number in (1, steps):
                    log(number)
                # Asked once per step: a signal that arrives while saving counts at the next step.
                stopping = any_host(stop.raised, last=number == steps)
                if evaluate and evaluate_every and number % evaluate_every == 0:
                    check()
                    writer.write(name, number, evaluate(devices.unreplicate(current.params)))
                    pace.restart()
                if number % checkpoint_every == 0 or number == steps or stopping:
                    save(wait=number == steps or stopping)
                if stopping or (number == steps and stop.raised and processes.alone()):
                    processes.barrier("stopping")  # all processes have saved
                    by = "a signal to another process" if stop.number is None else NAMES[stop.number]
                    raise Interrupted(
                        f"Stopped by {by} in stage {name} after step {number} of {steps}; the state is saved.",
                        signal.SIGTERM if stop.number is None else stop.number,
                    )
        finally:
            if traced:
                traced.close()
    return collected(current, state, sharded=sharded), spent + time.perf_counter() - began


class _Pace:
    """Images per second since the last log line; the step that compiles does not count."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._images = 0

    def count(self, batch: dict[str, Any]) -> None:
        """Counts the images of a step."""
        if self._began is not None:
            self._images += len(jax.tree_util.tree_leaves(batch)[0]) * devices.host()[1]

    def images_per_second(self) -> float | None:
        """Returns images per second, or None before the second step."""
        if self._began is None or not self._images:
            return None
        return self._images / (time.perf_counter() - self._began)

    def restart(self) -> None:
        """Starts counting again."""
        self._began, self._images = time.perf_counter(), 0
