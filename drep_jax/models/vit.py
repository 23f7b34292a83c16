"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm: x <- x + Attn(LN(x)); x <- x + MLP(LN(x)).

With `post_norm` the blocks are those of Vaswani et al. 2017: x <- LN(x + Attn(x)); x <- LN(x + MLP(x)).
Conventions are timm's: class token first, learned position embeddings that include it, LayerNorm eps 1e-6, exact (erf)
GELU. Initial values: truncated normal of standard deviation 0.02 for dense kernels and positions, normal of 1e-6 for
the class token, Xavier uniform for the patch embedding, zero biases.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError, did_you_mean

POOLS = ("cls", "mean")
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"gelu": functools.partial(nn.gelu, approximate=False), "relu": nn.relu}
_trunc_normal = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √d) v, with four separate dense layers.

    `query`, `key` and `value` are given the very same array, so that a trace can see that they read one tensor.
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
            nn.Dense, width, kernel_init=_trunc_normal, dtype=self.dtype, param_dtype=self.param_dtype
        )
        query = dense(use_bias=self.qkv_bias, name="query")(x)
        key = dense(use_bias=self.qkv_bias, name="key")(x)
        value = dense(use_bias=self.qkv_bias, name="value")(x)
        return dense(name="out")(_attend(query, key, value, self.num_heads))


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
    weights = jax.nn.softmax(_at_least_float32(scores), axis=-1).astype(v.dtype)
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
        dense = functools.partial(nn.Dense, kernel_init=_trunc_normal, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = ACTIVATIONS[self.activation](dense(self.hidden, name="fc1")(x))
        return dense(x.shape[-1], name="fc2")(hidden)


class EncoderBlock(nn.Module):
    """One transformer block; `dropout` acts whenever it is not 0, so pass 0 outside training."""

    num_heads: int
    mlp_dim: int
    qkv_bias: bool = True
    dropout: float = 0.0
    post_norm: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Adds attention, then the MLP."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=False)
        norm1, norm2 = (_layer_norm(name, self.norm_eps, **dtypes) for name in ("norm1", "norm2"))
        attention = Attention(self.num_heads, self.qkv_bias, **dtypes, name="attn")
        mlp = Mlp(self.mlp_dim, self.activation, **dtypes, name="mlp")
        if self.post_norm:
            x = norm1(x + drop(attention(x)))
            return norm2(x + drop(mlp(x)))
        x = x + drop(attention(norm1(x)))
        return x + drop(mlp(norm2(x)))

    def step(self, x: Float[Array, "batch tokens width"], _: None) -> tuple[Float[Array, "batch tokens width"], None]:
        """Is `__call__` in the form that `nn.scan` loops over."""
        return self(x), None


class ViT(nn.Module):
    """Vision Transformer.

    Attributes:
      patch_size: side of a patch in pixels, or (height, width).
      width: token dimension, a multiple of `num_heads`.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden dimension of the MLPs.
      num_classes: number of logits; 0 returns the features that the head would read.
      image_size: (height, width) in pixels, each a multiple of the patch.
      pool: "cls" reads the class token after the final norm; "mean" averages the patch tokens (not the class token),
        then normalises the average.
      qkv_bias: whether query, key and value have biases.
      remat: recompute each block in the backward pass: less memory, more time.
      scan: one compiled block looped over parameters stacked under `encoder` (see `stack_blocks`) instead of
        `encoderblock_0`, ...; intercepted layers may sow into a collection named "denoise", stacked the same way.
      post_norm: normalise each sum instead of each input.
      activation: of the MLPs, "gelu" (exact) or "relu".
      norm_eps: of every LayerNorm.
      dropout: rate after the embedding, the attention and the MLP when `train`; needs an rng named "dropout".
      dtype: of the computation; None follows inputs and parameters.
      param_dtype: of the parameters.
    """

    patch_size: int | tuple[int, int]
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    image_size: tuple[int, int]
    pool: str = "cls"
    qkv_bias: bool = True
    remat: bool = False
    scan: bool = False
    post_norm: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Refuses sizes that cannot work, before anything is traced.

        Raises:
          ConfigError: naming the attribute, what was given and what was expected.
        """
        _check(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Classifies images.

        Args:
          x: normalised images of `image_size`.
          train: whether dropout is on.

        Returns:
          Logits (batch, num_classes), or features (batch, width) with `num_classes=0`; float32 also when `dtype` is
          narrower.

        Raises:
          ConfigError: when the images are not of `image_size`.
        """
        if x.ndim != 4 or tuple(x.shape[1:3]) != tuple(self.image_size):
            height, width = self.image_size
            raise ConfigError(
                f"This ViT takes images of shape (batch, {height}, {width}, channels), got {tuple(x.shape)}. "
                "Resize the images, or set image_size (which changes the number of position embeddings)."
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = self._encode(self._embed(x, train), train)
        pooled = x[:, 0] if self.pool == "cls" else x[:, 1:].mean(axis=1)
        # The norm works token by token, so taking the class token first gives the same result for less work.
        features = _layer_norm("norm", self.norm_eps, **dtypes)(pooled)
        if self.num_classes:
            features = nn.Dense(self.num_classes, kernel_init=_trunc_normal, **dtypes, name="head")(features)
        return _at_least_float32(features)

    def _embed(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch tokens dim"]:
        """Returns the class token followed by the patches row by row, with positions added."""
        patch = _pair(self.patch_size)
        x = nn.Conv(
            self.width,
            patch,
            strides=patch,
            padding="VALID",
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embedding",
        )(x)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = self.param("cls", nn.initializers.normal(1e-6), (1, 1, self.width), self.param_dtype)
        positions = self.param("pos_embedding", _trunc_normal, (1, x.shape[1] + 1, self.width), self.param_dtype)
        cls = jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls, x], axis=1) + positions.astype(x.dtype)
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def _encode(self, x: Float[Array, "batch tokens dim"], train: bool) -> Float[Array, "batch tokens dim"]:
        """Applies the blocks, unrolled or as a loop."""
        # Inside a scan the loop already keeps XLA from merging the two forward passes.
        block_class: Any = nn.remat(EncoderBlock, prevent_cse=not self.scan) if self.remat else EncoderBlock
        options = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "qkv_bias": self.qkv_bias,
            "dropout": self.dropout if train else 0.0,
            "post_norm": self.post_norm,
            "activation": self.activation,
            "norm_eps": self.norm_eps,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        if not self.scan:
            for i in range(self.depth):
                x = block_class(**options, name=f"encoderblock_{i}")(x)
            return x
        looped = nn.scan(
            block_class,
            variable_axes={"params": 0, "denoise": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            methods=["step"],
        )
        return looped(**options, name="encoder").step(x, None)[0]


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the parameters of a `ViT(scan=False)` to those of the same network with `scan=True`.

    Args:
      params: tree with `encoderblock_0`, ..., `encoderblock_{depth-1}`.

    Returns:
      The tree with these stacked along a new first axis under `encoder`; all else unchanged.

    Raises:
      ConfigError: when there is no `encoderblock_0`.
    """
    count = sum(name.startswith("encoderblock_") for name in params)
    if not count:
        raise ConfigError(f'No "encoderblock_0" to stack among the parameters {sorted(params)}.')
    blocks = [params[f"encoderblock_{i}"] for i in range(count)]
    stacked = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**{k: v for k, v in params.items() if not k.startswith("encoderblock_")}, "encoder": stacked}


def _layer_norm(name: str, eps: float, dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    """Returns a LayerNorm whose variance is mean((x - mean)²): exact also where single channels are huge."""
    return nn.LayerNorm(eps, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name)


def _at_least_float32(x: Array) -> Array:
    """Widens bfloat16 and float16 to float32 and leaves float64 alone."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of a size given as one number or two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _check(vit: ViT) -> None:
    """Raises ConfigError for attributes that cannot work together."""
    for name in ("patch_size", "image_size"):
        value = getattr(vit, name)
        sides = (value,) * 2 if name == "patch_size" and isinstance(value, int) else value
        if (
            not isinstance(sides, tuple | list)
            or len(sides) != 2
            or not all(isinstance(s, int) and s > 0 for s in sides)
        ):
            raise ConfigError(f"{name} must be (height, width) in pixels, both at least 1, got {value!r}.")
    for name in ("width", "depth", "num_heads", "mlp_dim"):
        value = getattr(vit, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}.")
    if not isinstance(vit.num_classes, int) or vit.num_classes < 0:
        raise ConfigError(f"num_classes must be 0 (features) or more, got {vit.num_classes!r}.")
    if not 0 <= vit.dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), got {vit.dropout}.")
    if vit.pool not in POOLS:
        raise ConfigError(f'Unknown pool "{vit.pool}".{did_you_mean(vit.pool, POOLS)}')
    if vit.activation not in ACTIVATIONS:
        raise ConfigError(f'Unknown activation "{vit.activation}".{did_you_mean(vit.activation, ACTIVATIONS)}')
    if not vit.norm_eps > 0:
        raise ConfigError(f"norm_eps must be above 0, got {vit.norm_eps}.")
    if vit.width % vit.num_heads:
        raise ConfigError(f"width {vit.width} is not divisible by num_heads {vit.num_heads}.")
    for side, size, patch in zip(("height", "width"), vit.image_size, _pair(vit.patch_size), strict=True):
        if size % patch:
            raise ConfigError(
                f"Image {side} {size} is not divisible by the patch {side} {patch}; "
                f"the nearest that are: {size // patch * patch or patch} and {-(-size // patch) * patch}."
            )
