"""Blocks of Vision Transformers, pre-norm: x <- x + Attn(LN(x)); x <- x + MLP(LN(x)), or post-norm, and a row of them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.activations import gelu, quick_gelu
from drep_jax.models.backbone import at_least_float32, check_classes

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
}
TRUNC_NORMAL = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √d) v, with four separate dense layers.

    `query`, `key` and `value` are given the very same array, so that a trace can see that they read
    one tensor.
    """

    num_heads: int
    qkv_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Mixes the tokens of each image."""
        width = x.shape[-1]
        dense = functools.partial(
            nn.Dense, width, kernel_init=TRUNC_NORMAL, dtype=self.dtype, param_dtype=self.param_dtype
        )
        rows = _rows(x)
        query, key, value = (
            dense(use_bias=self.qkv_bias, name=name)(rows).reshape(x.shape) for name in ("query", "key", "value")
        )
        return dense(name="out")(_rows(_attend(query, key, value, self.num_heads))).reshape(x.shape)


def _attend(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch tokens width"],
    value: Float[Array, "batch tokens width"],
    num_heads: int,
) -> Float[Array, "batch tokens width"]:
    """Returns softmax(q kᵀ / √d) v, head by head; the softmax is in float32 at least.

    Heads-first batched products: for (8, 197, 6, 64) on two CPU cores 6 ms, against 9 ms for
    `jax.nn.dot_product_attention` and 10 ms for einsum; forward and backward 17, 26 and 21 ms.
    """
    batch, tokens, width = query.shape
    q, k, v = (jnp.swapaxes(a.reshape(batch, tokens, num_heads, width // num_heads), 1, 2) for a in (query, key, value))
    scores = (q * (width // num_heads) ** -0.5) @ jnp.swapaxes(k, 2, 3)
    weights = jax.nn.softmax(at_least_float32(scores), axis=-1).astype(v.dtype)
    return jnp.swapaxes(weights @ v, 1, 2).reshape(batch, tokens, width)


class Mlp(nn.Module):
    """fc2(activation(fc1(x)))."""

    hidden: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Maps each token by itself."""
        dense = functools.partial(nn.Dense, kernel_init=TRUNC_NORMAL, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = ACTIVATIONS[self.activation](dense(self.hidden, name="fc1")(_rows(x)))
        return dense(x.shape[-1], name="fc2")(hidden).reshape(x.shape)


def _rows(x: Float[Array, "batch tokens width"]) -> Float[Array, "rows width"]:
    """Returns the tokens of all images one below the other.

    A kernel's gradient is then one plain product; over two axes XLA's CPU compiler copies the
    tokens transposed first, which takes a twentieth of the backward pass.
    """
    return x.reshape(-1, x.shape[-1])


class LayerScale(nn.Module):
    """x * gamma, one number a channel (Touvron et al. 2021)."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Scales each channel."""
        gamma = self.param("gamma", nn.initializers.constant(1e-5), x.shape[-1:], self.param_dtype)
        return x * gamma.astype(x.dtype)[None, None]


class EncoderBlock(nn.Module):
    """One transformer block; `dropout` and the drop path act whenever they are given, so only in training."""

    num_heads: int
    mlp_dim: int
    qkv_bias: bool = True
    dropout: float = 0.0
    post_norm: bool = False
    layer_scale: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], drop_path: Float[Array, ""] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Adds attention, then the MLP; with probability `drop_path` a branch is left out, for each image by itself."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm1, norm2 = (layer_norm(name, self.norm_eps, **dtypes) for name in ("norm1", "norm2"))
        attention = Attention(self.num_heads, self.qkv_bias, **dtypes, name="attn")
        mlp = Mlp(self.mlp_dim, self.activation, **dtypes, name="mlp")

        def branch(y: Array, scale: str) -> Array:
            y = nn.Dropout(self.dropout, deterministic=False)(y)
            y = LayerScale(self.param_dtype, name=scale)(y) if self.layer_scale else y
            return y if drop_path is None else _drop_path(y, drop_path, self.make_rng("dropout"))

        if self.post_norm:
            x = norm1(x + branch(attention(x), "ls1"))
            return norm2(x + branch(mlp(x), "ls2"))
        x = x + branch(attention(norm1(x)), "ls1")
        return x + branch(mlp(norm2(x)), "ls2")

    def step(
        self, x: Float[Array, "batch tokens width"], drop_path: Float[Array, ""] | None
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        """Is `__call__` in the form that `nn.scan` loops over."""
        return self(x, drop_path), None


def _drop_path(y: Float[Array, "batch tokens width"], rate: Float[Array, ""], key: Array) -> Array:
    """Returns `y` with all of an image's numbers at zero with probability `rate`, the others scaled to the same mean."""
    survives = jax.random.bernoulli(key, 1 - rate, (y.shape[0], 1, 1))
    return jnp.where(survives, y / (1 - rate).astype(y.dtype), 0)


def layer_norm(name: str, eps: float, dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    """Returns a LayerNorm whose variance is mean((x - mean)²): exact also where single channels are huge."""
    return nn.LayerNorm(eps, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name)


def patch_embedding(
    width: int, patch: tuple[int, int], stride: tuple[int, int], dtype: Any, param_dtype: Any
) -> nn.Conv:
    """Returns the convolution that makes a token of each patch, a submodule of the module that calls."""
    return nn.Conv(
        width,
        patch,
        strides=stride,
        padding="VALID",
        kernel_init=nn.initializers.xavier_uniform(),
        dtype=dtype,
        param_dtype=param_dtype,
        name="embedding",
    )


def encode(
    x: Float[Array, "batch tokens width"],
    names: Sequence[str],
    rates: Float[Array, " blocks"] | None,
    options: Mapping[str, Any],
    remat: bool,
) -> Float[Array, "batch tokens width"]:
    """Applies blocks one after the other, each a submodule of the module that calls.

    Args:
      x: tokens.
      names: of the blocks.
      rates: drop path of each; None for none.
      options: attributes of `EncoderBlock`.
      remat: recompute each block in the backward pass.
    """
    block: Any = nn.remat(EncoderBlock) if remat else EncoderBlock
    for i, name in enumerate(names):
        x = block(**options, name=name)(x, None if rates is None else rates[i])
    return x


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Returns [sin xω, cos xω, sin yω, cos yω] of each patch's column x and row y, ω from 1 to 1e-4 in equal ratios."""
    omega = 10_000.0 ** -np.linspace(0, 1, width // 4)
    y, x = (axis.reshape(-1, 1) * omega for axis in np.mgrid[:rows, :columns])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None]


def grid_of(image: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Returns how many patches lie along (height, width)."""
    rows, columns = ((i - p) // s + 1 for i, p, s in zip(image, patch, stride, strict=True))
    return rows, columns


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of a size given as one number or two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def check_sizes(net: Any) -> None:
    """Raises ConfigError for patches, an image or numbers of a ViT-like module that cannot work together."""
    for name in ("patch_size", "patch_stride", "image_size"):
        value = getattr(net, name)
        if name == "patch_stride" and value is None:
            continue
        sides = (value,) * 2 if name != "image_size" and isinstance(value, int) else value
        if (
            not isinstance(sides, tuple | list)
            or len(sides) != 2
            or not all(isinstance(s, int) and s > 0 for s in sides)
        ):
            raise ConfigError(f"{name} must be (height, width) in pixels, both at least 1, got {value!r}.")
    for name in ("width", "depth", "num_heads", "mlp_dim"):
        value = getattr(net, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}.")
    check_classes(net)
    if not 0 <= net.drop_path < 1:
        raise ConfigError(f"drop_path must be in [0, 1), got {net.drop_path}.")
    if net.width % net.num_heads:
        raise ConfigError(f"width {net.width} is not divisible by num_heads {net.num_heads}.")
    for side, size, patch in zip(("height", "width"), net.image_size, pair(net.patch_size), strict=True):
        if net.patch_stride is not None and size < patch:
            raise ConfigError(f"Image {side} {size} is smaller than the patch {side} {patch}.")
        if net.patch_stride is None and size % patch:
            raise ConfigError(
                f"Image {side} {size} is not divisible by the patch {side} {patch}; "
                f"the nearest that are: {size // patch * patch or patch} and {-(-size // patch) * patch}."
            )
