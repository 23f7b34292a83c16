"""What a layer replaces of Flax's own (methods, JAX's convolution, its parameters), and whether it can be a site then."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

LEAVES = ("bias", "kernel")
"""Names of a layer's parameters, in tree order."""


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
      window: its `drep_jax.core.window.Window`.
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
      window: a `drep_jax.core.window.Window`.
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


def refusal_of(
    layer: Any,
    window: Any,
    shape: tuple[int, ...],
    node: Any,
    outer: tuple[int, ...] | None,
    transforms: list[str],
    stacked: bool,
) -> str | None:
    """Returns why a layer cannot be a site, or None.

    Args:
      layer: bound.
      window: `drep_jax.core.window.Window` of a convolution, or None.
      shape: of its kernel where it is called.
      node: of the parameter tree at its path.
      outer: of its kernel in the parameter tree, or None if it is not at the layer's path.
      transforms: names of the Flax transformations around the layer, outermost first.
      stacked: whether the two shapes differ.
    """
    if overridden := overrides(type(layer)):
        return (
            f"{type(layer).__name__} overrides {', '.join(overridden)}, so it need not be a linear map; if it only pads or "
            "scales, do that in a module around a plain layer"
        )
    if not layer.path:
        return "the module is itself the layer; wrap it in a module that has it as a part"
    if outer is None:
        return "its kernel is not in the parameter tree at its own path"
    if shared := sorted(set(node) - {*LEAVES}):
        return (
            f"its scope belongs to another module, which also holds {', '.join(shared)} there (nn.share_scope); give the "
            "layer a scope of its own"
        )
    if layer.promote_dtype is not nn.dtypes.promote_dtype:
        return "its promote_dtype is not Flax's, so it may change the weights before they are used"
    if unknown := sorted(set(transforms) - {"scan", "remat", "checkpoint", "jit", "vmap", "named_call"}):
        return f"its weights pass through {', '.join(unknown)} before they are used"
    if getattr(layer, "mask", None) is not None:
        return "its kernel is masked, and fusing would fill the masked entries"
    if getattr(layer, "batch_dims", ()):
        return "it has batch_dims, so every batch row has a kernel of its own"
    custom = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
    products = [f for f in (getattr(layer, name, None) for name in custom) if f is not None]
    if not all(getattr(f, "is_convolution", False) for f in products):
        return "it replaces the matrix product, which then need not be linear (if it is, say f.is_convolution = True)"
    if isinstance(layer, nn.Conv) and (name := differing(layer, products, window, shape)):
        return (
            f"its function {name} says is_convolution and computes something else than jax.lax.conv_general_dilated; if it "
            "pads, do that in a module around the layer"
        )
    if stacked and "vmap" in transforms:
        return "nn.vmap stacks its kernel: its copies run side by side and have no order in time"
    if stacked and transforms.count("scan") != 1:
        return "its kernel is stacked by other than exactly one nn.scan"
    if stacked and outer[1:] != shape:
        return f"its kernel {outer} is not stacked on the first axis (use variable_axes={{'params': 0}})"
    return None
