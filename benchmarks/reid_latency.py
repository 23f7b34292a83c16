"""The equivalent of the paper's Table 4: latency plain, fused, with DenoiseRep⁻, and explicit.

    PYTHONPATH=. python benchmarks/reid_latency.py --model=transreid_ssl_s16 --batch=32 --rounds=15

Random weights and random denoisers at every linear of the MLPs (for ResNets, pointwise ones at
every convolution), which cost the same as trained ones. One run, interleaved, medians; a ratio is
the median of the rounds' own ratios to the plain network.
"""

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.common import TINY_PIXELS, Parser, network
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse
from drep_jax.core.layers import find_layers
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import assign_times, select_sites
from drep_jax.evaluation import cost
from drep_jax.learners.labeled import WithFinal
from drep_jax.models import create_model


def main(command=None):
    parser = Parser(__doc__, batch=2, rounds=1, size=(TINY_PIXELS, TINY_PIXELS))
    parser.add_argument("--model", default="transreid_ssl_s16")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), help="height and width")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sites", default="", help="regular expression over layers")
    arguments = parser.parse_args(command)
    size = tuple(arguments.size)
    backbone = (
        network("", tiny=True, num_classes=0)[0]
        if arguments.tiny
        else create_model(arguments.model, num_classes=0, image_size=size)
    )
    images = jax.random.normal(jax.random.key(0), (arguments.batch, *size, 3))
    variables = dict(jax.jit(backbone.init)(jax.random.key(1), images[:1]))
    layers = find_layers(backbone, jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32))
    schedule = Schedule()
    selected = select_sites(
        layers, arguments.sites or None, kind="pointwise" if "resnet" in arguments.model else "auto"
    )
    sites = assign_times(selected, timesteps=schedule.timesteps)
    key = jax.random.key(2)
    denoise = jax.tree_util.tree_map(lambda a: 0.01 * jax.random.normal(key, a.shape), init_denoise(sites))
    params = {"backbone": variables["params"], "denoise": denoise}
    fused = jax.jit(lambda p: fuse(p, sites, schedule))(params)
    beyond = WithFinal(backbone)
    final = jax.jit(beyond.init)(jax.random.key(3), images[:1])
    networks = {
        "baseline": (jax.jit(backbone.apply), (variables, images)),
        "fused": (jax.jit(backbone.apply), ({**variables, "params": fused}, images)),
        "DenoiseRep⁻": (jax.jit(beyond.apply), (final, images)),
        "explicit": (
            jax.jit(lambda v, d, x: explicit_apply(backbone, v, d, sites, schedule, x)),
            (variables, denoise, images),
        ),
    }
    times = cost.interleaved(
        {name: lambda run=run, inputs=inputs: run(*inputs) for name, (run, inputs) in networks.items()},
        rounds=arguments.rounds,
    )
    ratios = cost.ratios(times, "baseline")
    flops = {name: cost.flops(run, *inputs) for name, (run, inputs) in networks.items()}
    rows = [
        [name, f"{1e3 * np.median(times[name]):.0f}", f"{ratios[name]:.3f}", f"{flops[name] / flops['baseline']:.4f}"]
        for name in networks
    ]
    where = f"{len(sites)} sites, {jax.devices()[0].platform}"
    print(f"{arguments.model}, {arguments.batch} images of {size[0]} × {size[1]}, {where}")
    print(tabulate(rows, ["network", "ms", "latency ×", "FLOPs ×"], disable_numparse=True))


if __name__ == "__main__":
    main()
