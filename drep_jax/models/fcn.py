"""Fully convolutional networks (Long, Shelhamer, Darrell 2015) on a ResNet of output stride 8: images in, maps of logits out.

The third and the fourth stage keep the size of the second and dilate their 3x3 convolutions
instead: the first block of a dilated stage by half of what the others do (1, 2, 2, … and 2, 4, 4,
…). There are two public networks under this name, whose weights fit each other nowhere:

- mmsegmentation's "FCN R50-D8": three 3x3 convolutions as stem (ResNetV1c); head of two 3x3
  convolutions on the last stage, a third one on [last stage, second convolution], 1x1 classifier,
  dropout of whole channels.
- torchvision's `fcn_resnet50`: 7x7 convolution as stem; head of one 3x3 convolution and the 1x1
  classifier, dropout of single numbers.

In both a smaller head on the third stage helps in training. Paddings, batch norms and initial
values are those of `resnet`; classifiers begin with standard deviation 0.01.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import (
    BatchNormBackbone,
    at_least_float32,
    check_batch,
    check_classes,
    check_known,
    check_rate,
    whole,
)
from drep_jax.models.resnet import Images, Layer, block_maker, makers

IMPLEMENTATIONS = ("mmseg", "torchvision")
DILATIONS = ((1, 1), (1, 1), (1, 2), (2, 4))
"""Of each stage: that of its first block, and that of the others."""
STRIDES = (1, 2, 1, 1)

Logits = Float[Array, "batch rows columns classes"]


class FCNHead(nn.Module):
    """Convolutions, dropout, and a classifier of each pixel.

    Attributes:
      num_classes: number of logits; 0 returns what the classifier would read.
      convs: number of 3x3 convolutions, each with BatchNorm and ReLU, to a quarter of the channels.
      concat: whether one more reads the input of the first and the output of the last side by side.
      dropout: rate.
      whole_channels: whether dropout leaves out whole channels instead of single numbers.
      conv, norm: make convolutions and batch norms.
      dtype, param_dtype: of the classifier.
    """

    num_classes: int
    convs: int
    concat: bool
    dropout: float
    whole_channels: bool
    conv: Layer
    norm: Layer
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Logits:
        """Returns logits of the maps' size; dropout acts when `train`."""
        width, y = x.shape[-1] // 4, x
        for i in range(1, self.convs + 1):
            y = nn.relu(self.norm(name=f"bn{i}")(self.conv(width, kernel=3, name=f"conv{i}")(y)))
        if self.concat:
            both = jnp.concatenate([x, y], axis=-1)
            y = nn.relu(self.norm(name="bn_cat")(self.conv(width, kernel=3, name="conv_cat")(both)))
        y = nn.Dropout(self.dropout, (1, 2) if self.whole_channels else (), deterministic=not train)(y)
        if not self.num_classes:
            return y
        return nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="classifier",
        )(y)


class FCN(BatchNormBackbone, kw_only=True):
    """Fully convolutional network; takes images of any size.

    Attributes:
      stage_sizes: bottleneck blocks in each of the four stages.
      num_classes: number of logits of a pixel; 0 returns the maps that the classifier would read.
      width: channels of the stem, an even number; the last stage has 32 times as many.
      implementation: "mmseg" or "torchvision", see above.
      auxiliary: whether there is the head on the third stage (never with `num_classes=0`).
      dropout: rate in the heads when `train`. Needs an rng named "dropout".
    """

    stage_sizes: Sequence[int]
    num_classes: int
    width: int = 64
    implementation: str = "mmseg"
    auxiliary: bool = True
    dropout: float = 0.1

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Logits | tuple[Logits, Logits]:
        """Classifies the pixels of images.

        Args:
          x: normalized images.
          train: whether dropout acts, and BatchNorm uses, and updates with, the statistics of this
            batch (make `batch_stats` mutable).

        Returns:
          Logits (batch, ⌈height/8⌉, ⌈width/8⌉, num_classes), float32 also when `dtype` is narrower;
          when `train`, and with an auxiliary head, (those, those of the auxiliary head).

        Raises:
          ConfigError: when `x` is not a batch of images.
        """
        check_batch(x, "An FCN")
        conv, norm = makers(train, self.axis_name, **self.dtypes)
        make = block_maker("bottleneck", conv, norm, "projection", self.remat)
        x = nn.max_pool(self._stem(x, conv, norm), (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        features = []
        for i, (size, stride, dilations) in enumerate(zip(self.stage_sizes, STRIDES, DILATIONS, strict=True)):
            for j in range(size):
                first = j == 0
                name = f"layer{i + 1}_{j}"
                x = make(self.width * 2**i, stride if first else 1, dilation=dilations[not first], name=name)(x)
            features.append(x)
        mmseg = self.implementation == "mmseg"
        head = functools.partial(
            FCNHead, self.num_classes, dropout=self.dropout, whole_channels=mmseg, conv=conv, norm=norm, **self.dtypes
        )
        logits = at_least_float32(head(convs=2 if mmseg else 1, concat=mmseg, name="decode_head")(features[3], train))
        if not (self.auxiliary and self.num_classes and (train or self.is_initializing())):
            return logits
        auxiliary = at_least_float32(head(convs=1, concat=False, name="auxiliary_head")(features[2], train))
        return (logits, auxiliary) if train else logits

    def _stem(self, x: Images, conv: Layer, norm: Layer) -> Images:
        """Returns maps of half of the images' height and width."""
        if self.implementation == "torchvision":
            return nn.relu(norm(name="bn1")(conv(self.width, kernel=7, stride=2, name="conv1")(x)))
        for i, (channels, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1):
            x = nn.relu(norm(name=f"stem_bn{i}")(conv(channels, kernel=3, stride=stride, name=f"stem_conv{i}")(x)))
        return x


def _check(net: FCN) -> None:
    """Raises ConfigError for attributes that cannot work."""
    if not whole(net.stage_sizes, 1) or len(net.stage_sizes) != len(STRIDES):
        raise ConfigError(f"stage_sizes must be the number of blocks of each of 4 stages, got {net.stage_sizes!r}.")
    if not whole((net.width,), 2) or net.width % 2:
        raise ConfigError(f"width must be an even number of channels (the stem starts with half), got {net.width!r}.")
    check_known(net, implementation=IMPLEMENTATIONS)
    check_classes(net)
    check_rate(net, "dropout")
