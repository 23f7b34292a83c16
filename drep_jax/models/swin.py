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
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.activations import gelu
from drep_jax.models.backbone import Backbone, at_least_float32, check_classes, whole
from drep_jax.models.transformer import pair

BIAS_HIDDEN = 512
"""Hidden dimension of the network of the position bias."""
BIAS_RANGE = 16.0
LARGEST_SCALE = 100.0
MASKED = -100.0
"""Added between pixels that are no neighbors. Finite as in the original, whose weights are trained with what leaks."""

_norm = functools.partial(nn.LayerNorm, 1e-5, use_fast_variance=False)  # exact also where single channels are huge
_trunc_normal = nn.initializers.truncated_normal(0.02)


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
        dense = functools.partial(nn.Dense, kernel_init=_trunc_normal, dtype=dtype, param_dtype=self.param_dtype)
        table = _relative_positions(self.window, self.pretrained_window).astype(dtype or np.float32)
        hidden = nn.relu(dense(BIAS_HIDDEN, name="fc1")(table))
        bias = BIAS_RANGE * nn.sigmoid(dense(self.num_heads, use_bias=False, name="fc2")(hidden))
        rows, columns = self.window
        # (heads, Δrow, Δcolumn) to (heads, Δcolumn, row, row') to (heads, row, row', column,
        # column')
        bias = jnp.moveaxis(_toeplitz(jnp.transpose(bias, (2, 1, 0)), rows), 1, 3)
        bias = _toeplitz(bias, columns)
        return jnp.swapaxes(bias, 2, 3).reshape(self.num_heads, rows * columns, rows * columns)


def _relative_positions(window: tuple[int, int], pretrained: int) -> np.ndarray:
    """Returns sign(d)·log₂(1 + |8d|)/3 for the offsets d of (row, column), over the pretrained window's largest one.

    Offsets fall from window − 1 to 1 − window along each axis, which is the order that `_toeplitz`
    reads.
    """
    sides = [(pretrained or side) - 1 for side in window]
    axes = [8.0 * np.arange(n - 1, -n, -1) / max(side, 1) for n, side in zip(window, sides, strict=True)]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return np.sign(offsets) * np.log2(1.0 + np.abs(offsets)) / 3.0


def _toeplitz(values: Float[Array, "*batch offsets"], size: int) -> Float[Array, "*batch size size"]:
    """Returns m[…, i, j] = values[…, size − 1 − i + j] by reshapes: a gather's gradient would be a slow scatter."""
    lead = values.shape[:-1]
    rows = jnp.broadcast_to(values[..., None, :], (*lead, size, 2 * size - 1))
    rows = jnp.pad(rows, [(0, 0)] * (len(lead) + 1) + [(0, 1)])
    # Read with one number less a row, each row starts one further to the left than the one above.
    skewed = rows.reshape(*lead, -1)[..., : size * (2 * size - 1)].reshape(*lead, size, 2 * size - 1)
    return skewed[..., size - 1 :]


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
        dense = functools.partial(nn.Dense, x.shape[-1], kernel_init=_trunc_normal, **dtypes)
        start = nn.initializers.constant(math.log(10.0))
        logit_scale = self.param("logit_scale", start, (self.num_heads, 1, 1), self.param_dtype)
        bias = PositionBias(self.num_heads, self.window, self.pretrained_window, **dtypes, name="cpb")()
        bias = bias[None]
        if any(self.shift):
            x = jnp.roll(x, [-s for s in self.shift], axis=(1, 2))
            bias = bias + _mask(x.shape[1:3], self.window, self.shift)[:, None].astype(bias.dtype)
        query = dense(use_bias=self.qkv_bias, name="query")(x)
        key = dense(use_bias=False, name="key")(x)
        value = dense(use_bias=self.qkv_bias, name="value")(x)
        scale = jnp.exp(jnp.minimum(logit_scale, math.log(LARGEST_SCALE)))
        mixed = _attend(query, key, value, scale, bias, self.window)
        mixed = dense(name="out")(mixed)
        return jnp.roll(mixed, self.shift, axis=(1, 2)) if any(self.shift) else mixed


def _attend(
    query: Float[Array, "batch height width channels"],
    key: Float[Array, "batch height width channels"],
    value: Float[Array, "batch height width channels"],
    scale: Float[Array, "heads 1 1"],
    bias: Float[Array, "windows heads tokens tokens"],
    window: tuple[int, int],
) -> Float[Array, "batch height width channels"]:
    """Returns softmax(scale·cos(q, k) + bias) v, window by window and head by head; scores are in float32 at least."""
    q, k, v = (_partition(a, window, scale.shape[0]) for a in (query, key, value))
    wide = jnp.promote_types(v.dtype, jnp.float32)
    q, k = (_unit(q) * scale[None, None]).astype(v.dtype), _unit(k).astype(v.dtype)
    scores = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=wide)
    weights = jax.nn.softmax(scores + bias[None].astype(wide), axis=-1).astype(v.dtype)
    return _merge(weights @ v, query.shape, window)


def _unit(x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """Returns vectors of length one (0 stays 0), in float32 at least."""
    x = at_least_float32(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _partition(
    x: Float[Array, "batch height width channels"], window: tuple[int, int], heads: int
) -> Float[Array, "batch windows heads tokens dim"]:
    """Cuts a feature map into windows, and its channels into heads."""
    batch, height, width, channels = x.shape
    rows, columns = window
    x = x.reshape(batch, height // rows, rows, width // columns, columns, heads, channels // heads)
    return jnp.transpose(x, (0, 1, 3, 5, 2, 4, 6)).reshape(batch, -1, heads, rows * columns, channels // heads)


def _merge(
    x: Float[Array, "batch windows heads tokens dim"], shape: Sequence[int], window: tuple[int, int]
) -> Float[Array, "batch height width channels"]:
    """Inverse of `_partition`, to this shape."""
    batch, height, width, channels = shape
    (rows, columns), heads = window, x.shape[2]
    x = x.reshape(batch, height // rows, width // columns, heads, rows, columns, channels // heads)
    return jnp.transpose(x, (0, 1, 4, 2, 5, 3, 6)).reshape(batch, height, width, channels)


def _mask(size: Sequence[int], window: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """Returns (windows, tokens, tokens): `MASKED` where a shifted map's two pixels were apart before the shift, else 0."""
    lines = []  # of each axis: a number for each pixel, 1 for those that the shift wrapped around
    for length, side, moved in zip(size, window, shift, strict=True):
        lines.append((np.arange(length) >= length - moved).astype(int).reshape(-1, side))
    regions = 2 * lines[0][:, None, :, None] + lines[1][None, :, None, :]
    regions = regions.reshape(-1, window[0] * window[1])
    return np.where(regions[:, :, None] != regions[:, None, :], MASKED, 0.0)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Maps each pixel by itself."""
        dense = functools.partial(nn.Dense, kernel_init=_trunc_normal, dtype=self.dtype, param_dtype=self.param_dtype)
        return dense(x.shape[-1], name="fc2")(gelu(dense(self.hidden, name="fc1")(x)))


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
        norm = functools.partial(_norm, scale_init=nn.initializers.zeros, **dtypes)
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
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns doubled"]:
        """Merges; pixels are read column by column, as in the original."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        x = jnp.transpose(x, (0, 1, 3, 4, 2, 5)).reshape(batch, height // 2, width // 2, 4 * channels)
        x = nn.Dense(2 * channels, use_bias=False, kernel_init=_trunc_normal, **dtypes, name="reduction")(x)
        return _norm(**dtypes, name="norm")(x)


class SwinV2(Backbone, kw_only=True):
    """Swin Transformer V2.

    Attributes:
      width: channels of the first stage; each later stage has twice as many.
      depths: number of blocks of each stage.
      num_heads: attention heads of each stage.
      window_size: side of a window in pixels of the feature map, or (height, width). Along a side
        of a feature map that is no longer than the window, the window is that side and is not
        shifted.
      num_classes: number of logits; 0 returns the features that the head would read.
      image_size: (height, width) in pixels. The windows must divide every stage's feature map, and
        all but the last must have even sides.
      patch_size: side of a patch in pixels, or (height, width).
      mlp_ratio: hidden dimension of the MLPs over their width.
      qkv_bias: whether query and value have biases; key never has.
      pretrained_window_sizes: of each stage, the window that the weights were trained with where it
        was another one, which keeps the position bias in its units; 0 for the same.
      drop_path: rate at which a block's branch is left out for an image when `train`; it rises
        linearly from 0 in the first block to this in the last. Needs an rng named "dropout".
    """

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int | tuple[int, int]
    num_classes: int
    image_size: tuple[int, int]
    patch_size: int | tuple[int, int] = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    pretrained_window_sizes: tuple[int, ...] | None = None
    drop_path: float = 0.0

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Classifies images.

        Args:
          x: normalized images of `image_size`.
          train: whether blocks are dropped.

        Returns:
          Logits (batch, num_classes), or features (batch, width of the last stage) with
          `num_classes=0`; float32 also when `dtype` is narrower.

        Raises:
          ConfigError: when the images are not of `image_size`.
        """
        if x.ndim != 4 or tuple(x.shape[1:3]) != tuple(self.image_size):
            height, width = self.image_size
            raise ConfigError(
                f"This SwinV2 takes images of shape (batch, {height}, {width}, channels), got {tuple(x.shape)}. "
                "Resize the images, or set image_size."
            )
        patch = pair(self.patch_size)
        embedding = functools.partial(nn.Conv, kernel_init=nn.initializers.xavier_uniform(), name="embedding")
        x = embedding(self.width, patch, strides=patch, padding="VALID", **self.dtypes)(x)
        x = _norm(**self.dtypes, name="embedding_norm")(x)
        rates = iter(np.linspace(0.0, self.drop_path if train else 0.0, sum(self.depths)).tolist())
        block_class: Any = self.rematerialized(SwinBlock)
        for stage, depth in enumerate(self.depths):
            if stage:
                x = PatchMerging(**self.dtypes, name=f"stage{stage}_merge")(x)
            window = tuple(map(min, x.shape[1:3], pair(self.window_size)))
            half = tuple(side // 2 if side < length else 0 for side, length in zip(window, x.shape[1:3], strict=True))
            for i in range(depth):
                x = block_class(
                    num_heads=self.num_heads[stage],
                    mlp_dim=int(self.mlp_ratio * x.shape[-1]),
                    window=window,
                    shift=half if i % 2 else (0, 0),
                    pretrained_window=self.pretrained_window_sizes[stage] if self.pretrained_window_sizes else 0,
                    qkv_bias=self.qkv_bias,
                    drop_path=next(rates),
                    **self.dtypes,
                    name=f"stage{stage}_block{i}",
                )(x)
        features = _norm(**self.dtypes, name="norm")(x).mean(axis=(1, 2))
        if self.num_classes:
            features = nn.Dense(self.num_classes, kernel_init=_trunc_normal, **self.dtypes, name="head")(features)
        return at_least_float32(features)


def _check(swin: SwinV2) -> None:
    """Raises ConfigError for attributes that cannot work together."""
    for name in ("patch_size", "window_size", "image_size"):
        value = getattr(swin, name)
        sides = (value,) * 2 if name != "image_size" and isinstance(value, int) else value
        if not whole(sides, 1) or len(sides) != 2:
            raise ConfigError(f"{name} must be (height, width) in pixels, both at least 1, got {value!r}.")
    if not whole((swin.width,), 1):
        raise ConfigError(f"width must be a whole number, at least 1, got {swin.width!r}.")
    if not whole(swin.depths, 1) or not swin.depths:
        raise ConfigError(f"depths must be the number of blocks of each stage, all at least 1, got {swin.depths!r}.")
    stages = len(swin.depths)
    if not whole(swin.num_heads, 1) or len(swin.num_heads) != stages:
        raise ConfigError(f"num_heads must be {stages} whole numbers, one for each stage, got {swin.num_heads!r}.")
    pretrained = swin.pretrained_window_sizes
    if pretrained is not None and (not whole(pretrained, 0) or len(pretrained) != stages):
        raise ConfigError(
            f"pretrained_window_sizes must be {stages} whole numbers, one for each stage (0: the same window), "
            f"got {pretrained!r}."
        )
    check_classes(swin)
    if not 0 <= swin.drop_path < 1:
        raise ConfigError(f"drop_path must be in [0, 1), got {swin.drop_path}.")
    if not swin.mlp_ratio * swin.width >= 1:
        raise ConfigError(f"mlp_ratio must leave the MLPs at least one hidden unit, got {swin.mlp_ratio}.")
    for stage, heads in enumerate(swin.num_heads):
        if (swin.width << stage) % heads:
            raise ConfigError(f"Stage {stage} is {swin.width << stage} wide, which {heads} heads do not divide.")
    sides = zip(("height", "width"), swin.image_size, pair(swin.patch_size), pair(swin.window_size), strict=True)
    for side, size, patch, window in sides:
        if misfit := _misfit(size, patch, window, stages):
            smaller = (s for s in range(size // patch * patch, 0, -patch) if not _misfit(s, patch, window, stages))
            larger = (s for s in range(size // patch * patch, 2**63, patch) if not _misfit(s, patch, window, stages))
            above = next(s for s in larger if s > size)
            raise ConfigError(
                f"Image {side} {size} does not fit: {misfit}. The nearest that fit: {next(smaller, above)} and {above}."
            )


def _misfit(size: int, patch: int, window: int, stages: int) -> str:
    """Returns why the windows do not fit an image of this size along one side, or "" if they do."""
    if size % patch:
        return f"it is not divisible by the patch size {patch}"
    length = size // patch
    for stage in range(stages):
        if stage and length % 2:
            return f"the feature map of stage {stage - 1} is {length} long, which is odd and cannot be halved"
        length //= 2 if stage else 1
        if length > window and length % window:
            return f"the feature map of stage {stage} is {length} long, which windows of {window} do not divide"
    return ""
