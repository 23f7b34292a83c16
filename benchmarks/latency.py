"""Inference latency, fused and explicit, relative to the unchanged backbone; and with mixed statistics of BatchNorm.

PYTHONPATH=. python benchmarks/latency.py                        # ViT-S/16
PYTHONPATH=. python benchmarks/latency.py --network=resnet50 --statistics=image:0.1,batch:0.25
"""

import jax
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser, network
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.evaluation import cost
from drep_jax.exporting.statistics import MixedStatistics, Statistics


def main(command=None):
    parser = Parser(__doc__, batch=2, rounds=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--network", default="vit_s16")
    parser.add_argument("--statistics", default="", help="rows of mixed statistics, with commas between")
    arguments = parser.parse_args(command)
    model, pixels = network(arguments.network, arguments.tiny)
    images = jax.random.normal(jax.random.key(0), (arguments.batch, pixels, pixels, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    sites, schedule = find_sites(model, images), Schedule()
    leaves, structure = jax.tree_util.tree_flatten(init_denoise(sites))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    denoise = structure.unflatten(
        [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
    fused = {
        **variables,
        "params": jax.jit(lambda p: fuse(p, sites, schedule))({"backbone": variables["params"], "denoise": denoise}),
    }

    plain = jax.jit(model.apply)
    explicit = jax.jit(lambda v, d, x: explicit_apply(model, v, d, sites, schedule, x))
    sides = {
        "baseline": lambda: plain(variables, images),
        "fused": lambda: plain(fused, images),
        "explicit": lambda: explicit(variables, denoise, images),
    }
    operations = {name: cost.flops(model.apply, variables, images) for name in ("baseline", "fused")}
    operations["explicit"] = cost.flops(
        lambda v, d, x: explicit_apply(model, v, d, sites, schedule, x), variables, denoise, images
    )
    for text in filter(None, arguments.statistics.split(",")):
        mixing = MixedStatistics(model, Statistics.parse(text))
        mixed = jax.jit(mixing.apply)
        operations[f"fused, {text}"] = cost.flops(mixing.apply, fused, images)
        sides[f"fused, {text}"] = lambda mixed=mixed: mixed(fused, images)
    times = cost.interleaved(sides, rounds=arguments.rounds)
    ratio = cost.ratios(times, "baseline")
    rows = [
        [
            name,
            1e3 * np.median(values),
            1e3 * min(values),
            ratio[name],
            operations[name] / operations["baseline"],
        ]
        for name, values in times.items()
    ]
    print(
        f"{arguments.network}, {pixels} px, batch {arguments.batch}, {len(sites)} sites, {arguments.rounds} rounds, "
        f"{jax.devices()[0]}"
    )
    print(
        tabulate(
            rows,
            ["", "median ms", "least ms", "latency ratio", "FLOP ratio"],
            floatfmt=("", ".1f", ".1f", ".3f", ".3f"),
        )
    )


if __name__ == "__main__":
    main()
