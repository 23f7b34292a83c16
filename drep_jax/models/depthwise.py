"""Depthwise convolution as a sum of shifted maps, y[p] = Σ_o k[o]·x[p + o], for `nn.Conv(conv_general_dilated=…)`.

XLA has no fast depthwise convolution for CPUs: on (8, 56, 56, 96) with a 3x3 kernel and two cores
its own operator takes 63 ms, forward and backward 200 ms; this takes 3 ms and 12 ms
(`benchmarks/depthwise.py`). With stride 2 XLA's operator is the faster one.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Maps = Float[Array, "batch height width channels"]
Kernel = Float[Array, "rows columns 1 channels"]
Padding = tuple[tuple[int, int], tuple[int, int]]


def depthwise_conv(x: Maps, kernel: Kernel, strides: Sequence[int], padding: Any, **options: Any) -> Maps:
    """Computes `lax.conv_general_dilated`, faster for maps that are convolved channel by channel with stride 1.

    Sums are in float32 at least. In a network of your own it is an argument of a layer:

    >>> import flax.linen as nn
    >>> layer = nn.Conv(8, (3, 3), feature_group_count=8, padding=((1, 1), (1, 1)), conv_general_dilated=depthwise_conv)
    >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.ones((2, 6, 5, 8)))
    >>> y.shape
    (2, 6, 5, 8)

    The padding has to be given in pixels: "SAME" and "VALID" are left to
    `lax.conv_general_dilated`.

    Args:
      x: the maps.
      kernel: one window a channel.
      strides, padding, **options: as for `lax.conv_general_dilated`; what is not depthwise, has a
        stride above 1, is dilated, or is padded by name is left to it.
    """
    groups, dilated = options.get("feature_group_count", 1), (options.get(f"{s}hs_dilation") or () for s in "lr")
    simple = (
        x.ndim == 4
        and groups == x.shape[-1] == kernel.shape[-1]
        and not isinstance(padding, str)
        and all(n == 1 for sizes in (strides, *dilated) for n in sizes)
    )
    if not simple:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    (top, bottom), (left, right) = padding
    return _convolve(((top, bottom), (left, right)), x, kernel)


# `drep_jax.core.layers` accepts layers that compute with a function marked like this: they are as
# linear as any convolution.
depthwise_conv.is_convolution = True  # type: ignore[attr-defined]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(padding: Padding, x: Maps, kernel: Kernel) -> Maps:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = kernel.shape[:2]
    padded = _pad(x, padding)
    terms = (
        _pad(padded, ((-i, i + 1 - rows), (-j, j + 1 - columns))).astype(wide) * kernel[i, j].astype(wide)[None, None]
        for i in range(rows)
        for j in range(columns)
    )
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _pad(x: Maps, padding: Padding) -> Maps:
    """Returns maps with zeros around them, or cut where the padding is negative.

    Unlike a slice this does not name the size of the batch, so the same equations serve any.
    """
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])


def _forward(padding: Padding, x: Maps, kernel: Kernel) -> tuple[Maps, tuple[Maps, Kernel]]:
    return _convolve(padding, x, kernel), (x, kernel)


def _backward(padding: Padding, saved: tuple[Maps, Kernel], dy: Maps) -> tuple[Maps, Kernel]:
    """Returns the gradients: dx is dy convolved with the flipped kernel; dk[o] = Σ_p x[p + o] dy[p]."""
    x, kernel = saved
    # Barriers: XLA would else compute dy anew in each term, and all terms anew in each product of
    # matrices that reads dx.
    dy = lax.optimization_barrier(dy)
    rows, columns = kernel.shape[:2]
    back = tuple((n - 1 - low, n - 1 - high) for n, (low, high) in zip((rows, columns), padding, strict=True))
    dx = _convolve((back[0], back[1]), dy, kernel[::-1, ::-1])
    return lax.optimization_barrier(dx), _kernel_gradient(padding, x, kernel, dy)


def _kernel_gradient(padding: Padding, x: Maps, kernel: Kernel, dy: Maps) -> Kernel:
    """Adds up row by row, and the columns and images at the end: for XLA on CPUs that is 8 times as fast as one sum."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = kernel.shape[:2]
    padded = _pad(x, padding)

    def add_row(row: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        given = lax.dynamic_index_in_dim(dy, row, 1, keepdims=False).astype(wide)
        seen = [lax.dynamic_index_in_dim(padded, row + i, 1, keepdims=False).astype(wide) for i in range(rows)]
        windows = (line[:, j : j + given.shape[1]] for line in seen for j in range(columns))
        return tuple(total + window * given for total, window in zip(sums, windows, strict=True))

    empty = jnp.zeros((dy.shape[0], *dy.shape[2:]), wide)
    sums = lax.fori_loop(0, dy.shape[1], add_row, (empty,) * (rows * columns))
    return jnp.stack([total.sum(axis=(0, 1)) for total in sums]).reshape(kernel.shape).astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)
