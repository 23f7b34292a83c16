"""Time and peak memory of measured noise against image size, images, sites and the bound on what waits.

    PYTHONPATH=. python benchmarks/measured.py                        # small networks, some minutes
    PYTHONPATH=. python benchmarks/measured.py --rows=vit_b16:224:16:1:4,resnet50:224:32:1:1
    PYTHONPATH=. python benchmarks/measured.py --moments --rows=fcn_r50:512:2,segformer_b0:512:8
    PYTHONPATH=. python benchmarks/measured.py --tiny                 # one row in seconds

A row is network:height[xwidth]:images:draws:GiB, in a process of its own on one device, so that its
peak is that of nothing else. "before" is in use with the network made, "MiB more" the peak beyond
it of solving; it should stay below the bound (or the solutions, if these are larger) and 1 GiB.
It is also said after every site. Images are made when they are needed, as the learner does with
more than fit. "CPU s" are seconds of processors, all threads together. The second solution of a
process compiles nothing; its seconds are "again". Weights and images are random.

With --moments the rows are network:height[xwidth]:images, and measured are the moments of all sites
and the closed form from them.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
import tabulate

from benchmarks.common import Parser, printed_by

ROWS = (
    "resnet20_cifar:32:200:1:4,resnet20_cifar:32:200:1:0,resnet20_cifar:32:400:1:4,resnet18:96:50:1:4,vit_s16:96:50:1:4"
)
TINY = "resnet20_cifar:8:10:1:1"
CHUNK = 2
"""Images of a pass of --moments."""
CLASSES = {"resnet20_cifar": 10}
NARROW = {"resnet18_narrow": ("resnet18", {"width": 8})}
"""Networks that processors can run on many large images: the registered one and what is changed."""


def one(model: str, size: tuple[int, int], images: int, draws: int, gib: float, solutions: int) -> None:
    """Measures once in this process and prints the numbers of a row."""
    import jax

    import drep_jax
    from drep_jax.core.chunks import Streams
    from drep_jax.core.measured import Progress, measuring
    from drep_jax.models import create_model

    class Random(Streams):
        """Random images and noisy versions of them, by index."""

        @property
        def shape(self) -> tuple[int, ...]:
            return (2 + draws, images, *size, 3)

        def take(self, index: np.ndarray) -> np.ndarray:
            rows = []
            for number in index.tolist():
                rng = np.random.default_rng(number)
                clean = rng.standard_normal((*size, 3), np.float32)
                noisy = [clean + 0.3 * rng.standard_normal(clean.shape, np.float32) for _ in range(draws)]
                rows.append(np.stack([clean, clean, *noisy]))
            return np.stack(rows, axis=1)

    name, changes = NARROW.get(model, (model, {}))
    net = create_model(name, num_classes=CLASSES.get(model, 1000), image_size=size, **changes)
    shape = jax.ShapeDtypeStruct((1, *size, 3), np.float32)
    variables = jax.jit(net.init)(jax.random.key(0), np.zeros(shape.shape, np.float32))
    sites = drep_jax.find_sites(net, shape)
    before, began = _resident(), (time.perf_counter(), time.process_time())
    solve = measuring(net, variables, sites, Random(), memory_gib=gib, outputs=False, say=_say)

    def watch(progress: Progress) -> None:
        _say(f"{model} {progress.done}/{progress.total} {progress.name}: {_peak() - before:.0f} MiB more")

    seconds: list[float] = []
    for _ in range(solutions):
        solve([0.75, *[0.25 / draws] * draws], watch)
        now = (time.perf_counter(), time.process_time())
        seconds += [now[0] - began[0], now[1] - began[1]]
        began = now
    seconds += [float("nan")] * (4 - len(seconds))
    print(len(sites), before, _peak() - before, *seconds)


def moments(model: str, size: tuple[int, int], images: int) -> None:
    """Takes moments and solves the closed form in this process, and prints the numbers of a row."""
    import jax

    import drep_jax
    from drep_jax.core.closed_form import closed_form
    from drep_jax.core.moments import collect_moments
    from drep_jax.models import create_model

    net = create_model(model, num_classes=CLASSES.get(model, 1000), image_size=size)
    shape = jax.ShapeDtypeStruct((1, *size, 3), np.float32)
    variables = jax.jit(net.init)(jax.random.key(0), np.zeros(shape.shape, np.float32))
    sites = drep_jax.find_sites(net, shape, pattern=".*")
    before, began = _resident(), (time.perf_counter(), time.process_time())
    rng = np.random.default_rng(0)
    counts = [min(CHUNK, images - first) for first in range(0, images, CHUNK)]
    batches = ((rng.standard_normal((n, *size, 3), np.float32), np.ones(n, np.float32)) for n in counts)
    numbers: list[float] = []
    taken = None
    for _ in range(2):
        if taken is None:
            taken = collect_moments(net, variables, sites, batches)
        else:
            closed_form(taken, sites, drep_jax.Schedule())
        now = (time.perf_counter(), time.process_time())
        numbers += [_peak() - before, now[0] - began[0], now[1] - began[1]]
        began = now
    print(len(sites), max(site.width for site in sites), before, *numbers)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _resident() -> float:
    """Returns the memory in use, in MiB, and makes it the peak from here on; the peak so far where no one can."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(command: Sequence[str] | None = None) -> None:
    """Measures every row and prints the table."""
    parser = Parser(__doc__, rows=TINY)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--solutions", type=int, default=2, choices=(1, 2), help="1 leaves the second one out")
    parser.add_argument("--moments", action="store_true", help="of moments and the closed form")
    parser.add_argument("--alone", action="store_true", help="one row, in this process")
    options = parser.parse_args(command)
    flags = [f"--solutions={options.solutions}", *(["--moments"] if options.moments else [])]
    rows = []
    for row in options.rows.split(","):
        model, sides, *numbers = row.split(":")
        height, _, width = sides.partition("x")
        size = (int(height), int(width or height))
        if options.alone and options.moments:
            return moments(model, size, int(numbers[0]))
        if options.alone:
            images, draws, gib = numbers
            return one(model, size, int(images), int(draws), float(gib), options.solutions)
        printed = printed_by(main, __file__, ["--alone", f"--rows={row}", *flags], options.tiny)
        count = 9 if options.moments else 7
        rows.append([model, sides, *map(float, numbers), *map(float, printed.split()[-count:])])
        print(rows[-1], file=sys.stderr, flush=True)
    columns = ["network", "size", "images"]
    if options.moments:
        columns += ["sites", "widest", "MiB before", "MiB more", "s", "CPU s", "MiB, closed form", "s", "CPU s"]
    else:
        columns += ["draws", "GiB", "sites", "MiB before", "MiB more", "s", "CPU s", "s again", "CPU s again"]
    print(tabulate.tabulate(rows, columns, floatfmt=".0f"))
    return None


if __name__ == "__main__":
    main()
