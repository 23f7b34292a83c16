"""A Dense or Conv layer as what it is: a matrix on feature vectors, `y = M ᵀ f + b` for each group.

The *features* of a layer are the vectors that its matrix multiplies: the contracted axes of a Dense layer, the window
(channel-major C, kh, kw; padding included) of a convolution, or the channels of each pixel for a pointwise denoiser.
This is the only place that knows how kernels and inputs are laid out.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from drep_jax.core.layers import Layer, Window


def kernel_matrix(layer: Layer, kind: str, kernel: Float[Array, "..."]) -> Float[Array, "groups width columns"]:
    """Returns the kernel as one matrix a group, rows in the order of `features`."""
    if layer.window is None:
        width = math.prod(layer.kernel_shape[: layer.inputs])
        return kernel.reshape(1, width, -1)
    *size, channels, outputs = layer.kernel_shape
    groups = layer.window.groups
    rank = len(size)
    grouped = kernel.reshape(*size, channels, groups, outputs // groups)
    grouped = jnp.moveaxis(grouped, (rank + 1, rank), (0, 1))  # groups, channels, window, outputs of a group
    return grouped.reshape(groups, channels if kind == "pointwise" else channels * math.prod(size), -1)


def kernel_from_matrix(layer: Layer, kind: str, matrix: Float[Array, "groups width columns"]) -> Float[Array, "..."]:
    """Inverse of `kernel_matrix`."""
    del kind  # both forms flatten the same array
    if layer.window is None:
        return matrix.reshape(layer.kernel_shape)
    *size, channels, outputs = layer.kernel_shape
    groups = layer.window.groups
    rank = len(size)
    grouped = matrix.reshape(groups, channels, *size, outputs // groups)
    return jnp.moveaxis(grouped, (0, 1), (rank + 1, rank)).reshape(layer.kernel_shape)


def bias_from_columns(layer: Layer, kind: str, columns: Float[Array, "groups columns"]) -> Float[Array, "..."]:
    """Returns what `Mᵀ c` adds to the bias; a pointwise constant meets every pixel of the window once."""
    if layer.window is None:
        return columns.reshape(layer.kernel_shape[layer.inputs :])
    if kind == "pointwise":
        columns = columns.reshape(layer.window.groups, math.prod(layer.window.kernel_size), -1).sum(axis=1)
    return columns.reshape(-1)


def features(layer: Layer, kind: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the feature vectors of input `x`: (…, width), or (…, groups, width) for a grouped convolution."""
    if layer.window is None:
        moved = jnp.moveaxis(x, layer.axes, range(-layer.inputs, 0))
        return moved.reshape(*moved.shape[: -layer.inputs], -1)
    if kind == "patch":
        x = patches(layer.window, x)
    groups = layer.window.groups
    return x if groups == 1 else x.reshape(*x.shape[:-1], groups, -1)


def input_from_features(layer: Layer, vectors: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of `features` for Dense layers and pointwise denoisers; `like` is the layer's input."""
    if layer.window is None:
        moved_shape = jnp.moveaxis(like, layer.axes, range(-layer.inputs, 0)).shape
        return jnp.moveaxis(vectors.reshape(moved_shape), range(-layer.inputs, 0), layer.axes)
    return vectors.reshape(like.shape)


def patches(window: Window, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gathers the windows of a convolution after padding: (*batch, *outputs, C·∏kernel_size), channel-major."""
    rank = len(window.kernel_size)
    batch = x.shape[: -rank - 1]
    x, padding = _wrapped(window, x.reshape(-1, *x.shape[-rank - 1 :]))
    spatial = "DHW"[-rank:] if rank <= 3 else "".join(chr(ord("a") + i) for i in range(rank))
    out = jax.lax.conv_general_dilated_patches(
        x,
        filter_shape=window.kernel_size,
        window_strides=window.strides,
        padding=padding,
        lhs_dilation=window.input_dilation,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        precision=jax.lax.Precision.HIGHEST,  # a copy must stay one where the default product rounds its operands
    )
    return out.reshape(*batch, *out.shape[1:])


def _reach(window: Window) -> list[int]:
    """Pixels from the first to the last that a window touches, along each axis."""
    return [(k - 1) * d + 1 for k, d in zip(window.kernel_size, window.kernel_dilation, strict=True)]


def _wrapped(window: Window, x: Float[Array, "batch *pixels c"]) -> tuple[Any, Any]:
    """Fills what is not padded with zeros, and returns the padding that is left for the convolution to do."""
    reach = _reach(window)
    if window.padding in ("CIRCULAR", "REFLECT"):
        sides = [(0, 0), *(((r - 1) // 2, r // 2) for r in reach), (0, 0)]
        return jnp.pad(x, sides, mode="wrap" if window.padding == "CIRCULAR" else "reflect"), "VALID"
    if window.padding == "CAUSAL":
        return jnp.pad(x, [(0, 0), (reach[0] - 1, 0), (0, 0)]), "VALID"
    return x, window.padding


def sampled_features(
    layer: Layer, kind: str, x: Float[Array, "..."], picks: Int[Array, "batch picked"]
) -> Float[Array, "batch picked ..."]:
    """Returns some feature vectors of every example; of a convolution's windows only those are gathered.

    Args:
      layer, kind, x: as for `features`; the first axis of x holds the examples, or a fixed number of rows of each.
      picks: positions among an example's feature vectors, in the order of `features`.

    Returns:
      (batch, picked, width), or (batch, picked, groups, width) for a grouped convolution.
    """
    groups = 1 if layer.window is None else layer.window.groups
    if kind == "patch":
        vectors = _sampled_patches(layer.window, x, picks)
        return vectors if groups == 1 else vectors.reshape(*vectors.shape[:-1], groups, -1)
    vectors = features(layer, kind, x)
    flat = vectors.reshape(picks.shape[0], -1, *vectors.shape[-1 if groups == 1 else -2 :])
    return flat.at[jnp.arange(picks.shape[0])[:, None], picks].get(mode="promise_in_bounds")


def _sampled_patches(window: Any, x: Float[Array, "..."], picks: Int[Array, "batch picked"]) -> Float[Array, "..."]:
    """Gathers the windows of `patches` at the given positions of every example: (batch, picked, C·∏kernel_size)."""
    rank, count, channels = len(window.kernel_size), picks.shape[0], x.shape[-1]
    x, padding = _wrapped(window, x.reshape(-1, *x.shape[-rank - 1 :]))
    reach = _reach(window)
    if isinstance(padding, str):  # never together with a dilated input
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], reach, window.strides, padding)
    sides = [(low, high, d - 1) for (low, high), d in zip(padding, window.input_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])
    pixels = x.shape[1:-1]
    outputs = [(n - r) // s + 1 for n, r, s in zip(pixels, reach, window.strides, strict=True)]
    # A window's pixels, numbered over all images: those of its first one, which depends on where the window is, plus a
    # constant.
    pitch = np.cumprod([1, *pixels[:0:-1]])[::-1]
    taps = np.indices(window.kernel_size).reshape(rank, -1)
    apart = (pitch * np.asarray(window.kernel_dilation)) @ taps
    image, *corner = jnp.unravel_index(picks, (x.shape[0] // count, *outputs))
    image = image + jnp.arange(count)[:, None] * (x.shape[0] // count)
    start = image * math.prod(pixels) + sum(
        place * int(step * p) for place, step, p in zip(corner, window.strides, pitch, strict=True)
    )
    flat = start[..., None] + jnp.asarray(apart, start.dtype)[None, None, :]
    found = x.reshape(-1, channels).at[flat].get(mode="promise_in_bounds")
    return jnp.swapaxes(found, -1, -2).reshape(*picks.shape, -1)


def affine(x: Float[Array, "..."], kernel: Float[Array, "..."], bias: Any = None, precision: Any = None) -> Any:
    """Returns `x @ kernel + bias`, per group if `kernel` is (groups, in, out)."""
    if kernel.ndim == 2:
        y = jnp.matmul(x, kernel, precision=precision)
    else:
        y = jnp.einsum("...gi,gij->...gj", x, kernel, precision=precision)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
