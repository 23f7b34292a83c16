"""XLA's depthwise convolution against `drep_jax.models.depthwise_conv` on this device, forward and with gradients.

    PYTHONPATH=. python benchmarks/depthwise.py [--forward]

Milliseconds are the least of some rounds, which are interleaved; --forward leaves out the gradients.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from jax import lax

from benchmarks.common import Parser
from drep_jax.models import depthwise_conv

ROWS = ((3, 1), (7, 1))
"""Side of the kernel, stride."""

SHAPE = (8, 56, 56, 96)
ROUNDS = 9


def main(command: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = Parser(__doc__, rounds=1, shape=(1, 8, 8, 4))
    parser.add_argument("--forward", action="store_true", help="leave out the gradients")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, help="of the images")
    options = parser.parse_args(command)
    kinds = ("forward",) if options.forward else ("forward", "gradient")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=options.shape), jnp.float32)
    rows = []
    for side, stride in ROWS:
        kernel = jnp.asarray(rng.normal(size=(side, side, 1, options.shape[-1])), jnp.float32)
        forms = {
            (kind, name): _form(conv, side, stride, kind == "gradient")
            for kind in kinds
            for name, conv in (("XLA", lax.conv_general_dilated), ("ours", depthwise_conv))
        }
        least = dict.fromkeys(forms, np.inf)
        for form in forms.values():
            jax.block_until_ready(form(x, kernel))
        for _ in range(options.rounds):
            for name, form in forms.items():
                began = time.perf_counter()
                jax.block_until_ready(form(x, kernel))
                least[name] = min(least[name], 1e3 * (time.perf_counter() - began))
        pairs = [(least[kind, "XLA"], least[kind, "ours"]) for kind in kinds]
        rows.append([f"{side}x{side}", stride, *(value for xla, ours in pairs for value in (xla, ours, xla / ours))])
    print(f"{tuple(options.shape)} on {jax.devices()[0].device_kind}")
    columns = ["kernel", "stride", *(f"{name}, {kind}" for kind in kinds for name in ("XLA ms", "ours ms", "ratio"))]
    print(tabulate.tabulate(rows, columns, floatfmt=".1f"))


def _form(conv: Callable[..., Any], side: int, stride: int, gradient: bool) -> Callable[..., Any]:
    def apply(x: Any, kernel: Any) -> Any:
        pad = ((side // 2, side // 2),) * 2
        numbers = ("NHWC", "HWIO", "NHWC")
        return conv(x, kernel, (stride, stride), pad, dimension_numbers=numbers, feature_group_count=x.shape[-1])

    if not gradient:
        return jax.jit(apply)
    return jax.jit(jax.grad(lambda x, kernel: jnp.sum(apply(x, kernel) ** 2), argnums=(0, 1)))


if __name__ == "__main__":
    main()
