"""Second stage of R-CNNs: classes and boxes of proposals, masks of objects, each read by RoIAlign."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.models.pointwise import whole_window_conv

Regions = Float[Array, "batch n rows columns channels"]

_small = nn.initializers.normal(0.01)


class BoxHead(nn.Module):
    """Two dense layers with ReLU, then logits of the classes and deltas of each.

    The first reads all cells of a region: it is a convolution by a window of the whole region, so
    that a denoiser can work on its channels.

    Attributes:
      logits: classes, the background counted.
      boxes: how many boxes are regressed, one a class.
      width: of the two layers.
    """

    logits: int
    boxes: int
    width: int = 1024
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Regions) -> tuple[Float[Array, "batch n logits"], Float[Array, "batch n boxes 4"]]:
        """Returns logits and deltas of every region."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        xavier = nn.initializers.xavier_uniform()
        options: dict[str, Any] = {"padding": "VALID", "conv_general_dilated": whole_window_conv, "kernel_init": xavier}
        x = nn.relu(nn.Conv(self.width, x.shape[2:4], **options, **dtypes, name="fc1")(x))
        x = x.reshape(*x.shape[:2], self.width)
        x = nn.relu(nn.Dense(self.width, kernel_init=xavier, **dtypes, name="fc2")(x))
        logits = nn.Dense(self.logits, kernel_init=_small, **dtypes, name="classes")(x)
        small = nn.initializers.normal(0.001)
        deltas = nn.Dense(4 * self.boxes, kernel_init=small, **dtypes, name="deltas")(x)
        return logits, deltas.reshape(*x.shape[:2], self.boxes, 4)


class MaskHead(nn.Module):
    """Four 3×3 convolutions with ReLU, twice the resolution, and logits of the pixels for each class.

    The transposed convolution by 2×2 of stride 2 is a dense layer to four pixels. Its bias, the
    same for all four, stands by itself.

    Attributes:
      classes: of the masks.
      convs: number of 3×3 convolutions.
    """

    classes: int
    convs: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Regions) -> Float[Array, "batch n doubled doubled classes"]:
        """Returns logits of twice the regions' height and width."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, he = x.shape[-1], nn.initializers.he_normal()
        for i in range(1, self.convs + 1):
            x = nn.relu(nn.Conv(width, (3, 3), padding=1, kernel_init=he, **dtypes, name=f"conv{i}")(x))
        *lead, rows, columns, _ = x.shape
        x = nn.Dense(4 * width, use_bias=False, kernel_init=he, **dtypes, name="upsample")(x)
        x = x.reshape(*lead, rows, columns, 2, 2, width)
        x = jnp.moveaxis(x, -3, -4).reshape(*lead, 2 * rows, 2 * columns, width)
        bias = self.param("upsample_bias", nn.initializers.zeros, (width,), self.param_dtype)
        x = nn.relu(x + jnp.broadcast_to(bias.astype(x.dtype), x.shape))
        return nn.Dense(self.classes, kernel_init=_small, **dtypes, name="logits")(x)
