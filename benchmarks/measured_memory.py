"""Peak memory of the learner `measured` against the number of images, of corrupted versions of each, and the chunk.

    PYTHONPATH=. python benchmarks/measured_memory.py resnet18 --size=224 --rows=16:1:16,16:1:4,32:1:4,16:4:4
    PYTHONPATH=. python benchmarks/measured_memory.py resnet --options='{"stage_sizes": [1], "block": "basic", "width": 32}'

A row is images:draws:chunk, in a process of its own on one device, so that its peak is that of
nothing else. The line below the table is the least-squares fit peak = a + (b · images + c · chunk)
· (2 + draws): the clean images count twice, once for what is fitted to and once for the weight of
clean accuracy.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tabulate

from benchmarks.common import Parser, printed_by


def one(model: str, options: dict[str, Any], size: int, images: int, draws: int, chunk: int) -> None:
    """Measures once in this process and prints its peak in MiB before and after, and the seconds."""
    import jax

    import drep_jax
    from drep_jax.models import create_model

    net = create_model(model, num_classes=1000, image_size=(size, size), **options)
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(images, size, size, 3)).astype(np.float32)
    variables = jax.jit(net.init)(jax.random.key(0), clean[:1])
    sites = drep_jax.find_sites(net, clean[:1])
    noisy = [clean + rng.normal(0, 0.2, clean.shape).astype(np.float32) for _ in range(draws)]
    streams = np.stack([clean, clean, *noisy])
    before, began = _peak(), time.perf_counter()
    drep_jax.measure(net, variables, sites, streams, [0.75] + [0.25 / draws] * draws, chunk=chunk)
    print(before, _peak(), time.perf_counter() - began)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(command: Sequence[str] | None = None) -> None:
    """Measures every combination and prints the table."""
    small = '{"stage_sizes": [1], "block": "basic", "width": 4, "stem": "cifar"}'
    parser = Parser(__doc__, model="resnet", options=small, size=8, rows="8:1:8")
    parser.add_argument("model", nargs="?", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--options", default="{}", help="of the model, as JSON")
    parser.add_argument("--rows", default="16:1:16,16:1:4,32:1:4,16:4:4")
    parser.add_argument("--alone", action="store_true", help="one row, in this process")
    options = parser.parse_args(command)
    settings = [tuple(map(int, row.split(":"))) for row in options.rows.split(",")]
    if options.alone:
        one(options.model, json.loads(options.options), options.size, *settings[0])
        return
    rows = []
    for images, draws, chunk in settings:
        arguments = [options.model, f"--size={options.size}", "--alone", f"--options={options.options}"]
        arguments.append(f"--rows={images}:{draws}:{chunk}")
        done = printed_by(main, __file__, arguments, options.tiny)
        rows.append([images, draws, chunk, *map(float, done.split()[-3:])])
        print(rows[-1], file=sys.stderr, flush=True)
    print(tabulate.tabulate(rows, ["images", "draws", "chunk", "MiB before", "MiB peak", "s"], floatfmt=".0f"))
    streams = np.array([[1, row[0] * (2 + row[1]), row[2] * (2 + row[1])] for row in rows], float)
    fit = np.linalg.lstsq(streams, np.array([row[4] for row in rows]), rcond=None)[0]
    print(f"\npeak = {fit[0]:.0f} MiB + ({fit[1]:.1f} MiB · images + {fit[2]:.1f} MiB · chunk) · (2 + draws)")


if __name__ == "__main__":
    main()
