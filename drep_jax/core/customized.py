"""What a layer replaces of Flax's own: methods that its class overrides, functions in place of JAX's convolution."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

SIZE = 2
"""Strides by which the example is larger than a window."""


def overrides(kind: type) -> list[str]:
    """Returns the methods that a class replaces of the Flax layer that it is made from."""
    before = kind.__mro__[: next(n for n, cls in enumerate(kind.__mro__) if cls.__module__ == nn.linear.__name__)]
    base = kind.__mro__[len(before)]
    names = [name for cls in before for name, value in vars(cls).items() if callable(value) and hasattr(base, name)]
    return sorted({name for name in names if name == "__call__" or not name.startswith("__")} - {"setup"})


def differing(layer: nn.Conv, products: Sequence[Any], window: Any, kernel_shape: Sequence[int]) -> str | None:
    """Returns the name of a user's function that is not the convolution that it says it is, or None.

    Args:
      layer: bound.
      products: the functions that it is given, or classes that make them.
      window: its `drep_jax.core.layers.Window`.
      kernel_shape: its kernel's.
    """
    for product in products:
        if str(getattr(product, "__module__", "")).startswith("drep_jax."):
            continue  # ours have tests of their own
        function = product() if product is layer.conv_general_dilated_cls else product
        if not convolves(function, window, tuple(kernel_shape)):
            return str(getattr(product, "__name__", type(product).__name__))
    return None


@functools.lru_cache(maxsize=64)
def convolves(product: Callable[..., Any], window: Any, kernel_shape: tuple[int, ...]) -> bool:
    """Returns whether a function computes `jax.lax.conv_general_dilated` on a small random example.

    One that pads by itself, or leaves out a dilation, does not.

    Args:
      product: called as Flax calls it.
      window: a `drep_jax.core.layers.Window`.
      kernel_shape: of the layer.
    """
    reach = [(k - 1) * d + 1 for k, d in zip(window.kernel_size, window.kernel_dilation, strict=True)]
    pixels = [r + SIZE * s for r, s in zip(reach, window.strides, strict=True)]
    rank = len(pixels)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *pixels, kernel_shape[-2] * window.groups)).astype(np.float32)
    kernel = rng.normal(size=kernel_shape).astype(np.float32)
    axes = (0, rank + 1, *range(1, rank + 1))
    own_padding = isinstance(window.padding, str) and window.padding in ("CIRCULAR", "REFLECT", "CAUSAL")

    def run(function: Callable[..., Any]) -> Any:
        return function(
            x,
            kernel,
            window.strides,
            "VALID" if own_padding else window.padding,  # Flax has padded before
            lhs_dilation=window.input_dilation,
            rhs_dilation=window.kernel_dilation,
            dimension_numbers=jax.lax.ConvDimensionNumbers(axes, (rank + 1, rank, *range(rank)), axes),
            feature_group_count=window.groups,
            precision=jax.lax.Precision.HIGHEST,
        )

    with jax.ensure_compile_time_eval():
        result, expected = (
            np.asarray(jax.jit(functools.partial(run, f))()) for f in (product, jax.lax.conv_general_dilated)
        )
    return result.shape == expected.shape and bool(np.allclose(result, expected, atol=1e-3 * np.abs(expected).max()))
