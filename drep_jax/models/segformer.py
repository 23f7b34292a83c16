"""SegFormer (Xie et al. 2021): four stages of attention over reduced keys and of MLPs with a depthwise convolution.

Each block: x <- x + Attn(LN(x)); x <- x + MLP(LN(x)). Keys and values are those of the map reduced
by a convolution whose stride is its window, sr pixels; rows and columns left over are dropped. The
MLP is fc2(gelu(depthwise3x3(fc1(x)))), exact (erf) GELU. The head brings the four stages to one
width, enlarges them to the size of the first, fuses them and classifies each pixel.

There are three public implementations, whose networks differ in the eps of their LayerNorms and in
the head, for the same weights of the encoder:

|                                 | mmseg                      | nvlabs         | transformers   |
|---------------------------------|----------------------------|----------------|----------------|
| eps, blocks and after a stage   | 1e-6                       | 1e-6           | 1e-5           |
| eps, after patches and sr       | 1e-6                       | 1e-5           | 1e-5           |
| head, each stage                | linear, no bias, BN, ReLU  | linear         | linear         |
| dropout                         | whole channels             | whole channels | single numbers |

Fusing is a linear map of the four enlarged maps side by side. It acts on channels and enlarging on
pixels, so they commute: `fuse1` … `fuse4` are its four columns of blocks, each read by the map of
its own stage before that is enlarged. This is the same function for a third of the arithmetic, and
each stage is a site of its own.

Initial values: truncated normal of standard deviation 0.02 for dense kernels, He normal by fan-out
for convolutions, 0.01 for the classifier, zero biases.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.activations import gelu
from drep_jax.models.backbone import (
    BatchNormBackbone,
    at_least_float32,
    check_batch,
    check_classes,
    check_known,
    check_rate,
    whole,
)
from drep_jax.models.bilinear import resize_bilinear
from drep_jax.models.depthwise import depthwise_conv
from drep_jax.models.transformer import TRUNC_NORMAL, layer_norm

Maps = Float[Array, "batch height width channels"]
Tokens = Float[Array, "batch tokens width"]

LARGEST_SCORES = 2**22
"""Most attention scores of an image that are held at once; more queries are taken in blocks."""

_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What the public implementations do differently, see above."""

    block_eps: float
    embedding_eps: float
    normed_head: bool
    whole_channels: bool


IMPLEMENTATIONS = {
    "mmseg": Implementation(1e-6, 1e-6, True, True),
    "nvlabs": Implementation(1e-6, 1e-5, False, True),
    "transformers": Implementation(1e-5, 1e-5, False, False),
}


class EfficientAttention(nn.Module):
    """Multi-head attention of all pixels to those of a reduced map.

    `key` and `value` are given the very same array, and `query` too where nothing is reduced, so
    that a trace can see that they read one tensor.
    """

    num_heads: int
    reduction: int
    norm_eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Mixes the pixels of each image."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, channels = x.shape[0], x.shape[-1]
        dense = functools.partial(nn.Dense, channels, kernel_init=TRUNC_NORMAL, **dtypes)
        rows = _rows(x)
        reduced = rows
        if self.reduction > 1:
            window = (self.reduction, self.reduction)
            sr = nn.Conv(
                channels, window, strides=window, padding="VALID", kernel_init=_he_fan_out, **dtypes, name="sr"
            )
            reduced = _rows(layer_norm("sr_norm", self.norm_eps, **dtypes)(sr(x)))
        query = dense(name="query")(rows).reshape(batch, -1, channels)
        key, value = (dense(name=name)(reduced).reshape(batch, -1, channels) for name in ("key", "value"))
        return dense(name="out")(_rows(_attend(query, key, value, self.num_heads))).reshape(x.shape)


def _rows(x: Array) -> Float[Array, "rows width"]:
    """Returns the pixels of all images one below the other, so that a kernel's gradient is one plain product."""
    return x.reshape(-1, x.shape[-1])


def _attend(query: Tokens, key: Tokens, value: Tokens, num_heads: int) -> Tokens:
    """Returns softmax(q kᵀ / √d) v, head by head, in blocks of queries; the softmax is in float32 at least."""
    batch, queries, width = query.shape
    dim = width // num_heads
    q, k, v = (jnp.swapaxes(a.reshape(batch, -1, num_heads, dim), 1, 2) for a in (query * dim**-0.5, key, value))
    k = jnp.swapaxes(k, 2, 3)

    def mix(q: Array) -> Array:
        return jax.nn.softmax(at_least_float32(q @ k), axis=-1).astype(v.dtype) @ v

    blocks = math.ceil(queries * num_heads * k.shape[3] / LARGEST_SCORES)
    if blocks == 1:
        mixed = mix(q)
    else:
        size = math.ceil(queries / blocks)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, blocks * size - queries), (0, 0)))
        parts = jnp.moveaxis(q.reshape(batch, num_heads, blocks, size, dim), 2, 0)
        parts = lax.map(jax.checkpoint(mix), parts)
        mixed = jnp.moveaxis(parts, 0, 2).reshape(batch, num_heads, blocks * size, dim)[:, :, :queries]
    return jnp.swapaxes(mixed, 1, 2).reshape(batch, queries, width)


class DepthwiseConv(nn.Module):
    """3x3 convolution of each channel by itself.

    A module around the layer, as in the original: the linears of the MLP alone are its parts.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Returns maps of the same shape."""
        return nn.Conv(
            x.shape[-1],
            (3, 3),
            padding=((1, 1), (1, 1)),
            feature_group_count=x.shape[-1],
            kernel_init=nn.initializers.normal(math.sqrt(2 / 9)),
            conv_general_dilated=depthwise_conv,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="dwconv",
        )(x)


class MixMlp(nn.Module):
    """fc2(gelu(depthwise(fc1(x))))."""

    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Returns maps of the same shape."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, kernel_init=TRUNC_NORMAL, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = dense(self.hidden, name="fc1")(_rows(x)).reshape(*x.shape[:3], self.hidden)
        hidden = gelu(DepthwiseConv(**dtypes, name="dwconv")(hidden))
        return dense(x.shape[-1], name="fc2")(_rows(hidden)).reshape(x.shape)


class MixBlock(nn.Module):
    """Adds attention, then the MLP; `drop_path` acts whenever it is not 0, so pass 0 outside training."""

    num_heads: int
    reduction: int
    hidden: int
    block_eps: float
    embedding_eps: float
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Returns maps of the same shape."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=False)  # a branch of an image at once
        norm1, norm2 = (layer_norm(name, self.block_eps, **dtypes) for name in ("norm1", "norm2"))
        attention = EfficientAttention(self.num_heads, self.reduction, self.embedding_eps, **dtypes, name="attn")
        x = x + drop(attention(norm1(x)))
        return x + drop(MixMlp(self.hidden, **dtypes, name="mlp")(norm2(x)))


class SegFormerHead(nn.Module):
    """Brings the maps of all stages to one width and size, fuses them, and classifies each pixel.

    Attributes:
      num_classes: number of logits; 0 returns what the classifier would read.
      width: of the maps.
      normed: whether BatchNorm and ReLU follow the linear map of each stage (which then has no
        bias).
      whole_channels: whether dropout leaves out whole channels instead of single numbers.
      dropout: rate.
      axis_name: mapped axis over which batch norms share their statistics.
      dtype, param_dtype: as of `SegFormer`.
    """

    num_classes: int
    width: int
    normed: bool
    whole_channels: bool
    dropout: float
    axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[Maps], train: bool) -> Maps:
        """Returns logits of the size of the first stage; dropout acts when `train`."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(
            nn.BatchNorm, not train, epsilon=1e-5, momentum=0.9, axis_name=self.axis_name, **dtypes
        )
        dense = functools.partial(nn.Dense, self.width, kernel_init=_he_fan_out, use_bias=False, **dtypes)
        (height, width), total = features[0].shape[1:3], jnp.zeros((), jnp.float32)
        for i, x in enumerate(features, 1):
            y = dense(use_bias=not self.normed, name=f"linear{i}")(x)
            y = nn.relu(norm(name=f"linear{i}_bn")(y)) if self.normed else y
            total = total + resize_bilinear(dense(name=f"fuse{i}")(y), (height, width))
        y = nn.relu(norm(name="fuse_bn")(total))
        y = nn.Dropout(self.dropout, (1, 2) if self.whole_channels else (), deterministic=not train)(y)
        if not self.num_classes:
            return y
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), **dtypes, name="classifier")(y)


class SegFormer(BatchNormBackbone, kw_only=True):
    """SegFormer; takes images of any size of at least 29 pixels.

    Attributes:
      widths: channels of the four stages.
      depths: blocks in each stage.
      num_classes: number of logits of a pixel; 0 returns the maps that the classifier would read.
      implementation: "mmseg", "nvlabs" or "transformers", see above.
      num_heads: attention heads in each stage.
      reductions: side of the window that becomes one key, in each stage.
      mlp_ratio: hidden dimension of the MLPs, relative to the stage's channels.
      head_width: channels of the head; a pair is (that of mmseg, that of the others).
      drop_path: rate at which the last block's branches are dropped, image by image, when `train`;
        it grows linearly from 0 at the first block.
      dropout: rate before the classifier when `train`. Both need an rng named "dropout".
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    num_classes: int
    implementation: str = "mmseg"
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratio: int = 4
    head_width: int | tuple[int, int] = 256
    drop_path: float = 0.1
    dropout: float = 0.1

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Float[Array, "batch rows columns classes"]:
        """Classifies the pixels of images.

        Args:
          x: normalized images.
          train: whether branches and channels are dropped, and BatchNorm uses, and updates with,
            the statistics of this batch (make `batch_stats` mutable).

        Returns:
          Logits (batch, ⌈height/4⌉, ⌈width/4⌉, num_classes), float32 also when `dtype` is narrower.

        Raises:
          ConfigError: when `x` is not a batch of images, or they are too small.
        """
        check_batch(x, "A SegFormer")
        how = IMPLEMENTATIONS[self.implementation]
        block: Any = self.rematerialized(MixBlock)
        rates = iter(np.linspace(0.0, self.drop_path if train else 0.0, sum(self.depths)).tolist())
        image, features = x.shape, []
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            x = _patches(width, 4 if i == 0 else 2, f"patch_embed{i + 1}", **self.dtypes)(x)
            if min(x.shape[1:3]) < self.reductions[i]:
                raise ConfigError(
                    f"Images of {image[1]} × {image[2]} pixels are too small for this SegFormer: in stage {i + 1} they "
                    f"are {x.shape[1]} × {x.shape[2]}, and a key is made of {self.reductions[i]} × {self.reductions[i]}. "
                    "Enlarge the images."
                )
            x = layer_norm(f"patch_norm{i + 1}", how.embedding_eps, **self.dtypes)(x)
            for j in range(depth):
                x = block(
                    num_heads=self.num_heads[i],
                    reduction=self.reductions[i],
                    hidden=self.mlp_ratio * width,
                    block_eps=how.block_eps,
                    embedding_eps=how.embedding_eps,
                    drop_path=next(rates),
                    **self.dtypes,
                    name=f"block{i + 1}_{j}",
                )(x)
            x = layer_norm(f"norm{i + 1}", how.block_eps, **self.dtypes)(x)
            features.append(x)
        head = SegFormerHead(
            self.num_classes,
            self.head_channels,
            how.normed_head,
            how.whole_channels,
            self.dropout,
            self.axis_name,
            **self.dtypes,
            name="decode_head",
        )
        return at_least_float32(head(features, train))

    @property
    def head_channels(self) -> int:
        """Channels of the head."""
        if isinstance(self.head_width, int):
            return self.head_width
        return self.head_width[0 if self.implementation == "mmseg" else 1]


def _patches(channels: int, stride: int, name: str, dtype: Any, param_dtype: Any) -> nn.Conv:
    """Returns the convolution that makes overlapping patches: windows of twice the stride, less one, padded by half."""
    pad = stride - 1
    return nn.Conv(
        channels,
        (2 * stride - 1,) * 2,
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_init=_he_fan_out,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


def _check(net: SegFormer) -> None:
    """Raises ConfigError for attributes that cannot work together."""
    for name in ("widths", "depths", "num_heads", "reductions"):
        value = getattr(net, name)
        if not whole(value, 1) or len(value) != 4:
            raise ConfigError(f"{name} must be 4 whole numbers, one for each stage, all at least 1, got {value!r}.")
    for i, (width, heads) in enumerate(zip(net.widths, net.num_heads, strict=True), 1):
        if width % heads:
            raise ConfigError(f"Stage {i} is {width} wide, which {heads} heads do not divide.")
    if not whole((net.mlp_ratio,), 1):
        raise ConfigError(f"mlp_ratio must be a whole number, at least 1, got {net.mlp_ratio!r}.")
    head = (net.head_width,) if isinstance(net.head_width, int) else net.head_width
    if not whole(head, 1) or len(head) not in (1, 2):
        raise ConfigError(
            f"head_width must be a number of channels, or two (mmseg's head, the others'), got {net.head_width!r}."
        )
    check_known(net, implementation=IMPLEMENTATIONS)
    check_classes(net)
    check_rate(net, "drop_path")
    check_rate(net, "dropout")
