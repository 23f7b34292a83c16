"""VMamba, second version (Liu et al. 2024): x <- x + SS2D(LN(x)); x <- x + MLP(LN(x)), in four stages of maps.

SS2D is out(LN(Σ_k scan_k(u))) with u = silu(conv(in(x))): four selective scans (see
`selective_scan`) along the rows, down the columns, and both backwards. This is the form of the
published networks VMamba-T[s1l8], -S[s2l15] and -B[s2l15] (called v05_noz there): no gate, a
depthwise 3x3 convolution without bias, two 3x3 convolutions of stride 2 as stem, one between the
stages. Maps are channels-last. LayerNorm eps 1e-5, exact (erf) GELU.

Every linear map is a layer of its own, so that each can be a denoising site. What the authors stack
over the directions is taken apart: `x_proj` is one dense layer that gives Δ's coordinates, B and C
of all four directions, which read the same pixel; `dt_proj_0` ... `dt_proj_3` expand Δ's
coordinates, one dense layer a direction. Only A, `a_log`, and D, `skip`, are parameters without a
layer. Where `dtype` is narrow, Δ and the scan are in float32 all the same.

Initial values: truncated normal of standard deviation 0.02 for `in_proj`, `out_proj`, MLP and head;
uniform 1/√fan-in for convolutions and `x_proj`; uniform 1/√rank for `dt_proj`, whose bias makes Δ
log-uniform in [0.001, 0.1]; A = -1, ..., -N; D = 1; zero for other biases.
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
from drep_jax.models.backbone import Backbone, at_least_float32, check_batch, check_classes
from drep_jax.models.depthwise import depthwise_conv
from drep_jax.models.selective_scan import selective_scan

Maps = Float[Array, "batch height width channels"]

DIRECTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"by_columns": True},
    {"reverse": True},
    {"by_columns": True, "reverse": True},
)
_trunc_normal = nn.initializers.truncated_normal(0.02)
_torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_SMALLEST_STEP, _LARGEST_STEP = 1e-3, 1e-1


class SS2D(nn.Module):
    """Mixes pixels by selective scans in four directions.

    Attributes:
      inner: channels that are scanned.
      rank: coordinates from which each pixel's Δ is made.
      d_state: numbers in the state of a channel.
      dtype, param_dtype: as of `VMamba`.
    """

    inner: int
    rank: int
    d_state: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Returns maps of the same shape."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense: Any = functools.partial(nn.Dense, use_bias=False, **dtypes)
        u = dense(self.inner, kernel_init=_trunc_normal, name="in_proj")(x)
        u = nn.Conv(
            self.inner,
            (3, 3),
            padding=((1, 1), (1, 1)),
            feature_group_count=self.inner,
            use_bias=False,
            kernel_init=_torch_uniform,
            conv_general_dilated=depthwise_conv,
            name="conv",
            **dtypes,
        )(u)
        u = nn.silu(u)
        made = dense(4 * (self.rank + 2 * self.d_state), kernel_init=_torch_uniform, name="x_proj")(u)
        y = self._scan(u, made)
        return dense(x.shape[-1], kernel_init=_trunc_normal, name="out_proj")(_layer_norm("norm", **dtypes)(y))

    def _scan(self, u: Maps, made: Maps) -> Maps:
        """Returns the sum of the four scans."""
        a_log = self.param("a_log", _log_counts, (4, self.d_state, self.inner), self.param_dtype)
        skip = self.param("skip", nn.initializers.ones, (4, self.inner), self.param_dtype)
        wide = None if self.dtype is None else jnp.promote_types(self.dtype, jnp.float32)
        total: Any = 0.0
        for k, (direction, part) in enumerate(zip(DIRECTIONS, jnp.split(made, 4, axis=-1), strict=True)):
            steps, b, c = jnp.split(part, [self.rank, self.rank + self.d_state], axis=-1)
            project = nn.Dense(
                self.inner,
                kernel_init=_uniform_by_rank,
                bias_init=_step_bias,
                dtype=wide,
                param_dtype=self.param_dtype,
                name=f"dt_proj_{k}",
            )
            a = -jnp.exp(at_least_float32(a_log[k]))
            total = total + selective_scan(u, nn.softplus(at_least_float32(project(steps))), a, b, c, **direction)
        # D x of the four scans together: each pixel meets itself, whatever the direction.
        return total + at_least_float32(u) * at_least_float32(skip).sum(0)[None, None, None]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps each pixel by itself."""
        dense: Any = functools.partial(
            nn.Dense, kernel_init=_trunc_normal, dtype=self.dtype, param_dtype=self.param_dtype
        )
        hidden = gelu(dense(self.hidden, name="fc1")(x))
        return dense(x.shape[-1], name="fc2")(hidden)


class VSSBlock(nn.Module):
    """Adds SS2D, then the MLP; `drop_path` acts whenever it is not 0, so pass 0 outside training."""

    inner: int
    rank: int
    hidden: int
    d_state: int = 1
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Returns maps of the same shape."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=False)
        mix = SS2D(self.inner, self.rank, self.d_state, **dtypes, name="ss2d")
        x = x + drop(mix(_layer_norm("norm1", **dtypes)(x)))
        return x + drop(Mlp(self.hidden, **dtypes, name="mlp")(_layer_norm("norm2", **dtypes)(x)))


class VMamba(Backbone, kw_only=True):
    """VMamba; takes images of any size.

    Attributes:
      depths: blocks in each stage; each stage after the first halves the maps and doubles the
        channels.
      width: channels of the first stage, an even number.
      num_classes: number of logits; 0 returns the pooled features.
      ssm_ratio: channels that are scanned, relative to the stage's.
      d_state: numbers in the state of each scanned channel.
      mlp_ratio: hidden dimension of the MLPs, relative to the stage's channels.
      drop_path: rate at which the last block's branches are dropped, image by image, when `train`;
        it grows linearly from 0 at the first block. Needs an rng named "dropout".
    """

    depths: Sequence[int]
    width: int
    num_classes: int
    ssm_ratio: float = 2.0
    d_state: int = 1
    mlp_ratio: float = 4.0
    drop_path: float = 0.0

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Float[Array, "batch outputs"]:
        """Classifies images.

        Args:
          x: normalized images.
          train: whether branches are dropped.

        Returns:
          Logits (batch, num_classes), or features (batch, channels of the last stage) with
          `num_classes=0`; float32 also when `dtype` is narrower.

        Raises:
          ConfigError: when `x` is not a batch of images.
        """
        check_batch(x, "A VMamba")
        norm: Any = functools.partial(_layer_norm, **self.dtypes)
        x = norm("stem_norm1")(_halve(self.width // 2, "stem_conv1", **self.dtypes)(x))
        x = norm("stem_norm2")(_halve(self.width, "stem_conv2", **self.dtypes)(gelu(x)))
        block: Any = self.rematerialized(VSSBlock)
        rates = iter(np.linspace(0.0, self.drop_path if train else 0.0, sum(self.depths)).tolist())
        for stage, depth in enumerate(self.depths):
            channels = self.width * 2**stage
            if stage:
                x = norm(f"downsample{stage}_norm")(_halve(channels, f"downsample{stage}_conv", **self.dtypes)(x))
            for i in range(depth):
                x = block(
                    inner=int(self.ssm_ratio * channels),
                    rank=math.ceil(channels / 16),
                    hidden=int(self.mlp_ratio * channels),
                    d_state=self.d_state,
                    drop_path=next(rates),
                    **self.dtypes,
                    name=f"layer{stage + 1}_{i}",
                )(x)
        x = norm("norm")(x).mean(axis=(1, 2))
        if self.num_classes:
            x = nn.Dense(self.num_classes, kernel_init=_trunc_normal, **self.dtypes, name="head")(x)
        return at_least_float32(x)


def _halve(channels: int, name: str, dtype: Any, param_dtype: Any) -> nn.Conv:
    """Returns a 3x3 convolution of stride 2, padded by one pixel on every side."""
    return nn.Conv(
        channels,
        (3, 3),
        strides=(2, 2),
        padding=((1, 1), (1, 1)),
        kernel_init=_torch_uniform,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


def _layer_norm(name: str, dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    """Returns a LayerNorm over the channels whose variance is mean((x - mean)²)."""
    return nn.LayerNorm(1e-5, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name)


def _log_counts(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns log 1, ..., log N along the states."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype))[None, :, None], shape)


def _uniform_by_rank(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns numbers in ±1/√rank."""
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * shape[0] ** -0.5


def _step_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns softplus⁻¹(Δ) = Δ + log(1 - exp(-Δ)) of log-uniform steps Δ."""
    low, high = math.log(_SMALLEST_STEP), math.log(_LARGEST_STEP)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def _check(net: VMamba) -> None:
    """Raises ConfigError for attributes that cannot work."""
    depths = net.depths
    if not isinstance(depths, Sequence) or not depths or not all(isinstance(d, int) and d > 0 for d in depths):
        raise ConfigError(f"depths must be the number of blocks of each stage, got {depths!r}.")
    if not isinstance(net.width, int) or net.width < 2 or net.width % 2:
        raise ConfigError(f"width must be an even number of channels (the stem starts with half), got {net.width!r}.")
    for name in ("ssm_ratio", "mlp_ratio"):
        value = getattr(net, name)
        if not isinstance(value, int | float) or int(value * net.width) < 1:
            raise ConfigError(f"{name} times width must give at least one channel, got {value!r}.")
    if not isinstance(net.d_state, int) or net.d_state < 1:
        raise ConfigError(f"d_state must be a whole number, at least 1, got {net.d_state!r}.")
    check_classes(net)
    if not isinstance(net.drop_path, int | float) or not 0 <= net.drop_path < 1:
        raise ConfigError(f"drop_path must be in [0, 1), got {net.drop_path!r}.")
