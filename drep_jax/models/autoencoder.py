"""The network that l-DAE pre-trains (Chen, Liu, Xie & He 2024): a ViT that knows the noise level, cut in the middle.

Encoder and decoder are one row of transformer blocks of one width. The time step t conditions every
block by adaLN-Zero (Peebles & Xie 2023): with (shift, scale, gate) made from t,

    x ← x + gate₁ · Attn(LN(x)·(1 + scale₁) + shift₁);  x ← x + gate₂ · MLP(LN(x)·(1 + scale₂) + shift₂)

where LN has no parameters of its own. At a fixed t these are constants, and the encoder is a plain
ViT; `drep_jax.pretraining.merge` writes it down. The network takes patches and returns numbers for
each patch; which patches, and what they mean, is the objective's (`drep_jax.pretraining.objective`).
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.models.transformer import Attention, Mlp, sincos_positions

FREQUENCIES = 256
"""Numbers that a time step is written in before the MLP, as in DiT."""
LONGEST = 10_000.0
_xavier = nn.initializers.xavier_uniform()


class TimeEmbedding(nn.Module):
    """SiLU(Linear(SiLU(Linear([cos tω, sin tω])))), ω from 1 to 1e-4: what conditions every block at time step t."""

    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, " batch"]) -> Float[Array, "batch width"]:
        """Embeds the time steps of a batch."""
        omega = LONGEST ** -(jnp.arange(FREQUENCIES // 2, dtype=self.param_dtype) / (FREQUENCIES // 2))
        angle = t.astype(self.param_dtype)[:, None] * omega[None]
        x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        for name in ("fc1", "fc2"):
            x = nn.silu(
                nn.Dense(
                    self.width,
                    kernel_init=nn.initializers.normal(0.02),
                    param_dtype=self.param_dtype,
                    dtype=None,
                    name=name,
                )(x)
            )
        return x


class ConditionedBlock(nn.Module):
    """A transformer block whose norms and branches are scaled and shifted by the time step.

    Without `condition` it is a pre-norm block with plain LayerNorms.
    """

    num_heads: int
    mlp_dim: int
    gate: float = 0.0
    qkv_bias: bool = True
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], condition: Float[Array, "batch time"] | None
    ) -> Float[Array, "batch tokens width"]:
        """Adds attention, then the MLP."""
        width, dtypes = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = Attention(self.num_heads, self.qkv_bias, **dtypes, name="attn")
        mlp = Mlp(self.mlp_dim, self.activation, **dtypes, name="mlp")
        if condition is None:
            for branch, name in ((attention, "norm1"), (mlp, "norm2")):
                x = x + branch(nn.LayerNorm(self.norm_eps, use_fast_variance=False, **dtypes, name=name)(x))
            return x
        zeros = nn.initializers.zeros
        layer = nn.Dense(
            6 * width,
            kernel_init=zeros,
            bias_init=self._initial_modulation,
            param_dtype=self.param_dtype,
            dtype=None,
            name="modulation",
        )
        numbers = layer(condition).astype(x.dtype)
        shifts_scales_gates = jnp.split(numbers[:, None], 6, axis=-1)
        for branch, (shift, scale, gate) in ((attention, shifts_scales_gates[:3]), (mlp, shifts_scales_gates[3:])):
            x = x + gate * branch(modulated(x, shift, scale, self.norm_eps, self.dtype))
        return x

    def _initial_modulation(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Returns shift 0, scale 0 and the initial gate, twice."""
        del key
        return jnp.repeat(jnp.array([0.0, 0.0, self.gate] * 2, dtype), shape[0] // 6)


def modulated(x: Array, shift: Array, scale: Array, eps: float, dtype: Any) -> Array:
    """Returns LN(x)·(1 + scale) + shift, LN without parameters."""
    norm: Any = nn.LayerNorm(eps, use_bias=False, use_scale=False, use_fast_variance=False, dtype=dtype, parent=None)
    return norm.apply({}, x) * (1 + scale) + shift


class DenoisingAutoencoder(nn.Module):
    """Encoder and decoder of l-DAE: noisy patches and a time step in, numbers for each patch out.

    Attributes:
      width: token dimension, a multiple of `num_heads` and of 4.
      depth: blocks of the encoder.
      decoder_depth: blocks of the decoder.
      num_heads: attention heads.
      mlp_dim: hidden dimension of the MLPs.
      grid: number of patches along (height, width).
      outputs: numbers predicted for each patch.
      time_width: of the time embedding; 0 for a network that is not told t.
      gate: of every branch before the first step: 0 in adaLN-Zero, where the encoder starts as its
        patch embedding; with 1 it starts as a plain ViT.
      qkv_bias: whether query, key and value have biases.
      activation: of the MLPs; see `drep_jax.models.vit.ViT`.
      norm_eps: of every LayerNorm.
      remat: recompute each block in the backward pass.
      dtype, param_dtype: of the computation and of the parameters.
    """

    width: int
    depth: int
    decoder_depth: int
    num_heads: int
    mlp_dim: int
    grid: tuple[int, int]
    outputs: int
    time_width: int
    gate: float = 0.0
    qkv_bias: bool = True
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the parts; the encoder's blocks are named as those of a ViT."""
        dense = {"kernel_init": _xavier, "dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = nn.Dense(self.width, **dense)
        if self.time_width:
            self.time = TimeEmbedding(self.time_width, self.param_dtype)
            self.final_modulation = nn.Dense(
                2 * self.width, kernel_init=nn.initializers.zeros, param_dtype=self.param_dtype, dtype=None
            )
        else:
            self.final_norm = nn.LayerNorm(self.norm_eps, use_fast_variance=False, dtype=self.dtype)
        options = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "gate": self.gate,
            "qkv_bias": self.qkv_bias,
            "activation": self.activation,
            "norm_eps": self.norm_eps,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        block: Any = nn.remat(ConditionedBlock) if self.remat else ConditionedBlock
        self.encoderblock = [block(**options) for _ in range(self.depth)]
        self.decoderblock = [block(**options) for _ in range(self.decoder_depth)]
        self.head = nn.Dense(self.outputs, **{**dense, "kernel_init": nn.initializers.zeros})

    def __call__(
        self, patches: Float[Array, "batch patches numbers"], t: Float[Array, " batch"]
    ) -> Float[Array, "batch patches outputs"]:
        """Predicts the objective's target for each patch.

        Args:
          patches: what the objective makes of the noisy patches.
          t: time steps.
        """
        condition = self.condition(t)
        x = self._encode(patches, condition)
        for block in self.decoderblock:
            x = block(x, condition)
        if condition is None:
            return self.head(self.final_norm(x))
        shift, scale = jnp.split(self.final_modulation(condition).astype(x.dtype)[:, None], 2, axis=-1)
        return self.head(modulated(x, shift, scale, self.norm_eps, self.dtype))

    def encode(
        self, patches: Float[Array, "batch patches numbers"], t: Float[Array, " batch"]
    ) -> Float[Array, "batch patches width"]:
        """Returns the encoder's tokens."""
        return self._encode(patches, self.condition(t))

    def condition(self, t: Float[Array, " batch"]) -> Float[Array, "batch time"] | None:
        """Returns what all blocks are told of the time steps; None if nothing."""
        return self.time(t) if self.time_width else None

    def embed(self, patches: Float[Array, "batch patches numbers"]) -> Float[Array, "batch patches width"]:
        """Returns the first block's tokens: embedded patches with their positions."""
        x = self.embedding(patches)
        return x + jnp.asarray(sincos_positions(*self.grid, self.width), x.dtype)

    def _encode(self, patches: Array, condition: Array | None) -> Array:
        x = self.embed(patches)
        for block in self.encoderblock:
            x = block(x, condition)
        return x


def patches_of(
    images: Float[Array, "batch height width channels"], patch: tuple[int, int]
) -> Float[Array, "batch patches numbers"]:
    """Returns the patches of images row by row, each as (rows, columns, channels) in one vector.

    >>> patches_of(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    batch, height, width, channels = images.shape
    (down, across), rows, columns = patch, height // patch[0], width // patch[1]
    cut = images.reshape(batch, rows, down, columns, across, channels)
    return jnp.swapaxes(cut, 2, 3).reshape(batch, rows * columns, down * across * channels)


def images_of(
    patches: Float[Array, "batch patches numbers"], grid: tuple[int, int], patch: tuple[int, int]
) -> Float[Array, "batch height width channels"]:
    """Inverse of `patches_of`."""
    channels = patches.shape[-1] // math.prod(patch)
    cut = patches.reshape(patches.shape[0], *grid, *patch, channels)
    return jnp.swapaxes(cut, 2, 3).reshape(patches.shape[0], grid[0] * patch[0], grid[1] * patch[1], channels)
