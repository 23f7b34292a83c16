"""Feature pyramid network (Lin et al. 2017), as in mmdetection and torchvision.

A 1×1 convolution on each input, the sum with the next coarser map upsampled by nearest neighbor,
then a 3×3 convolution; no activation. The input maps come finest first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError, did_you_mean

EXTRA = ("pool", "convs_on_output", "convs_on_input", "none")
Maps = Float[Array, "batch height width channels"]


def upsample_nearest(x: Maps, shape: tuple[int, ...]) -> Maps:
    """Returns maps of another size, cell i showing cell ⌊i·old/new⌋, as PyTorch's "nearest"."""
    for axis, new in zip((1, 2), shape, strict=True):
        old = x.shape[axis]
        if new % old == 0:
            x = jnp.repeat(x, new // old, axis=axis)
        elif new != old:
            x = jnp.take(x, jnp.arange(new) * old // new, axis=axis)
    return x


class FPN(nn.Module):
    """Pyramid of maps with the same number of channels.

    Attributes:
      width: channels of every output.
      outputs: number of levels; those beyond the inputs are made as `extra` says.
      extra: "pool": every second cell of the last output (R-CNNs' P6). "convs_on_output": 3×3
        convolutions of stride 2, the first on the last output (ATSS, CenterNet's P6 and P7).
        "convs_on_input": the same, the first on the last input map (RetinaNet, torchvision's
        `LastLevelP6P7` on C5). "none": no further level.
      relu_before_extra: a ReLU before every such convolution but the first.
      norm: makes the norm behind every convolution, called with `name`; the convolutions then have
        no bias (torchvision's second generation). None for no norm.
      dtype, param_dtype: of computation and parameters.
    """

    width: int = 256
    outputs: int = 5
    extra: str = "pool"
    relu_before_extra: bool = False
    norm: Callable[..., nn.Module] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Maps]) -> list[Maps]:
        """Returns the pyramid, finest first.

        Raises:
          ConfigError: for an unknown way to further levels, or fewer outputs than inputs.
        """
        if self.extra not in EXTRA:
            raise ConfigError(f'Unknown further levels "{self.extra}".{did_you_mean(self.extra, EXTRA)}')
        if self.outputs < len(maps) or (self.extra == "none" and self.outputs > len(maps)):
            raise ConfigError(f"A pyramid of {self.outputs} levels cannot be made of {len(maps)} maps.")
        lateral = [self._conv(1, f"lateral_{level}")(x) for level, x in enumerate(maps)]
        for level in range(len(maps) - 1, 0, -1):
            lateral[level - 1] += upsample_nearest(lateral[level], lateral[level - 1].shape[1:3])
        pyramid = [self._conv(3, f"output_{level}")(x) for level, x in enumerate(lateral)]
        x = maps[-1] if self.extra == "convs_on_input" else pyramid[-1]
        for level in range(len(maps), self.outputs):
            if self.extra == "pool":
                pyramid.append(pyramid[-1][:, ::2, ::2])
                continue
            if level > len(maps):
                x = nn.relu(pyramid[-1]) if self.relu_before_extra else pyramid[-1]
            pyramid.append(self._conv(3, f"output_{level}", stride=2)(x))
        return pyramid

    def _conv(self, kernel: int, name: str, stride: int = 1) -> Callable[[Maps], Maps]:
        conv = nn.Conv(
            self.width,
            (kernel, kernel),
            strides=(stride, stride),
            padding=((kernel // 2, kernel // 2),) * 2,
            use_bias=self.norm is None,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name=name,
        )
        if self.norm is None:
            return conv
        norm = self.norm(name=f"{name}_norm")
        return lambda x: norm(conv(x))
