"""MCUNet (Lin et al. 2020): inverted residuals whose kernels, widths and depths were found by a search.

The architecture is the JSON file that the authors publish beside the weights
(https://github.com/mit-han-lab/mcunet), with the fields that its blocks have there. A block expands
its input by a 1x1 convolution (none where the ratio is 1), filters every channel by itself, and
projects to its output by a 1x1 convolution, each with BatchNorm and the first two with ReLU6 (or
ReLU). Where the file says so the input is added. Paddings are symmetric, half a kernel, as in
PyTorch.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.files import expanded
from drep_jax.models.backbone import BatchNormBackbone, check_batch, check_classes
from drep_jax.models.depthwise import depthwise_conv
from drep_jax.models.pointwise import pointwise_conv

Images = Float[Array, "batch height width channels"]

ACTIVATIONS = {"relu6": nn.relu6, "relu": nn.relu, None: lambda x: x}
_FIXED = {
    "use_se": False,
    "dilation": 1,
    "groups": 1,
    "has_shuffle": False,
    "use_bn": True,
    "bias": False,
    "ops_order": "weight_bn_act",
    "dropout_rate": 0,
    "ws_eps": None,
}
"""Fields of the file ↦ the only value that is built here."""
_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with BatchNorm and activation: its output channels, kernel and stride."""

    channels: int
    kernel: int
    stride: int
    activation: str | None


@dataclasses.dataclass(frozen=True)
class Block:
    """An inverted residual: `expanded` channels inside, `channels` outside; `shortcut`: whether its input is added."""

    channels: int
    expanded: int
    expands: bool
    kernel: int
    stride: int
    activation: str | None
    shortcut: bool


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the file says: first convolution, blocks, a 1x1 convolution before pooling (or None), ε of BatchNorm."""

    first: Conv
    blocks: tuple[Block, ...]
    last: Conv | None
    epsilon: float
    momentum: float


def read_architecture(path: str) -> Architecture:
    """Returns the architecture that a JSON file of the authors describes.

    Raises:
      ConfigError: if there is no such file, or it describes what is not built here; names the field.
    """
    try:
        with open(expanded(path), encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, ValueError) as error:
        raise ConfigError(f"The architecture {path} cannot be read: {error}.") from error
    return _parsed(text, path)


@functools.lru_cache(maxsize=8)
def _parsed(text: str, path: str) -> Architecture:
    """Returns the architecture that the text of that file describes; modules ask for it at every call."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"The architecture {path} cannot be read: {error}.") from error
    try:
        norm = fields["bn"]
        _check_fixed(norm, path, "bn")
        last = fields.get("feature_mix_layer")
        return Architecture(
            _conv_of(fields["first_conv"], path, "first_conv"),
            tuple(_block_of(block, path, f"blocks[{i}]") for i, block in enumerate(fields["blocks"])),
            None if last is None else _conv_of(last, path, "feature_mix_layer"),
            float(norm["eps"]),
            1.0 - float(norm["momentum"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no architecture of an MCUNet: expected bn, first_conv, blocks and their fields as in the authors' "
            f"files, got {type(error).__name__}: {error}."
        ) from error


def _conv_of(fields: Mapping[str, Any], path: str, where: str) -> Conv:
    _check_fixed(fields, path, where)
    return Conv(
        _count(fields["out_channels"]),
        _count(fields["kernel_size"]),
        _count(fields["stride"]),
        _activation(fields, path, where),
    )


def _block_of(fields: Mapping[str, Any], path: str, where: str) -> Block:
    inner, shortcut = fields["mobile_inverted_conv"], fields["shortcut"]
    if inner["name"] != "MBInvertedConvLayer":
        raise ConfigError(f'{path}: {where} is a "{inner["name"]}", and only MBInvertedConvLayer is built here.')
    if shortcut is not None and shortcut["name"] != "IdentityLayer":
        raise ConfigError(
            f'{path}: the shortcut of {where} is a "{shortcut["name"]}", and only IdentityLayer is built.'
        )
    _check_fixed(inner, path, where)
    entering, ratio = _count(inner["in_channels"]), inner["expand_ratio"]
    return Block(
        channels=_count(inner["out_channels"]),
        expanded=_count(inner["mid_channels"] or round(entering * ratio)),
        expands=ratio != 1,
        kernel=_count(inner["kernel_size"]),
        stride=_count(inner["stride"]),
        activation=_activation(inner, path, where),
        shortcut=shortcut is not None,
    )


def _check_fixed(fields: Mapping[str, Any], path: str, where: str) -> None:
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise ConfigError(f"{path}: {where} has {name}={fields[name]!r}, and only {value!r} is built here.")


def _activation(fields: Mapping[str, Any], path: str, where: str) -> str | None:
    name = fields["act_func"]
    if name not in ACTIVATIONS:
        raise ConfigError(f"{path}: {where} has act_func={name!r}, and only relu6, relu and null are built here.")
    return name


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} instead of a whole number from 1")
    return value


class InvertedResidual(nn.Module):
    """project(act(depthwise(act(expand(x))))), plus x if the block has a shortcut."""

    block: Block
    norm: Any
    dtypes: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """Returns maps with the block's channels, smaller by its stride."""
        block, layer = self.block, functools.partial(conv_norm, norm=self.norm, dtypes=self.dtypes)
        activation = ACTIVATIONS[block.activation]
        y = activation(layer(x, "expand", block.expanded)) if block.expands else x
        y = activation(layer(y, "depthwise", block.expanded, block.kernel, block.stride, groups=block.expanded))
        y = layer(y, "project", block.channels)
        return x + y if block.shortcut else y


class MCUNet(BatchNormBackbone, kw_only=True):
    """Inverted-residual network read from an architecture file; takes images of any size.

    Attributes:
      architecture: path of the authors' JSON file.
      num_classes: number of logits; 0 returns the pooled features.
    """

    architecture: str
    num_classes: int

    def check(self) -> None:
        """Raises ConfigError for an architecture that cannot be built."""
        check_classes(self)
        read_architecture(self.architecture)

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
        check_batch(x, "An MCUNet")
        net = read_architecture(self.architecture)
        norm = functools.partial(
            nn.BatchNorm,
            not train,
            epsilon=net.epsilon,
            momentum=net.momentum,
            axis_name=self.axis_name,
            **self.dtypes,
        )
        layer = functools.partial(conv_norm, norm=norm, dtypes=self.dtypes)
        block_kind = self.rematerialized(InvertedResidual)
        x = ACTIVATIONS[net.first.activation](layer(x, "first", net.first.channels, net.first.kernel, net.first.stride))
        for i, block in enumerate(net.blocks):
            x = block_kind(block, norm, self.dtypes, name=f"block_{i}")(x)
        if net.last is not None:
            x = ACTIVATIONS[net.last.activation](layer(x, "last", net.last.channels, net.last.kernel, net.last.stride))
        x = x.mean(axis=(1, 2))
        if self.num_classes:
            x = nn.Dense(self.num_classes, kernel_init=_torch_linear, **self.dtypes, name="classifier")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def conv_norm(
    x: Images,
    name: str,
    channels: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    norm: Any,
    dtypes: Mapping[str, Any],
    groups: int = 1,
) -> Images:
    """Returns maps after a convolution without bias, NAME_conv, and its BatchNorm, NAME_bn."""
    pad = kernel // 2
    operator = pointwise_conv if kernel == 1 and groups == 1 else depthwise_conv if groups > 1 else None
    x = nn.Conv(
        channels,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=False,
        kernel_init=_he_fan_out,
        conv_general_dilated=operator,
        name=f"{name}_conv",
        **dtypes,
    )(x)
    return norm(name=f"{name}_bn")(x)
