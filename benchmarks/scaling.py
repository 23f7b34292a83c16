"""Communication, memory and step time on many devices, by model: computed, not measured.

    PYTHONPATH=. python benchmarks/scaling.py
    PYTHONPATH=. python benchmarks/scaling.py --seconds=0.2 --bandwidth=50

The second command takes a step measured on one of your devices, and GB/s. Bytes follow from shapes
alone (`jax.eval_shape`): nothing is run. The time of a step on n devices, each with the batch that
was measured on one, is taken to be

    t(n) = t(1) + 2 (n − 1) / n · bytes / bandwidth

an all-reduce that waits for the whole step and goes around a ring: no overlap, so it is an upper
bound where the bandwidth is right. `--bandwidth` is the rate at which one device sends, in GB/s,
while all send at once.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.moments import zero_sums
from drep_jax.core.sites import find_sites
from drep_jax.models import create_model

LINEARS = r".*(attn/(query|key|value|out)|mlp/fc[12])"
MODELS = {
    "ViT-S/16": ("vit_s16", None),
    "ViT-S/16, all linears": ("vit_s16", LINEARS),
    "ViT-B/16": ("vit_b16", None),
    "ViT-B/16, all linears": ("vit_b16", LINEARS),
    "ResNet-50, pointwise": ("resnet50", None),
    "SwinV2-T": ("swinv2_t_w8", None),
    "VMamba-T": ("vmamba_t", None),
}
"""Name ↦ (model, pattern of the sites; None for the default)."""

SIZES = {"swinv2_t_w8": (256, 256)}
KINDS = {"resnet50": "pointwise"}
DEVICES = (1, 8, 256)
FLOAT = 4  # bytes
SUSTAINED, BATCH = 100e12, 64  # of an assumed device: operations per second, images per step


def numbers(tree):
    """Counts the numbers in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree_util.tree_leaves(tree))


def inputs(model, shape):
    """Returns the numbers that linears and convolutions read per image, and their operations."""
    read, operations = [], []

    def note(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, nn.Dense | nn.DenseGeneral | nn.Conv):
            kernel = context.module.get_variable("params", "kernel")
            fan_in = kernel.size // kernel.shape[-1] if not isinstance(context.module, nn.DenseGeneral) else None
            read.append(args[0].size)
            if fan_in is None:
                operations.append(
                    2 * kernel.size * (args[0].size // math.prod(kernel.shape[:-1])) if kernel.size else 0
                )
            else:
                operations.append(2 * out.size * fan_in)
        return out

    def forward(key, x):
        with nn.intercept_methods(note):
            return model.init(key, x)

    jax.eval_shape(forward, jax.random.key(0), shape)
    return sum(read), sum(operations)


def measure(name, pattern):
    """Returns what is to be known of a model."""
    size = SIZES.get(name, (224, 224))
    model = create_model(name, num_classes=1000, image_size=size)
    shape = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    sites = find_sites(model, shape, pattern=pattern, kind=KINDS.get(name, "auto"))
    read, operations = inputs(model, shape)
    return {
        "backbone": numbers(jax.eval_shape(model.init, jax.random.key(0), shape)["params"]),
        "denoise": numbers(jax.eval_shape(lambda: init_denoise(sites))),
        "sums": sum(numbers(zero_sums(site)) for site in sites),
        "widest": max(site.width for site in sites),
        "sites": len(sites),
        "read": read,
        "operations": operations,
    }


def ring(size, devices, bandwidth):
    """Returns the seconds of an all-reduce of so many bytes around a ring."""
    return 2.0 * (devices - 1) / devices * size / bandwidth


def main(command=None):
    parser = Parser(__doc__, models=["ViT-S/16"])
    parser.add_argument("--model", default="ViT-S/16, all linears", help="whose step --seconds was measured on")
    parser.add_argument("--mode", default="Algorithm 1", help="labels, or Algorithm 1")
    parser.add_argument(
        "--seconds", type=float, default=3.67, help="a step on one device (default: benchmarks/step.py's)"
    )
    parser.add_argument("--batch", type=int, default=8, help="images a device in that step")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s a device")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="of the tables")
    arguments = parser.parse_args(command)
    measured = {title: measure(*MODELS[title]) for title in arguments.models}
    mb = 1e-6 * FLOAT

    rows = []
    for title, m in measured.items():
        millions = [m[part] / 1e6 for part in ("backbone", "denoise")]
        sent = [mb * m["backbone"], mb * m["denoise"], 2 * mb * m["sums"]]
        rows.append([title, m["sites"], m["widest"], *millions, *sent])
    heads = ["", "sites", "widest", "backbone, M", "denoisers, M"]
    heads += ["labels: MB a step", "Algorithm 1: MB a step", "closed form: MB a run"]
    print("What an all-reduce adds up; each device sends 2 (n − 1) / n times as much\n")
    print(tabulate(rows, heads, floatfmt=".1f", tablefmt="github"))

    rows = []
    for title, m in measured.items():
        backbone, denoise = (1e-9 * FLOAT * m[part] for part in ("backbone", "denoise"))
        state = {
            "train": 4 * backbone,  # parameters, gradient, two moments of Adam
            "algorithm1": backbone + 4 * denoise,
            "closed_form": backbone + 2e-9 * FLOAT * m["sums"],
        }
        rows.append([title, *state.values(), mb * m["read"]])
    heads = ["", "labels, GB", "Algorithm 1, GB", "closed form, GB", "per image and float32, MB"]
    print("\nOn every device, whatever their number: parameters, gradients, Adam's state, or sums; and what the linear")
    print(
        "layers read, which training with labels keeps for the backward pass (forward only: the widest layer's alone)\n"
    )
    print(tabulate(rows, heads, floatfmt=".2f", tablefmt="github"))

    rows = []
    for title, m in measured.items():
        for what, part in (("labels", "backbone"), ("Algorithm 1", "denoise")):
            computed = 3 * m["operations"] * BATCH / SUSTAINED
            steps = (("measured", arguments.seconds, arguments.batch), ("computed", computed, BATCH))
            for kind, seconds, batch in steps:
                if kind == "measured" and (title, what) != (arguments.model, arguments.mode):
                    continue
                size = FLOAT * m[part]
                times = [seconds + ring(size, n, 1e9 * arguments.bandwidth) for n in DEVICES]
                speed = [
                    f"{n * batch / t:,.0f} ({100 * times[0] / t:.0f} %)" for n, t in zip(DEVICES, times, strict=True)
                ]
                rows.append([title, what, f"{kind}, {batch} images", seconds, *speed])
    heads = ["", "mode", "step on one", "seconds", *(f"images/s on {n}" for n in DEVICES)]
    print("\nImages per second (and share of n times one device), nothing overlapped, all-reduce at")
    print(f"{arguments.bandwidth:g} GB/s a device.", end=" ")
    print(f"Computed: the time of three forward passes at {SUSTAINED / 1e12:g} TFLOP/s.\n")
    print(tabulate(rows, heads, floatfmt=".3f", tablefmt="github"))


if __name__ == "__main__":
    main()
