"""Vision Transformer (Dosovitskiy et al. 2021), pre-norm: x <- x + Attn(LN(x)); x <- x + MLP(LN(x)).

With `post_norm` the blocks are those of Vaswani et al. 2017: x <- LN(x + Attn(x)); x <- LN(x +
MLP(x)). Tokens are in the order of DINOv2 and timm: class token, registers (Darcet et al. 2024),
patches row by row. Defaults are timm's: class token, learned position embeddings that include it,
LayerNorm eps 1e-6, exact (erf) GELU. Initial values: truncated normal of standard deviation 0.02
for dense kernels and positions, normal of 1e-6 for the class token and registers, Xavier uniform
for the patch embedding, zero biases, 1e-5 for layer scales.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import Backbone, at_least_float32, check_known
from drep_jax.models.transformer import (
    ACTIVATIONS,
    TRUNC_NORMAL,
    EncoderBlock,
    check_sizes,
    encode,
    grid_of,
    layer_norm,
    pair,
    patch_embedding,
    sincos_positions,
)

POOLS = ("cls", "mean", "gap")
POSITIONS = ("learned", "sincos2d")
_tiny_normal = nn.initializers.normal(1e-6)


class ViT(Backbone, kw_only=True):
    """Vision Transformer.

    Attributes:
      patch_size: side of a patch in pixels, or (height, width).
      width: token dimension, a multiple of `num_heads`.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden dimension of the MLPs.
      num_classes: number of logits; 0 returns the features that the head would read.
      image_size: (height, width) in pixels; each a multiple of the patch, unless `patch_stride` is
        given.
      pool: "cls" reads the class token after the final norm; "mean" averages the patch tokens (no
        others), then normalizes the average, as timm does; "gap" normalizes the patch tokens, then
        averages, as big_vision does.
      final_norm: whether there is that norm; False leaves it out, as l-DAE's features are.
      class_token: whether there is one.
      registers: number of further learned tokens; they have no positions.
      position_class_token: whether the class token has a position too (ViT, DeiT, DINOv2), or the
        patches only (DeiT-3, big_vision, timm's networks with registers).
      positions: "learned", or "sincos2d": fixed ones of the patches, as in MoCo v3 and big_vision's
        plain ViT-S/16.
      patch_stride: distance of the patches, one number or (height, width), as in TransReID, where
        they overlap; None for the patch's own size. There are (size - patch) // stride + 1 of them
        along a side.
      layer_scale: whether what a block adds is scaled by one learned number a channel.
      pre_logits: whether tanh(dense(·)) of the same width follows the pooled features, as in
        Google's older ViTs.
      qkv_bias: whether query, key and value have biases.
      scan: one compiled block looped over parameters stacked under `encoder` (see `stack_blocks`)
        instead of `encoderblock_0`, ...; intercepted layers may sow into a collection named
        "denoise", stacked the same way.
      post_norm: normalize each sum instead of each input.
      activation: of the MLPs, "gelu" (exact), "gelu_tanh" (its approximation, which Google's ViTs
        were trained with), "quick_gelu" (CLIP's) or "relu".
      norm_eps: of every LayerNorm.
      dropout: rate after the embedding, the attention and the MLP when `train`; needs an rng named
        "dropout".
      drop_path: rate at which the last block's branches are left out when `train` (stochastic
        depth), rising linearly from 0 at the first block; needs the same rng.
    """

    patch_size: int | tuple[int, int]
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    image_size: tuple[int, int]
    pool: str = "cls"
    final_norm: bool = True
    class_token: bool = True
    registers: int = 0
    position_class_token: bool = True
    positions: str = "learned"
    patch_stride: int | tuple[int, int] | None = None
    qkv_bias: bool = True
    layer_scale: bool = False
    pre_logits: bool = False
    scan: bool = False
    post_norm: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches along (height, width)."""
        return grid_of(self.image_size, pair(self.patch_size), self._stride)

    @property
    def prefix_positions(self) -> int:
        """Number of positions before those of the patches."""
        return int(self.class_token and self.position_class_token and self.positions == "learned")

    @property
    def _stride(self) -> tuple[int, int]:
        return pair(self.patch_size if self.patch_stride is None else self.patch_stride)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Classifies images.

        Args:
          x: normalized images of `image_size`.
          train: whether dropout and drop path are on.

        Returns:
          Logits (batch, num_classes), or features (batch, width) with `num_classes=0`; float32 also
          when `dtype` is narrower.

        Raises:
          ConfigError: when the images are not of `image_size`.
        """
        if x.ndim != 4 or tuple(x.shape[1:3]) != tuple(self.image_size):
            height, width = self.image_size
            raise ConfigError(
                f"This ViT takes images of shape (batch, {height}, {width}, channels), got {tuple(x.shape)}. "
                "Resize the images, or set image_size (which changes the number of position embeddings)."
            )
        x = self._encode(self._embed(x, train), train)
        norm = layer_norm("norm", self.norm_eps, **self.dtypes) if self.final_norm else lambda tokens: tokens
        patches = x[:, x.shape[1] - math.prod(self.grid) :]
        # The norm works token by token, so taking the class token first gives the same result for
        # less work.
        features = {
            "cls": lambda: norm(x[:, 0]),
            "mean": lambda: norm(patches.mean(axis=1)),
            "gap": lambda: norm(patches).mean(axis=1),
        }[self.pool]()
        if self.pre_logits:
            features = nn.tanh(
                nn.Dense(self.width, kernel_init=TRUNC_NORMAL, **self.dtypes, name="pre_logits")(features)
            )
        if self.num_classes:
            features = nn.Dense(self.num_classes, kernel_init=TRUNC_NORMAL, **self.dtypes, name="head")(features)
        return at_least_float32(features)

    def _embed(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch tokens dim"]:
        """Returns the class token, the registers and the patches row by row, with positions added."""
        x = patch_embedding(self.width, pair(self.patch_size), self._stride, self.dtype, self.param_dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        prefix = [self._tokens("cls", 1, x)] if self.class_token else []
        positions = self._positions().astype(x.dtype)
        if self.prefix_positions:
            prefix[0] += positions[:, :1]
        x += positions[:, self.prefix_positions :]
        if self.registers:
            prefix.append(self._tokens("registers", self.registers, x))
        return nn.Dropout(self.dropout, deterministic=not train)(jnp.concatenate([*prefix, x], axis=1))

    def _positions(self) -> Float[Array, "1 positions dim"]:
        """Returns what is added to the patches, behind what is added to the class token if that has a position."""
        if self.positions == "sincos2d":
            return jnp.asarray(sincos_positions(*self.grid, self.width), self.param_dtype)
        shape = (1, self.prefix_positions + math.prod(self.grid), self.width)
        return self.param("pos_embedding", TRUNC_NORMAL, shape, self.param_dtype)

    def _tokens(
        self, name: str, count: int, like: Float[Array, "batch patches dim"]
    ) -> Float[Array, "batch {count} dim"]:
        """Returns learned tokens, the same for every image."""
        tokens = self.param(name, _tiny_normal, (1, count, self.width), self.param_dtype)
        return jnp.broadcast_to(tokens.astype(like.dtype), (like.shape[0], count, self.width))

    def _encode(self, x: Float[Array, "batch tokens dim"], train: bool) -> Float[Array, "batch tokens dim"]:
        """Applies the blocks, unrolled or as a loop."""
        options = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "qkv_bias": self.qkv_bias,
            "dropout": self.dropout if train else 0.0,
            "post_norm": self.post_norm,
            "layer_scale": self.layer_scale,
            "activation": self.activation,
            "norm_eps": self.norm_eps,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        rates = jnp.linspace(0, self.drop_path, self.depth) if train and self.drop_path else None
        if not self.scan:
            return encode(x, [f"encoderblock_{i}" for i in range(self.depth)], rates, options, self.remat)
        # Inside a scan the loop already keeps XLA from merging the two forward passes.
        block_class: Any = nn.remat(EncoderBlock, prevent_cse=False) if self.remat else EncoderBlock
        looped = nn.scan(
            block_class,
            variable_axes={"params": 0, "denoise": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            methods=["step"],
        )
        return looped(**options, name="encoder").step(x, rates)[0]


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


def _check(vit: ViT) -> None:
    """Raises ConfigError for attributes that cannot work together."""
    check_sizes(vit)
    if not isinstance(vit.registers, int) or vit.registers < 0:
        raise ConfigError(f"registers must be a number of tokens, 0 or more, got {vit.registers!r}.")
    if not 0 <= vit.dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), got {vit.dropout}.")
    check_known(vit, pool=POOLS, positions=POSITIONS, activation=ACTIVATIONS)
    if vit.positions == "sincos2d" and (vit.width % 4 or vit.width < 8):
        raise ConfigError(f'positions "sincos2d" need a width that is a multiple of 4, at least 8; got {vit.width}.')
    if vit.pool == "cls" and not vit.class_token:
        raise ConfigError(
            'pool "cls" reads the class token, and class_token=False leaves it out: choose "mean" or "gap".'
        )
    if not vit.norm_eps > 0:
        raise ConfigError(f"norm_eps must be above 0, got {vit.norm_eps}.")
