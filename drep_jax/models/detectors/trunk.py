"""ResNet as detectors use it: the maps of its four stages, and batch norms that always take their stored statistics."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.models.resnet import BottleneckBlock, makers, stage

STYLES = ("pytorch", "caffe")

Maps = Float[Array, "batch height width channels"]


class ResNetTrunk(nn.Module):
    """The stem and the stages of a ResNet of bottlenecks, without its classifier.

    Attributes:
      stage_sizes: blocks in each of the four stages.
      width: channels of the stem; the stages give 4, 8, 16 and 32 times as many.
      style: "pytorch": the stride of a stage is in the 3x3 convolution of its first block. "caffe":
        in the first 1x1 convolution. The shortcut has it in both.
      norm_eps: of the batch norms, which take their stored statistics in training, too.
      remat: recompute each block in the backward pass.
      dtype, param_dtype: of computation and parameters.
    """

    stage_sizes: Sequence[int]
    width: int = 64
    style: str = "pytorch"
    norm_eps: float = 1e-5
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> list[Maps]:
        """Returns C2, C3, C4, C5, of strides 4, 8, 16 and 32; sides are rounded up."""
        conv, norm = makers(False, None, self.dtype, self.param_dtype, self.norm_eps)
        kind: Any = nn.remat(BottleneckBlock) if self.remat else BottleneckBlock
        make = functools.partial(kind, conv=conv, norm=norm, stride_first=self.style == "caffe")
        x = nn.relu(norm(name="bn1")(conv(self.width, kernel=7, stride=2, name="conv1")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        maps = []
        for i, size in enumerate(self.stage_sizes):
            x = stage(x, f"layer{i + 1}", size, self.width * 2**i, 2 if i else 1, make)
            maps.append(x)
        return maps
