"""What a network costs: FLOPs and memory of the compiled program, and latency of several sides measured in turn."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Returns the floating-point operations of the compiled program, by XLA's own count; `args` may be abstract."""
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return float((analysis or {}).get("flops", float("nan")))


def memory(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Returns the compiled program's bytes for arguments, outputs and temporaries."""
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
    """Times functions in turn, A B C, B C A, …, so that drift of a shared machine meets all of them alike.

    Args:
      functions: name ↦ function without arguments; what it returns is waited for.
      rounds: how often each is timed.
      warmup: untimed calls of each first, which compile.
      clock: gives seconds; `time.process_time` counts this process's processor time, which others on the machine hardly change.

    Returns:
      Seconds, one entry a round.
    """
    for _ in range(warmup):
        for function in functions.values():
            jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = clock()
            jax.block_until_ready(functions[name]())
            times[name].append(clock() - began)
    return times


def ratios(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Returns for each side the median over the rounds of its time relative to the reference's in the same round."""
    base = times[reference]
    return {name: statistics.median(a / b for a, b in zip(values, base, strict=True)) for name, values in times.items()}


def peak_memory() -> int:
    """Returns the largest resident size of this process so far, in bytes.

    On Linux from /proc, because getrusage would give a process the peak of the one that started it, if that was larger.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024
