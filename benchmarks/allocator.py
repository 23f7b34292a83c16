"""Keeps freed memory, so that CPU timings contain no page faults, and measures the effect.

    PYTHONPATH=. python benchmarks/allocator.py        # training steps of ViT-S/16 with and without it

XLA takes one block for all temporaries of a program and frees it at the end. glibc returns blocks
of that size to the system at once, and a fresh block costs a page fault for each of its pages. This
is a setting of benchmarks only: `train.py` leaves the allocator as the system has it, since the
process would stay at its peak of memory, and only training of the whole backbone on a CPU would
gain (benchmarks/README.md).
"""

import ctypes
import functools
import resource
import sys
import time

from benchmarks.common import Parser, network, printed_by

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Parameters of glibc's `mallopt` (malloc.h)."""


def keep_freed_memory() -> bool:
    """Makes the C library's allocator keep freed memory; call it before memory is used.

    The process then stays at its peak of memory. Only Linux with glibc has this setting.

    Returns:
      Whether the allocator took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    # Large blocks then come from the one heap of all threads, which does not shrink.
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1))
    return all([bool(mallopt(name, value)) for name, value in settings])


def training_steps(batch, tiny=False):
    """Yields (name, state, step) of fine-tuning and of Algorithm 1, with Adam."""
    import jax
    import jax.numpy as jnp
    import optax

    from drep_jax.core.algorithm1 import algorithm1_losses
    from drep_jax.core.denoisers import init_denoise
    from drep_jax.core.schedule import Schedule
    from drep_jax.core.sites import find_sites

    model, pixels = network("vit_s16", tiny)
    images = jax.random.normal(jax.random.key(0), (batch, pixels, pixels, 3))
    index = jnp.arange(batch)
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    sites = find_sites(model, images)
    tx = optax.adam(1e-3)

    def fine_tuning(params, variables, images):
        logits = model.apply({**variables, "params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, index).mean()

    def algorithm1(denoise, variables, images):
        key = jax.random.key(2)
        losses = algorithm1_losses(model, variables, denoise, sites, Schedule(), key, index, images)
        return sum(jnp.sum(loss) for loss in losses.values())

    def run(objective, state, variables, images):
        trained, opt_state = state
        updates, opt_state = tx.update(jax.grad(objective)(trained, variables, images), opt_state)
        return optax.apply_updates(trained, updates), opt_state

    for objective, start in ((fine_tuning, variables["params"]), (algorithm1, init_denoise(sites))):
        step = jax.jit(functools.partial(run, objective))
        yield (
            objective.__name__,
            (start, tx.init(start)),
            lambda state, step=step: jax.block_until_ready(step(state, variables, images)),
        )


def measure(batch, steps, tiny=False):
    """Prints processor time and page faults of a step, and the memory of this process."""
    import numpy as np

    for name, state, step in training_steps(batch, tiny):
        figures = []
        for _ in range(steps + 1):
            before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            state = step(state)
            after = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            figures.append(np.subtract(after, before))
        seconds, faults = np.median(figures[1:], axis=0)  # the first one compiles
        print(f"  {name}: {seconds:.2f} s, {faults:.0f} page faults")
    with open("/proc/self/statm", encoding="utf-8") as file:
        pages = int(file.read().split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  memory: peak {peak:.0f} MiB, at the end {pages * resource.getpagesize() / 2**20:.0f} MiB")


def main(arguments=None):
    """Runs and prints everything."""
    parser = Parser(__doc__, batch=2, steps=1, rounds=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="timed ones of each kind")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("returned", "kept"), help="measure this in the present process")
    parsed = parser.parse_args(arguments)
    if parsed.only:
        if parsed.only == "kept" and not keep_freed_memory():
            parser.error("this system has no such setting")
        measure(parsed.batch, parsed.steps, parsed.tiny)
        return
    options = [f"--{name}={getattr(parsed, name)}" for name in ("batch", "steps")]
    kinds = ("returned",) if parsed.tiny else ("returned", "kept")
    for number in range(parsed.rounds):
        for kind in kinds:
            print(f"round {number + 1}, freed memory {kind}", flush=True)
            print(printed_by(main, __file__, [*options, f"--only={kind}"], parsed.tiny), end="", flush=True)


if __name__ == "__main__":
    main()
