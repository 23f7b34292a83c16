"""Cost of networks: FLOPs and memory of the compiled program, and interleaved latency."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Returns the floating-point operations of the compiled program, as counted by XLA.

    Args:
      function: a function of arrays.
      *args: its arguments; they may be abstract (`jax.ShapeDtypeStruct`).
    """
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return float((analysis or {}).get("flops", float("nan")))


def memory(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Returns the bytes of the compiled program's arguments, outputs and temporaries."""
    analysis: Any = jax.jit(function).lower(*args).compile().memory_analysis()
    return {
        "argument": int(analysis.argument_size_in_bytes),
        "output": int(analysis.output_size_in_bytes),
        "temporary": int(analysis.temp_size_in_bytes),
    }


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times functions in turn, A B C, B C A, …, so that drift of the machine affects all alike.

    Args:
      functions: name ↦ function without arguments; its result is waited for.
      rounds: number of timed calls of each.
      warmup: number of untimed calls of each before, which compile.
      clock: returns seconds. `time.process_time` counts the processor time of this process, which
        other processes hardly affect.

    Returns:
      name ↦ seconds, one entry per round.
    """
    for _ in range(warmup):
        for function in functions.values():
            jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            jax.block_until_ready(functions[name]())
            times[name].append(clock() - start)
    return times


def ratios(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Returns the median over rounds of each function's time relative to the reference's.

    >>> ratios({"baseline": [1.0, 2.0, 4.0], "fused": [1.0, 1.0, 6.0]}, "baseline")
    {'baseline': 1.0, 'fused': 1.0}

    Args:
      times: name ↦ seconds, one entry per round; see `interleaved`.
      reference: the name that the others are divided by, round by round.
    """
    base = times[reference]
    return {name: statistics.median(a / b for a, b in zip(values, base, strict=True)) for name, values in times.items()}


def peak_memory() -> int:
    """Returns the peak resident memory of this process, in bytes.

    On Linux it is read from /proc, because getrusage includes the peak of the parent process.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024
