"""Residual networks (He et al. 2016) as in torchvision, v1.5: a bottleneck's stride is in its 3x3 convolution.

Paddings are explicit and symmetric as in PyTorch (Flax's "SAME" pads strided convolutions on one
side more). BatchNorm: eps 1e-5, running statistics 0.9·old + 0.1·batch; the running variance is the
biased one (PyTorch's is unbiased). Shortcuts are projected by a 1x1 convolution (torchvision) or,
in the networks for CIFAR-10, take every second pixel and pad the new channels with zeros on both
sides, which has no parameters (option A of He et al. 2016, section 4.2). Initial values: He normal
by fan-out for convolutions, PyTorch's uniform 1/√fan-in for `fc`, zero bias.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import BatchNormBackbone, check_batch, check_classes, check_known
from drep_jax.models.pointwise import pointwise_conv

BLOCKS = ("basic", "bottleneck")
STEMS = ("imagenet", "cifar")
_EXPANSION = 4
_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

Images = Float[Array, "batch height width channels"]
Layer = Callable[..., Any]


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), two 3x3 convolutions."""

    width: int
    stride: int
    conv: Layer
    norm: Layer
    shortcut: str = "projection"

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """Returns maps with `width` channels, smaller by `stride`."""
        y = self.conv(self.width, kernel=3, stride=self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.width, kernel=3, name="conv2")(y)
        y = self.norm(name="bn2")(y)
        return nn.relu(y + SHORTCUT[self.shortcut](x, self.width, self.stride, self.conv, self.norm))


class BottleneckBlock(nn.Module):
    """1x1 to `width`, 3x3 with stride and dilation, 1x1 to 4·`width`, each with BatchNorm, plus the shortcut.

    With `stride_first` the stride is in the first convolution instead, as in the networks of Caffe.
    """

    width: int
    stride: int
    conv: Layer
    norm: Layer
    shortcut: str = "projection"
    dilation: int = 1
    stride_first: bool = False

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """Returns maps with 4·`width` channels, smaller by `stride`."""
        first, second = (self.stride, 1) if self.stride_first else (1, self.stride)
        y = self.conv(self.width, kernel=1, stride=first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.width, kernel=3, stride=second, dilation=self.dilation, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.conv(self.width * _EXPANSION, kernel=1, name="conv3")(y)
        y = self.norm(name="bn3")(y)
        return nn.relu(y + SHORTCUT[self.shortcut](x, self.width * _EXPANSION, self.stride, self.conv, self.norm))


def _project(x: Images, channels: int, stride: int, conv: Layer, norm: Layer) -> Images:
    """Returns `x`, projected by a 1x1 convolution where its shape differs from the block's output."""
    if stride == 1 and x.shape[-1] == channels:
        return x
    x = conv(channels, kernel=1, stride=stride, name="downsample_conv")(x)
    return norm(name="downsample_bn")(x)


def _pad(x: Images, channels: int, stride: int, conv: Layer, norm: Layer) -> Images:
    """Returns every `stride`-th pixel of `x`, with zero channels before and after its own."""
    del conv, norm
    missing = channels - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


SHORTCUT: dict[str, Callable[..., Images]] = {"projection": _project, "pad": _pad}


class ResNet(BatchNormBackbone, kw_only=True):
    """Residual network; takes images of any size.

    Attributes:
      stage_sizes: blocks in each stage; each stage after the first halves the maps and doubles the
        channels.
      block: "basic" or "bottleneck".
      num_classes: number of logits; 0 returns the pooled features.
      width: channels of the stem and of the first stage.
      stem: "imagenet" (7x7 convolution of stride 2, max-pool) or "cifar" (3x3 of stride 1, no
        pool).
      shortcut: "projection" (1x1 convolution) or "pad" (no parameters) where a block changes the
        shape.
      last_stride: of the last stage; 1 keeps its maps twice as large, as person re-identification
        does.
    """

    stage_sizes: Sequence[int]
    block: str
    num_classes: int
    width: int = 64
    stem: str = "imagenet"
    shortcut: str = "projection"
    last_stride: int = 2

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Float[Array, "batch outputs"]:
        """Classifies images.

        Args:
          x: normalized images.
          train: whether BatchNorm uses, and updates with, the statistics of this batch (make
            `batch_stats` mutable).

        Returns:
          Logits (batch, num_classes), float32 also when `dtype` is narrower; with `num_classes=0`
          features (batch, D).

        Raises:
          ConfigError: when `x` is not a batch of images.
        """
        check_batch(x, "A ResNet")
        conv, norm = makers(train, self.axis_name, **self.dtypes)
        make = block_maker(self.block, conv, norm, self.shortcut, self.remat)
        imagenet = self.stem == "imagenet"
        x = conv(self.width, kernel=7 if imagenet else 3, stride=2 if imagenet else 1, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for i, (size, stride) in enumerate(
            zip(self.stage_sizes, strides(self.stage_sizes, self.last_stride), strict=True)
        ):
            x = stage(x, f"layer{i + 1}", size, self.width * 2**i, stride, make)
        x = x.mean(axis=(1, 2))
        if self.num_classes:
            x = nn.Dense(self.num_classes, kernel_init=_torch_linear, **self.dtypes, name="fc")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def makers(train: bool, axis_name: str | None, dtype: Any, param_dtype: Any, eps: float = 1e-5) -> tuple[Layer, Layer]:
    """Returns what makes the convolutions and the batch norms of a network, for its blocks and its stem."""
    conv = functools.partial(_conv, dtype=dtype, param_dtype=param_dtype)
    options = {"epsilon": eps, "momentum": 0.9, "axis_name": axis_name, "dtype": dtype, "param_dtype": param_dtype}
    return conv, functools.partial(nn.BatchNorm, not train, **options)


def block_maker(block: str, conv: Layer, norm: Layer, shortcut: str, remat: bool) -> Layer:
    """Returns what makes a block of (width, stride, name)."""
    kind: Any = BasicBlock if block == "basic" else BottleneckBlock
    kind = nn.remat(kind) if remat else kind
    return functools.partial(kind, conv=conv, norm=norm, shortcut=shortcut)


def strides(stage_sizes: Sequence[int], last: int) -> list[int]:
    """Returns the stride of each stage: 1 for the first, `last` for the last of several, 2 for the others."""
    return [1, *[2] * (len(stage_sizes) - 2), last][: len(stage_sizes)]


def stage(x: Images, name: str, size: int, width: int, stride: int, make: Layer) -> Images:
    """Returns `x` after `size` blocks called NAME_0, NAME_1, …, of which the first has the stride."""
    for i in range(size):
        x = make(width, stride if i == 0 else 1, name=f"{name}_{i}")(x)
    return x


def _conv(
    channels: int, *, kernel: int, stride: int = 1, dilation: int = 1, name: str, dtype: Any, param_dtype: Any
) -> nn.Conv:
    """Returns a convolution without bias, padded by half its window on every side."""
    pad = kernel // 2 * dilation
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=dilation,
        use_bias=False,
        kernel_init=_he_fan_out,
        conv_general_dilated=pointwise_conv if kernel == 1 else None,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


def _check(net: ResNet) -> None:
    """Raises ConfigError for attributes that cannot work."""
    sizes = net.stage_sizes
    if not isinstance(sizes, Sequence) or not sizes or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ConfigError(f"stage_sizes must be the number of blocks of each stage, got {sizes!r}.")
    check_known(net, block=BLOCKS, stem=STEMS, shortcut=SHORTCUT)
    if not isinstance(net.width, int) or net.width < 1:
        raise ConfigError(f"width must be a number of channels, at least 1, got {net.width!r}.")
    if net.last_stride not in (1, 2):
        raise ConfigError(f"last_stride must be 1 or 2, got {net.last_stride!r}.")
    check_classes(net)
