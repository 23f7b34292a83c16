"""Swin Transformer V2 (Liu et al. 2022): x <- x + LN(Attn(x)); x <- x + LN(MLP(x)), attention within shifted windows.

Attention is softmax(s·cos(q, k) + bias + mask) v in each window. The scale s ≤ 100 is learned head
by head. The bias is 16·sigmoid of a small network of the two tokens' relative position, log-spaced,
so it depends on the parameters only. Every other block shifts the windows by half their side, and
the mask keeps pixels apart that are neighbors only because the shift wraps around. LayerNorm eps
1e-5, exact (erf) GELU. Initial values: truncated normal of standard deviation 0.02 for dense
kernels, Xavier uniform for the patch embedding, zero biases, s = 10, and zero scales of the blocks'
norms, so that every block starts as the identity.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import at_least_float32, whole
from drep_jax.models.windows import (
    Maps,
    Mlp,
    ShiftedWindows,
    fill,
    layer_norm,
    merge,
    of_pairs,
    partition,
    shift_mask,
    side_by_side,
    trunc_normal,
)

BIAS_HIDDEN = 512
"""Hidden dimension of the network of the position bias."""
BIAS_RANGE = 16.0
LARGEST_SCALE = 100.0


class PositionBias(nn.Module):
    """16·sigmoid(fc2(relu(fc1(relative position)))): what each head adds to the scores of two tokens of a window."""

    num_heads: int
    window: tuple[int, int]
    pretrained_window: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "heads tokens tokens"]:
        """Returns the bias; it reads no image."""
        # In float32 at least: bfloat16 has steps of 1/16 at the upper end of the range.
        dtype = None if self.dtype is None else jnp.promote_types(self.dtype, jnp.float32)
        dense = functools.partial(nn.Dense, kernel_init=trunc_normal, dtype=dtype, param_dtype=self.param_dtype)
        table = _relative_positions(self.window, self.pretrained_window).astype(dtype or np.float32)
        hidden = nn.relu(dense(BIAS_HIDDEN, name="fc1")(table))
        bias = BIAS_RANGE * nn.sigmoid(dense(self.num_heads, use_bias=False, name="fc2")(hidden))
        return of_pairs(bias, self.window)


def _relative_positions(window: tuple[int, int], pretrained: int) -> np.ndarray:
    """Returns sign(d)·log₂(1 + |8d|)/3 for the offsets d of (row, column), over the pretrained window's largest one.

    Offsets fall from window − 1 to 1 − window along each axis, which is the order that
    `of_pairs` reads.
    """
    sides = [(pretrained or side) - 1 for side in window]
    axes = [8.0 * np.arange(n - 1, -n, -1) / max(side, 1) for n, side in zip(window, sides, strict=True)]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return np.sign(offsets) * np.log2(1.0 + np.abs(offsets)) / 3.0


class WindowAttention(nn.Module):
    """Multi-head cosine attention within the windows of a feature map.

    `query`, `key` and `value` are given the very same array, so that a trace can see that they read
    one tensor.
    """

    num_heads: int
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    pretrained_window: int = 0
    qkv_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Mixes the pixels of each window."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, x.shape[-1], kernel_init=trunc_normal, **dtypes)
        start = nn.initializers.constant(math.log(10.0))
        logit_scale = self.param("logit_scale", start, (self.num_heads, 1, 1), self.param_dtype)
        bias = PositionBias(self.num_heads, self.window, self.pretrained_window, **dtypes, name="cpb")()
        bias = bias[None]
        size = x.shape[1:3]
        x = fill(x, self.window)
        if any(self.shift):
            x = jnp.roll(x, [-s for s in self.shift], axis=(1, 2))
            bias = bias + shift_mask(x.shape[1:3], self.window, self.shift)[:, None].astype(bias.dtype)
        query = dense(use_bias=self.qkv_bias, name="query")(x)
        key = dense(use_bias=False, name="key")(x)
        value = dense(use_bias=self.qkv_bias, name="value")(x)
        scale = jnp.exp(jnp.minimum(logit_scale, math.log(LARGEST_SCALE)))
        mixed = _attend(query, key, value, scale, bias, self.window)
        mixed = dense(name="out")(mixed)
        mixed = jnp.roll(mixed, self.shift, axis=(1, 2)) if any(self.shift) else mixed
        return mixed[:, : size[0], : size[1]]


def _attend(
    query: Float[Array, "batch height width channels"],
    key: Float[Array, "batch height width channels"],
    value: Float[Array, "batch height width channels"],
    scale: Float[Array, "heads 1 1"],
    bias: Float[Array, "windows heads tokens tokens"],
    window: tuple[int, int],
) -> Float[Array, "batch height width channels"]:
    """Returns softmax(scale·cos(q, k) + bias) v, window by window and head by head; scores are in float32 at least."""
    q, k, v = (partition(a, window, scale.shape[0]) for a in (query, key, value))
    wide = jnp.promote_types(v.dtype, jnp.float32)
    q, k = (_unit(q) * scale[None, None]).astype(v.dtype), _unit(k).astype(v.dtype)
    scores = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=wide)
    weights = jax.nn.softmax(scores + bias[None].astype(wide), axis=-1).astype(v.dtype)
    return merge(weights @ v, query.shape, window)


def _unit(x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """Returns vectors of length one (0 stays 0), in float32 at least."""
    x = at_least_float32(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class SwinBlock(nn.Module):
    """Adds normalized attention, then the normalized MLP; `drop_path` acts whenever it is not 0."""

    num_heads: int
    mlp_dim: int
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    pretrained_window: int = 0
    qkv_bias: bool = True
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Returns a feature map of the same shape."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(layer_norm, scale_init=nn.initializers.zeros, **dtypes)
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=False)  # a branch of an image at once
        attention = WindowAttention(
            self.num_heads, self.window, self.shift, self.pretrained_window, self.qkv_bias, **dtypes, name="attn"
        )
        x = x + drop(norm(name="norm1")(attention(x)))
        return x + drop(norm(name="norm2")(Mlp(self.mlp_dim, **dtypes, name="mlp")(x)))


class PatchMerging(nn.Module):
    """Halves both sides and doubles the channels: a dense layer on the four pixels of each 2×2 patch, then a norm."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "batch rows columns doubled"]:
        """Merges; an odd side is padded with zeros."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = nn.Dense(2 * x.shape[-1], use_bias=False, kernel_init=trunc_normal, **dtypes, name="reduction")
        return layer_norm(**dtypes, name="norm")(dense(side_by_side(x)))


class SwinV2(ShiftedWindows, kw_only=True):
    """Swin Transformer V2; its attributes are those of `ShiftedWindows`, and one more.

    Attributes:
      pretrained_window_sizes: of each stage, the window that the weights were trained with where it
        was another one, which keeps the position bias in its units; 0 for the same.
    """

    pretrained_window_sizes: tuple[int, ...] | None = None

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        super().check()
        stages, pretrained = len(self.depths), self.pretrained_window_sizes
        if pretrained is not None and (not whole(pretrained, 0) or len(pretrained) != stages):
            raise ConfigError(
                f"pretrained_window_sizes must be {stages} whole numbers, one for each stage (0: the same window), "
                f"got {pretrained!r}."
            )

    def kinds(self) -> tuple[type[nn.Module], type[nn.Module], Any]:
        """Returns the class of its blocks, the class of what merges patches, and how the embedding is initialized."""
        return SwinBlock, PatchMerging, nn.initializers.xavier_uniform()

    def block_options(self, stage: int) -> dict[str, Any]:
        """Returns what only the blocks of this version have."""
        return {"pretrained_window": self.pretrained_window_sizes[stage] if self.pretrained_window_sizes else 0}
