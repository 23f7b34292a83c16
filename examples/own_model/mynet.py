"""A small network that the registry does not know: separable convolutions with residuals, as in MobileNet."""

from typing import Any

import flax.linen as nn

from drep_jax.models import depthwise_conv


class Block(nn.Module):
    """x + bn2(pointwise(relu(bn1(depthwise(x)))))."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Returns maps of the same shape."""
        channels = x.shape[-1]
        norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="bn1")
        depthwise = nn.Conv(
            channels,
            (3, 3),
            padding=((1, 1), (1, 1)),
            feature_group_count=channels,
            use_bias=False,
            conv_general_dilated=depthwise_conv,  # computes the same as nn.Conv, many times faster on a CPU
            name="depthwise",
        )
        y = nn.relu(norm(depthwise(x)))
        y = nn.Conv(channels, (1, 1), use_bias=False, name="pointwise")(y)
        return x + nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="bn2")(y)


class MyNet(nn.Module):
    """A stem, some blocks, the mean over the pixels, and a head.

    Attributes:
      num_classes: number of logits; the project passes 0 where it wants features.
      width: channels.
      depth: number of blocks.
    """

    num_classes: int
    width: int = 16
    depth: int = 2

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Returns logits (batch, num_classes), or features (batch, width)."""
        x = nn.Conv(self.width, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="stem_bn")(x))
        for i in range(self.depth):
            x = Block(name=f"block{i}")(x, train)
        x = nn.relu(x).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="head")(x) if self.num_classes else x
