"""ESPNet (Mehta et al. 2018): an efficient spatial pyramid of dilated convolutions, for semantic segmentation.

An ESP unit reduces its input to n channels, reads that with five 3 × 3 convolutions of dilations 1, 2,
4, 8, 16, and adds each result to the next (hierarchical feature fusion), so that the largest window
leaves no grid. Averages of the image are concatenated at every level (input reinforcement).
A transposed convolution whose stride is its kernel writes every window by itself: it is a 1 × 1
convolution to 2 · 2 · channels, whose outputs are laid out as pixels. As such it can be denoised.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

DILATIONS = (1, 2, 4, 8, 16)


class PReLU(nn.Module):
    """max(x, 0) + slope · min(x, 0), one slope a channel."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Returns an array of the same shape."""
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        slope = jnp.broadcast_to(slope.astype(x.dtype), x.shape)
        return jnp.where(x >= 0, x, slope * x)


class Norm(nn.Module):
    """BatchNorm, then PReLU."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Returns an array of the same shape."""
        x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-3, name="bn")(x)
        return PReLU(name="act")(x)


def conv(channels: int, size: int, name: str, stride: int = 1, dilation: int = 1) -> nn.Conv:
    """Returns a convolution without bias, padded so that stride 1 keeps the size."""
    pad = (size - 1) // 2 * dilation
    return nn.Conv(
        channels,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=(dilation, dilation),
        use_bias=False,
        name=name,
    )


class Pyramid(nn.Module):
    """An ESP unit.

    Attributes:
      channels: of its output.
      stride: 2 halves the maps.
      residual: whether the input is added.
    """

    channels: int
    stride: int = 1
    residual: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Returns maps with `channels` channels."""
        n = self.channels // len(DILATIONS)
        reduced = conv(n, 3 if self.stride == 2 else 1, "c1", stride=self.stride)(x)
        first, *others = (
            conv(n if d > 1 else self.channels - (len(DILATIONS) - 1) * n, 3, f"d{d}", dilation=d)(reduced)
            for d in DILATIONS
        )
        maps = [first, others[0]]
        for other in others[1:]:
            maps.append(maps[-1] + other)
        y = jnp.concatenate(maps, axis=-1)
        return Norm(name="norm")(x + y if self.residual else y, train)


def average(x: Any) -> Any:
    """Halves an image by averages of 3 × 3 pixels."""
    return nn.avg_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def enlarge(x: Any, name: str) -> Any:
    """Doubles maps: a transposed convolution of kernel and stride 2, as a 1 × 1 convolution."""
    batch, height, width, channels = x.shape
    x = conv(4 * channels, 1, name)(x).reshape(batch, height, width, 2, 2, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels)


def cut(x: Any, like: Any) -> Any:
    """Cuts maps that were halved and doubled back from an odd size to the size of others."""
    return x[:, : like.shape[1], : like.shape[2]]


class ESPNet(nn.Module):
    """ESPNet of any size of images.

    Attributes:
      num_classes: outputs of a pixel; 12 in the published network for CamVid, of which the last
        stands for unlabeled pixels.
      p: ESP units of level 2.
      q: ESP units of level 3.
      bgr: whether the network expects blue, green, red. The images are red, green, blue.
    """

    num_classes: int
    p: int = 2
    q: int = 8
    bgr: bool = True

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Returns logits (batch, height, width, num_classes)."""
        image = x[..., ::-1] if self.bgr else x
        half = average(image)
        quarter = average(half)

        y = conv(16, 3, "level1", stride=2)(image)
        y = Norm(name="level1_norm")(y, train)
        level1 = Norm(name="b1")(jnp.concatenate([y, half], axis=-1), train)

        down = y = Pyramid(64, stride=2, name="level2_down")(level1, train)
        for i in range(self.p):
            y = Pyramid(64, residual=True, name=f"level2_{i}")(y, train)
        level2 = Norm(name="b2")(jnp.concatenate([y, down, quarter], axis=-1), train)

        down = y = Pyramid(128, stride=2, name="level3_down")(level2, train)
        for i in range(self.q):
            y = Pyramid(128, residual=True, name=f"level3_{i}")(y, train)
        level3 = Norm(name="b3")(jnp.concatenate([down, y], axis=-1), train)

        y = conv(self.num_classes, 1, "level3_classes")(level3)
        y = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-3, name="level3_bn")(y)
        fine = conv(self.num_classes, 1, "level2_classes")(level2)
        y = jnp.concatenate([fine, cut(enlarge(y, "up3"), fine)], axis=-1)
        y = Pyramid(self.num_classes, name="combine")(Norm(name="combine_norm")(y, train), train)
        y = cut(Norm(name="up2_norm")(enlarge(y, "up2"), train), level1)
        y = conv(self.num_classes, 3, "last")(jnp.concatenate([y, level1], axis=-1))
        y = enlarge(Norm(name="last_norm")(y, train), "classes")
        return cut(y, image)
