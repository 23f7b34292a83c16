"""A Dense or Conv layer as a matrix on feature vectors: y = Mᵀ f + b for each group.

The *feature vectors* f of a layer are what its matrix multiplies:

- Dense: the contracted axes of the input;
- convolution, kind "patch": the window, channel-major (C, kh, kw), padding included;
- convolution, kind "pointwise": the channels of each pixel.

Those of a layer with a `part` are of these channels of the input alone, and so are the rows of its
matrix. Only this file knows how kernels and inputs are laid out.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from drep_jax.core.layers import Layer
from drep_jax.core.window import Window
from drep_jax.typing import AnyArray


def kernel_matrix(
    layer: Layer, kind: str, kernel: Float[AnyArray, "*kernel_shape"]
) -> Float[AnyArray, "groups width columns"]:
    """Returns a layer's kernel as one matrix for each group.

    Args:
      layer: gives the kernel's shape.
      kind: of the site, "dense", "patch" or "pointwise".
      kernel: of one copy, shaped `layer.whole_shape`.

    Returns:
      M, with rows in the order of `features`. The columns are the outputs of a group; for
      "pointwise", the outputs of each pixel of the window.
    """
    kernel = part_of(layer, kernel)
    if layer.window is None:
        width = math.prod(layer.kernel_shape[: layer.inputs])
        return kernel.reshape(1, width, -1)
    *size, channels, outputs = layer.kernel_shape
    groups = layer.window.groups
    rank = len(size)
    grouped = kernel.reshape(*size, channels, groups, outputs // groups)
    grouped = _moveaxis(grouped, (rank + 1, rank), (0, 1))  # groups, channels, window, outputs of a group
    return grouped.reshape(groups, channels if kind == "pointwise" else channels * math.prod(size), -1)


def kernel_from_matrix(
    layer: Layer, kind: str, matrix: Float[AnyArray, "groups width columns"]
) -> Float[AnyArray, "*kernel_shape"]:
    """Inverse of `kernel_matrix`, of the part alone; see `with_part`."""
    del kind  # both kinds flatten the same array
    if layer.window is None:
        return matrix.reshape(layer.kernel_shape)
    *size, channels, outputs = layer.kernel_shape
    groups = layer.window.groups
    rank = len(size)
    grouped = matrix.reshape(groups, channels, *size, outputs // groups)
    return _moveaxis(grouped, (0, 1), (rank + 1, rank)).reshape(layer.kernel_shape)


def part_of(layer: Layer, kernel: Float[AnyArray, "*stack_and_whole_shape"]) -> Float[AnyArray, "*stack_and_shape"]:
    """Returns the rows of a kernel, stacked or not, that belong to a layer's part; all of them if it is the whole."""
    return kernel if layer.part is None else kernel[_channels(layer, layer.part.first, layer.part.end)]


def with_part(
    layer: Layer, kernel: Float[AnyArray, "*whole_shape"], part: Float[AnyArray, "*kernel_shape"]
) -> Float[AnyArray, "*whole_shape"]:
    """Returns a layer's kernel with another one in place of its part, which may be the whole."""
    if layer.part is None:
        return part
    pieces: list[Any] = [
        kernel[_channels(layer, None, layer.part.first)],
        part,
        kernel[_channels(layer, layer.part.end, None)],
    ]
    numbers: Any = np if all(isinstance(piece, np.ndarray) for piece in pieces) else jnp
    return numbers.concatenate(pieces, axis=layer.channel_axis)


def _channels(layer: Layer, first: int | None, end: int | None) -> Any:
    """Returns the index of some input channels in a layer's kernel."""
    return (..., slice(first, end), *[slice(None)] * (-layer.channel_axis - 1))


def _moveaxis(a: AnyArray, source: tuple[int, ...], to: tuple[int, ...]) -> AnyArray:
    """Keeps arrays of NumPy, and with them float64, where they are."""
    return np.moveaxis(a, source, to) if isinstance(a, np.ndarray) else jnp.moveaxis(a, source, to)


def bias_from_columns(
    layer: Layer, kind: str, columns: Float[AnyArray, "groups columns"]
) -> Float[AnyArray, "*bias_shape"]:
    """Returns what Mᵀ c adds to the bias; a pointwise c is added at every pixel of the window."""
    if layer.window is None:
        return columns.reshape(layer.kernel_shape[layer.inputs :])
    if kind == "pointwise":
        columns = columns.reshape(layer.window.groups, math.prod(layer.window.kernel_size), -1).sum(axis=1)
    return columns.reshape(-1)


def features(layer: Layer, kind: str, x: Float[AnyArray, "*input_shape"]) -> Float[AnyArray, "*positions width"]:
    """Returns the feature vectors of a layer's input.

    Args:
      layer: the layer.
      kind: of the site, "dense", "patch" or "pointwise".
      x: input of the layer.

    Returns:
      (…, width), or (…, groups, width) for a grouped convolution.
    """
    x = channels_read(layer, x)
    if layer.window is None:
        moved = jnp.moveaxis(x, layer.axes, range(-layer.inputs, 0))
        return moved.reshape(*moved.shape[: -layer.inputs], -1)
    if kind == "patch":
        x = patches(layer.window, x)
    groups = layer.window.groups
    return x if groups == 1 else x.reshape(*x.shape[:-1], groups, -1)


def input_from_features(
    layer: Layer, vectors: Float[AnyArray, "*positions width"], like: Float[AnyArray, "*input_shape"]
) -> Float[AnyArray, "*input_shape"]:
    """Inverse of `features`, except for patches; `like` is the layer's input, of which a part keeps the rest."""
    if layer.part is not None:
        first, end = layer.part.first, layer.part.end
        return jnp.asarray(like, vectors.dtype).at[..., first:end].set(vectors.reshape(*like.shape[:-1], end - first))
    if layer.window is None:
        moved_shape = jnp.moveaxis(like, layer.axes, range(-layer.inputs, 0)).shape
        return jnp.moveaxis(vectors.reshape(moved_shape), range(-layer.inputs, 0), layer.axes)
    return vectors.reshape(like.shape)


def channels_read(layer: Layer, x: Float[AnyArray, "*input_shape"]) -> Float[AnyArray, "*part_shape"]:
    """Returns the channels of a layer's input that it reads: all, or those of its part."""
    return x if layer.part is None else x[..., layer.part.first : layer.part.end]


# ---------------------------------------------------------------------------------------------------------------------
# Windows of a convolution
# ---------------------------------------------------------------------------------------------------------------------


def patches(window: Window, x: Float[AnyArray, "*pixels channels"]) -> Float[Array, "*windows width"]:
    """Gathers the windows of a convolution, padding included.

    Args:
      window: how the convolution reads its input.
      x: (*batch, *pixels, C).

    Returns:
      (*batch, *outputs, C·∏kernel_size), channel-major.
    """
    rank = len(window.kernel_size)
    named = isinstance(window.padding, str)
    if window.single and not window.fills_with_zeros and (named or not any(map(any, window.padding))):
        steps: Any = tuple(slice(None, None, step) for step in window.strides)
        return jnp.asarray(x)[(..., *steps, slice(None))]
    batch = x.shape[: -rank - 1]
    x = _padded(window, x.reshape(-1, *x.shape[-rank - 1 :]))
    rows = zip(window.kernel_size, window.kernel_dilation, window.strides, _reach(window), strict=True)
    for axis, (size, dilation, step, reach) in enumerate(rows, 1):  # a new last axis each, of the window's pixels
        count = (x.shape[axis] - reach) // step + 1
        if size == step and dilation == 1:  # windows side by side: no pixel is copied twice
            x = jax.lax.slice_in_dim(x, 0, count * size, axis=axis)
            x = jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis + 1, -1)
            continue
        starts = range(0, size * dilation, dilation)
        end = (count - 1) * step + 1
        x = jnp.stack([jax.lax.slice_in_dim(x, n, n + end, stride=step, axis=axis) for n in starts], axis=-1)
    return x.reshape(*batch, *x.shape[1 : rank + 1], -1)


def _reach(window: Window) -> list[int]:
    """Returns the extent of a window along each axis, in pixels of its dilated input."""
    return [(k - 1) * d + 1 for k, d in zip(window.kernel_size, window.kernel_dilation, strict=True)]


def _padded(window: Window, x: Float[AnyArray, "batch *pixels channels"]) -> Float[Array, "batch *padded channels"]:
    """Returns images as the windows see them, padded and with their dilation filled in."""
    reach = _reach(window)
    padding: Any = window.padding
    if padding in ("CIRCULAR", "REFLECT"):
        sides = [(0, 0), *(((r - 1) // 2, r // 2) for r in reach), (0, 0)]
        return jnp.pad(x, sides, mode="wrap" if padding == "CIRCULAR" else "reflect")
    if padding == "CAUSAL":
        padding = ((reach[0] - 1, 0),)
    if isinstance(padding, str):  # never together with a dilated input
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], reach, window.strides, padding)
    inner: Any = [(low, high, d - 1) for (low, high), d in zip(padding, window.input_dilation, strict=True)]
    return jax.lax.pad(jnp.asarray(x), jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])


def sampled_features(
    layer: Layer, kind: str, x: Float[AnyArray, "rows *row_shape"], picks: Int[AnyArray, "batch picks"]
) -> Float[Array, "batch picks *groups width"]:
    """Returns some feature vectors of every example; no other windows are gathered.

    Args:
      layer, kind: as for `features`.
      x: input of the layer; its first axis holds the examples, or an equal number of rows of each.
      picks: positions among an example's feature vectors, in the order of `features`.

    Returns:
      (batch, picks, width), or (batch, picks, groups, width) for a grouped convolution.
    """
    groups = 1 if layer.window is None else layer.window.groups
    if kind == "patch":
        windows = _sampled_patches(layer.window, channels_read(layer, x), picks)
        return windows if groups == 1 else windows.reshape(*windows.shape[:-1], groups, -1)
    vectors = features(layer, kind, x)
    by_example = jnp.asarray(vectors).reshape(picks.shape[0], -1, *vectors.shape[-1 if groups == 1 else -2 :])
    return by_example.at[jnp.arange(picks.shape[0])[:, None], picks].get(mode="promise_in_bounds")


def _sampled_patches(
    window: Any, x: Float[AnyArray, "rows *row_shape"], picks: Int[AnyArray, "batch picks"]
) -> Float[Array, "batch picks width"]:
    """Gathers the windows of `patches` at some positions of every example, width C·∏kernel_size."""
    rank, batch, channels = len(window.kernel_size), picks.shape[0], x.shape[-1]
    x, reach = _padded(window, x.reshape(-1, *x.shape[-rank - 1 :])), _reach(window)
    pixels = x.shape[1:-1]
    outputs = [(n - r) // s + 1 for n, r, s in zip(pixels, reach, window.strides, strict=True)]
    # Index of a window's pixel among those of all images: that of the window's first pixel, which
    # depends on where the window is, plus an offset that does not.
    pitch = np.cumprod([1, *pixels[:0:-1]])[::-1]
    taps = np.indices(window.kernel_size).reshape(rank, -1)
    offsets = (pitch * np.asarray(window.kernel_dilation)) @ taps
    image, *corner = jnp.unravel_index(picks, (x.shape[0] // batch, *outputs))
    image = image + jnp.arange(batch)[:, None] * (x.shape[0] // batch)
    start = image * math.prod(pixels) + sum(
        place * int(step * p) for place, step, p in zip(corner, window.strides, pitch, strict=True)
    )
    index = start[..., None] + jnp.asarray(offsets, start.dtype)[None, None, :]
    windows = x.reshape(-1, channels).at[index].get(mode="promise_in_bounds")
    return jnp.swapaxes(windows, -1, -2).reshape(*picks.shape, -1)


def affine(
    x: Float[AnyArray, "*batch inputs"],
    kernel: Float[AnyArray, "*groups inputs outputs"],
    bias: Float[AnyArray, "*groups outputs"] | None = None,
    precision: Any = None,
) -> Float[AnyArray, "*batch outputs"]:
    """Returns x·kernel + bias; for each group if `kernel` is (groups, inputs, outputs).

    >>> x, kernel = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 10.0]])
    >>> affine(x, kernel, jnp.array([0.5, 0.5])).tolist()
    [[1.5, 20.5]]
    """
    if kernel.ndim == 2:
        y = jnp.matmul(x, kernel, precision=precision)
    else:
        y = jnp.einsum("...gi,gij->...gj", x, kernel, precision=precision)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
