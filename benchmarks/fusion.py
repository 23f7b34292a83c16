"""Time and peak memory of fusing ViT-S, ViT-B and ResNet-50, in float32 and in float64.

    PYTHONPATH=. python benchmarks/fusion.py

float32 is jitted, float64 is exact as in exports. Every case runs in a process of its own, so that
its peak memory is its own. The weights and the (non-zero) denoisers count in the memory; "above the
weights" subtracts the memory in use before fusing began.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser, network, printed_by
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.fusion import fuse, fuse_exact
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.evaluation import cost

LINEARS = r".*(attn/(query|key|value|out)|mlp/fc[12])"
CASES = {
    "ViT-S/16, MLP": ("vit_s16", None),
    "ViT-S/16, all linears": ("vit_s16", LINEARS),
    "ViT-B/16, MLP": ("vit_b16", None),
    "ViT-B/16, all linears": ("vit_b16", LINEARS),
    "ResNet-50, every layer": ("resnet50", None),
}


def one(case, precision, rounds, tiny=False):
    """Prints sites, parameters, seconds to compile and fuse, peak bytes, bytes above weights."""
    name, pattern = CASES[case]
    model, pixels = network(name, tiny)
    images = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
    sites, schedule = find_sites(model, images, pattern=pattern), Schedule()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros(images.shape))
    denoise = jax.tree_util.tree_map(lambda leaf: leaf + 0.01, init_denoise(sites))
    params = jax.block_until_ready({"backbone": variables["params"], "denoise": denoise})
    size = sum(leaf.size for leaf in jax.tree_util.tree_leaves(denoise))
    before = cost.peak_memory()
    compiling = 0.0
    if precision == "float32":
        began = time.perf_counter()
        run = jax.jit(lambda p: fuse(p, sites, schedule)).lower(params).compile()
        compiling = time.perf_counter() - began
    else:
        run = lambda p: fuse_exact(p, sites, schedule)  # noqa: E731
    times = cost.interleaved({"fuse": lambda: run(params)}, rounds=rounds)["fuse"]
    print(len(sites), size, compiling, np.median(times), cost.peak_memory(), cost.peak_memory() - before)


def main(command=None):
    parser = Parser(__doc__, rounds=1, cases=[next(iter(CASES))])
    parser.add_argument("--case", choices=list(CASES), help="measure this in the present process")
    parser.add_argument("--precision", choices=["float32", "float64"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args(command)
    if arguments.case:
        one(arguments.case, arguments.precision, arguments.rounds, arguments.tiny)
        return
    rows = []
    for case in arguments.cases:
        for precision in ("float32", "float64"):
            options = [f"--case={case}", f"--precision={precision}", f"--rounds={arguments.rounds}"]
            out = printed_by(main, __file__, options, arguments.tiny).split()
            sites, size, compiling, seconds, peak, above = map(float, out)
            rows.append([case, precision, int(sites), size / 1e6, compiling, seconds, peak / 2**30, above / 2**30])
    headers = ["", "in", "sites", "denoisers, M", "compile s", "fuse s", "peak GiB", "above the weights GiB"]
    print(tabulate(rows, headers, floatfmt=("", "", "", ".1f", ".1f", ".2f", ".2f", ".2f")))


if __name__ == "__main__":
    main()
