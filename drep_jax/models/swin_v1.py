"""Swin Transformer (Liu et al. 2021): x <- x + Attn(LN(x)); x <- x + MLP(LN(x)), attention within shifted windows.

Attention is softmax(q·k/√d + bias + mask) v in each window; the bias is a table of each head over the
two tokens' relative position. Norms come before what they feed, that of a merged patch too. The rest
is as in `swin`, the second version. Initial values: truncated normal of standard deviation 0.02 for
dense kernels and tables, zero biases.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.models.transformer import pair
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


class WindowAttentionV1(nn.Module):
    """Multi-head attention within the windows of a feature map, with a table of position biases.

    `query`, `key` and `value` are given the very same array, so that a trace can see that they read
    one tensor.

    Attributes:
      table_window: the window that the table is of; offsets of a smaller `window` are its middle.
    """

    num_heads: int
    window: tuple[int, int]
    table_window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    qkv_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Mixes the pixels of each window."""
        dense = functools.partial(
            nn.Dense, x.shape[-1], kernel_init=trunc_normal, dtype=self.dtype, param_dtype=self.param_dtype
        )
        size = x.shape[1:3]
        bias = self._bias()[None]
        x = fill(x, self.window)
        if any(self.shift):
            x = jnp.roll(x, [-s for s in self.shift], axis=(1, 2))
            bias = bias + shift_mask(x.shape[1:3], self.window, self.shift)[:, None].astype(bias.dtype)
        query, key, value = (dense(use_bias=self.qkv_bias, name=name)(x) for name in ("query", "key", "value"))
        mixed = dense(name="out")(_attend(query, key, value, bias, self.window))
        mixed = jnp.roll(mixed, self.shift, axis=(1, 2)) if any(self.shift) else mixed
        return mixed[:, : size[0], : size[1]]

    def _bias(self) -> Float[Array, "heads tokens tokens"]:
        """Returns what each head adds to the scores of two tokens of a window."""
        rows, columns = (2 * side - 1 for side in self.table_window)
        table = self.param("position_bias", trunc_normal, (rows * columns, self.num_heads), self.param_dtype)
        # Offsets rise in the table, as in the public files.
        falling = table.reshape(rows, columns, self.num_heads)[::-1, ::-1]
        down, right = (whole - side for whole, side in zip(self.table_window, self.window, strict=True))
        return of_pairs(falling[down : rows - down, right : columns - right], self.window)


def _attend(
    query: Maps, key: Maps, value: Maps, bias: Float[Array, "windows heads tokens tokens"], window: tuple[int, int]
) -> Maps:
    """Returns softmax(q·k/√d + bias) v, window by window and head by head; scores are in float32 at least."""
    q, k, v = (partition(a, window, bias.shape[1]) for a in (query, key, value))
    wide = jnp.promote_types(v.dtype, jnp.float32)
    scores = jnp.matmul(q * q.shape[-1] ** -0.5, jnp.swapaxes(k, -1, -2), preferred_element_type=wide)
    weights = jax.nn.softmax(scores + bias[None].astype(wide), axis=-1).astype(v.dtype)
    return merge(weights @ v, query.shape, window)


class SwinBlockV1(nn.Module):
    """Adds attention of the normalized map, then the MLP of it; `drop_path` acts whenever it is not 0."""

    num_heads: int
    mlp_dim: int
    window: tuple[int, int]
    table_window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    qkv_bias: bool = True
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Returns a feature map of the same shape."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=False)  # a branch of an image at once
        attention = WindowAttentionV1(
            self.num_heads, self.window, self.table_window, self.shift, self.qkv_bias, **dtypes, name="attn"
        )
        x = x + drop(attention(layer_norm(**dtypes, name="norm1")(x)))
        return x + drop(Mlp(self.mlp_dim, **dtypes, name="mlp")(layer_norm(**dtypes, name="norm2")(x)))


class PatchMergingV1(nn.Module):
    """Halves both sides and doubles the channels: a norm of the four pixels of each 2×2 patch, then a dense layer."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "batch rows columns doubled"]:
        """Merges; an odd side is padded with zeros."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        four = layer_norm(**dtypes, name="norm")(side_by_side(x))
        return nn.Dense(2 * x.shape[-1], use_bias=False, kernel_init=trunc_normal, **dtypes, name="reduction")(four)


class Swin(ShiftedWindows, kw_only=True):
    """Swin Transformer, first version; its attributes are those of `ShiftedWindows`."""

    def kinds(self) -> tuple[type[nn.Module], type[nn.Module], Any]:
        """Returns the class of its blocks, the class of what merges patches, and how the embedding is initialized."""
        return SwinBlockV1, PatchMergingV1, trunc_normal

    def block_options(self, stage: int) -> dict[str, Any]:
        """Returns what only the blocks of this version have."""
        del stage
        return {"table_window": pair(self.window_size)}
