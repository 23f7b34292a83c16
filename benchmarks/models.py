"""Every backbone against its PyTorch reference: forward and gradients, float32, one thread each.

    pip install torch torchvision timm                 # see requirements-parity.txt
    PYTHONPATH=. python benchmarks/models.py           # or: … benchmarks/models.py vit_s16 resnet50

Both sides run on one core: XLA by its flags and the process's affinity (`single_thread`), PyTorch
by `set_num_threads(1)`. For both, the allocator keeps freed memory (`allocator`), which `train.py`
does not; --return_memory measures without. Rounds are interleaved, seconds are medians of processor
time, and a ratio is the median over the rounds of ours / PyTorch's in the same round. Both networks
are in inference mode with their own random weights, so that there is the same to compute. Gradients
are of the mean square of the logits by all parameters. A reference that is not installed is skipped
with the reason. VMamba's is a checkout of its repository, whose path VMAMBA_REFERENCE gives
(tests/parity/vmamba_reference.py); it runs the authors' plain PyTorch path.
"""

from benchmarks import single_thread  # noqa: F401  isort: skip

import contextlib
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.allocator import keep_freed_memory
from benchmarks.common import TINY_PIXELS, Parser, network
from drep_jax.evaluation import cost
from drep_jax.models import MODELS


class Case(NamedTuple):
    """A backbone of ours and what makes its reference."""

    pixels: int
    reference: Callable[[], Any]


class Missing(Exception):
    """Why a reference cannot be made."""


def from_timm(name):
    return _package("timm").create_model(name)


def from_torchvision(name):
    return getattr(_package("torchvision").models, name)()


def from_vmamba(**options):
    checkout = os.environ.get("VMAMBA_REFERENCE")
    if not checkout:
        raise Missing("VMAMBA_REFERENCE is not set")
    import torch

    from tests.parity.vmamba_reference import load_reference, make_reference

    torch.cuda.device = lambda device: contextlib.nullcontext()  # the reference enters its tensors' GPU
    return make_reference(load_reference(checkout), num_classes=1000, **options)


def _package(name):
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")
    return importlib.import_module(name)


CASES = {
    "vit_s16": Case(224, functools.partial(from_timm, "vit_small_patch16_224")),
    "vit_b16": Case(224, functools.partial(from_timm, "vit_base_patch16_224")),
    "resnet50": Case(224, functools.partial(from_torchvision, "resnet50")),
    "resnet101": Case(224, functools.partial(from_torchvision, "resnet101")),
    "swinv2_t_w8": Case(256, functools.partial(from_timm, "swinv2_tiny_window8_256")),
    "vmamba_t": Case(224, functools.partial(from_vmamba, depths=(2, 2, 8, 2), width=96, ssm_ratio=1.0)),
}


def our_sides(name, pixels, images, tiny=False):
    """Returns (forward, forward with gradients, number of parameters) of our backbone."""
    model, pixels = network(name, tiny, pixels)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)))
    images = jnp.asarray(images)

    def loss(params):
        return jnp.mean(jnp.square(model.apply({**variables, "params": params}, images)))

    forward, gradients = jax.jit(model.apply), jax.jit(jax.value_and_grad(loss))
    count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(variables["params"]))
    return (lambda: forward(variables, images)), (lambda: gradients(variables["params"])), count


def their_sides(reference, images):
    """Returns the same of a PyTorch module."""
    import torch

    torch.set_num_threads(1)
    model = reference().eval()
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    def forward():
        with torch.inference_mode():
            return model(images).numpy()

    def gradients():
        model.zero_grad(set_to_none=True)
        loss = model(images).square().mean()
        loss.backward()
        return loss.item()

    return forward, gradients, sum(p.numel() for p in model.parameters())


def tiny_sides(images):
    """Returns the same of a linear map that takes the place of PyTorch's network."""
    flat, matrix = images.reshape(len(images), -1), np.ones((images[0].size, 1000), np.float32)
    return (lambda: flat @ matrix), (lambda: flat.T @ (flat @ matrix)), matrix.size


def measure(name, case, batch, rounds, tiny=False):
    """Returns the table's rows of one backbone."""
    if name not in MODELS:
        raise Missing("not among MODELS")
    pixels = TINY_PIXELS if tiny else case.pixels
    images = np.random.default_rng(0).normal(size=(batch, pixels, pixels, 3)).astype(np.float32)
    torch_sides = tiny_sides(images) if tiny else their_sides(case.reference, images)
    jax_sides = our_sides(name, pixels, images, tiny)
    if jax_sides[2] != torch_sides[2]:
        print(f"{name}: {jax_sides[2]:,} parameters, and the reference has {torch_sides[2]:,}", file=sys.stderr)
    rows = []
    for what, our, their in zip(("forward", "with gradients"), jax_sides, torch_sides, strict=False):
        times = cost.interleaved({"ours": our, "PyTorch": their}, rounds=rounds, clock=time.process_time)
        seconds = [np.median(times[side]) for side in ("ours", "PyTorch")]
        rows.append([name, what, *seconds, cost.ratios(times, "PyTorch")["ours"]])
        print(f"{name}, {what}: {seconds[0]:.2f} s against {seconds[1]:.2f} s", file=sys.stderr, flush=True)
    return rows


def main(command=None):
    parser = Parser(__doc__, models=["vit_s16"], batch=2, rounds=1, return_memory=True)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--return_memory", action="store_true", help="leave the allocator as the system has it")
    arguments = parser.parse_args(command)
    if unknown := set(arguments.models) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    keeps_memory = not arguments.return_memory and keep_freed_memory()
    rows = []
    for name in arguments.models or CASES:
        try:
            rows += measure(name, CASES[name], arguments.batch, arguments.rounds, arguments.tiny)
        except Missing as reason:
            print(f"{name}: skipped, {reason}", file=sys.stderr)
    memory = "kept" if keeps_memory else "returned to the system"
    print(f"batch {arguments.batch}, float32, one thread, {arguments.rounds} interleaved rounds, freed memory {memory}")
    print(tabulate(rows, ["", "", "ours s", "PyTorch s", "ours / PyTorch"], floatfmt=("", "", ".3f", ".3f", ".2f")))


if __name__ == "__main__":
    main()
