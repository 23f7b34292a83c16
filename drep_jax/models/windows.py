"""What Swin Transformers of both versions share: attention in shifted windows on maps of any size, and the stages.

A map is padded with zeros on the right and below to whole windows, then shifted (Microsoft's
detectors and mmdetection; timm shifts first, which is another network wherever padding is needed).
Padded pixels are not masked out in either reference. Odd sides are padded before patches are merged,
and images to whole patches.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.activations import gelu
from drep_jax.models.backbone import Backbone, at_least_float32, check_batch, check_classes, whole
from drep_jax.models.transformer import pair

MASKED = -100.0
"""Added between pixels that are no neighbors. Finite as in the original, whose weights are trained with what leaks."""

layer_norm = functools.partial(nn.LayerNorm, 1e-5, use_fast_variance=False)  # exact also where single channels are huge
trunc_normal = nn.initializers.truncated_normal(0.02)

Maps = Float[Array, "batch height width channels"]


def fill(x: Maps, sides: Sequence[int]) -> Maps:
    """Returns maps padded with zeros on the right and below to multiples of (height, width)."""
    missing = [-length % side for length, side in zip(x.shape[1:3], sides, strict=True)]
    return jnp.pad(x, [(0, 0), *((0, more) for more in missing), (0, 0)]) if any(missing) else x


def partition(x: Maps, window: tuple[int, int], heads: int) -> Float[Array, "batch windows heads tokens dim"]:
    """Cuts maps into windows, and their channels into heads."""
    batch, height, width, channels = x.shape
    rows, columns = window
    x = x.reshape(batch, height // rows, rows, width // columns, columns, heads, channels // heads)
    return jnp.transpose(x, (0, 1, 3, 5, 2, 4, 6)).reshape(batch, -1, heads, rows * columns, channels // heads)


def merge(
    x: Float[Array, "batch windows heads tokens dim"], shape: Sequence[int], window: tuple[int, int]
) -> Float[Array, "batch height width channels"]:
    """Inverse of `partition`, to this shape."""
    batch, height, width, channels = shape
    (rows, columns), heads = window, x.shape[2]
    x = x.reshape(batch, height // rows, width // columns, heads, rows, columns, channels // heads)
    return jnp.transpose(x, (0, 1, 4, 2, 5, 3, 6)).reshape(batch, height, width, channels)


def shift_mask(size: Sequence[int], window: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """Returns (windows, tokens, tokens): `MASKED` where a shifted map's two pixels were apart before the shift, else 0."""
    lines = []  # of each axis: a number for each pixel, 1 for those that the shift wrapped around
    for length, side, moved in zip(size, window, shift, strict=True):
        lines.append((np.arange(length) >= length - moved).astype(int).reshape(-1, side))
    regions = 2 * lines[0][:, None, :, None] + lines[1][None, :, None, :]
    regions = regions.reshape(-1, window[0] * window[1])
    return np.where(regions[:, :, None] != regions[:, None, :], MASKED, 0.0)


def of_pairs(
    values: Float[Array, "rows columns heads"], window: tuple[int, int]
) -> Float[Array, "heads tokens tokens"]:
    """Returns what is added to the score of each two tokens of a window, from values by their offset.

    Args:
      values: of offsets (row − row', column − column'), which fall from the window's side − 1 to
        1 − its side along each axis.
      window: (height, width).
    """
    rows, columns = window
    # (heads, Δrow, Δcolumn) to (heads, Δcolumn, row, row') to (heads, row, row', column, column')
    bias = jnp.moveaxis(_toeplitz(jnp.transpose(values, (2, 1, 0)), rows), 1, 3)
    bias = _toeplitz(bias, columns)
    return jnp.swapaxes(bias, 2, 3).reshape(values.shape[-1], rows * columns, rows * columns)


def _toeplitz(values: Float[Array, "*batch offsets"], size: int) -> Float[Array, "*batch size size"]:
    """Returns m[…, i, j] = values[…, size − 1 − i + j] by reshapes: a gather's gradient would be a slow scatter."""
    lead = values.shape[:-1]
    rows = jnp.broadcast_to(values[..., None, :], (*lead, size, 2 * size - 1))
    rows = jnp.pad(rows, [(0, 0)] * (len(lead) + 1) + [(0, 1)])
    # Read with one number less a row, each row starts one further to the left than the one above.
    skewed = rows.reshape(*lead, -1)[..., : size * (2 * size - 1)].reshape(*lead, size, 2 * size - 1)
    return skewed[..., size - 1 :]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    hidden: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps each pixel by itself."""
        dense = functools.partial(nn.Dense, kernel_init=trunc_normal, dtype=self.dtype, param_dtype=self.param_dtype)
        return dense(x.shape[-1], name="fc2")(gelu(dense(self.hidden, name="fc1")(x)))


def side_by_side(x: Maps) -> Float[Array, "batch rows columns four"]:
    """Returns the four pixels of each 2×2 patch side by side, read column by column, as in the original."""
    x = fill(x, (2, 2))
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return jnp.transpose(x, (0, 1, 3, 4, 2, 5)).reshape(batch, height // 2, width // 2, 4 * channels)


class ShiftedWindows(Backbone, kw_only=True):
    """Base of both Swin Transformers.

    Attributes:
      width: channels of the first stage; each later stage has twice as many.
      depths: number of blocks of each stage.
      num_heads: attention heads of each stage.
      window_size: side of a window in pixels of the feature map, or (height, width). Along a side
        of a feature map that is no longer than the window, the window is that side and is not
        shifted. Maps that windows do not divide are padded.
      num_classes: number of logits; 0 returns the features that the head would read.
      image_size: (height, width) in pixels, any.
      patch_size: side of a patch in pixels, or (height, width).
      mlp_ratio: hidden dimension of the MLPs over their width.
      qkv_bias: whether query and value have biases (and key, in the first version).
      drop_path: rate at which a block's branch is left out for an image when `train`; it rises
        linearly from 0 in the first block to this in the last. Needs an rng named "dropout".
    """

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int | tuple[int, int]
    num_classes: int
    image_size: tuple[int, int]
    patch_size: int | tuple[int, int] = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Any:
        """Classifies images.

        Args:
          x: normalized images of `image_size`.
          train: whether blocks are dropped.

        Returns:
          Logits (batch, num_classes), or features (batch, width of the last stage) with
          `num_classes=0`; float32 also when `dtype` is narrower.

        Raises:
          ConfigError: when the images are not of `image_size`.
        """
        if x.ndim != 4 or tuple(x.shape[1:3]) != tuple(self.image_size):
            height, width = self.image_size
            raise ConfigError(
                f"This {type(self).__name__} takes images of shape (batch, {height}, {width}, channels), got "
                f"{tuple(x.shape)}. Resize the images, or set image_size."
            )
        features = layer_norm(**self.dtypes, name="norm")(self.stages(x, train)[-1]).mean(axis=(1, 2))
        if self.num_classes:
            features = nn.Dense(self.num_classes, kernel_init=trunc_normal, **self.dtypes, name="head")(features)
        return at_least_float32(features)

    def stages(self, x: Maps, train: bool) -> list[Maps]:
        """Returns the map of each stage, before patches are merged, in the scope of the caller."""
        check_batch(x, f"A {type(self).__name__}")
        patch = pair(self.patch_size)
        block, merging, embedding_init = self.kinds()
        make: Any = self.rematerialized(block)
        embedding = functools.partial(nn.Conv, kernel_init=embedding_init, name="embedding")
        x = embedding(self.width, patch, strides=patch, padding="VALID", **self.dtypes)(fill(x, patch))
        x = layer_norm(**self.dtypes, name="embedding_norm")(x)
        rates = iter(np.linspace(0.0, self.drop_path if train else 0.0, sum(self.depths)).tolist())
        maps = []
        for stage, depth in enumerate(self.depths):
            if stage:
                x = merging(**self.dtypes, name=f"stage{stage}_merge")(x)
            window, half = self.windows(x.shape[1:3])
            for i in range(depth):
                x = make(
                    num_heads=self.num_heads[stage],
                    mlp_dim=int(self.mlp_ratio * x.shape[-1]),
                    window=window,
                    shift=half if i % 2 else (0, 0),
                    qkv_bias=self.qkv_bias,
                    drop_path=next(rates),
                    **self.block_options(stage),
                    **self.dtypes,
                    name=f"stage{stage}_block{i}",
                )(x)
            maps.append(x)
        return maps

    def windows(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the window on a map of this size, and by how much every other block shifts it."""
        rows, columns = map(min, size, pair(self.window_size))
        down, right = (side // 2 if side < length else 0 for side, length in zip((rows, columns), size, strict=True))
        return (rows, columns), (down, right)

    def kinds(self) -> tuple[type[nn.Module], type[nn.Module], Any]:
        """Returns the class of its blocks, the class of what merges patches, and how the embedding is initialized."""
        raise NotImplementedError

    def block_options(self, stage: int) -> dict[str, Any]:
        """Returns what only the blocks of one version have."""
        del stage
        return {}


def _check(swin: ShiftedWindows) -> None:
    """Raises ConfigError for attributes that cannot work together."""
    for name in ("patch_size", "window_size", "image_size"):
        value = getattr(swin, name)
        sides = (value,) * 2 if name != "image_size" and isinstance(value, int) else value
        if not whole(sides, 1) or len(sides) != 2:
            raise ConfigError(f"{name} must be (height, width) in pixels, both at least 1, got {value!r}.")
    if not whole((swin.width,), 1):
        raise ConfigError(f"width must be a whole number, at least 1, got {swin.width!r}.")
    if not whole(swin.depths, 1) or not swin.depths:
        raise ConfigError(f"depths must be the number of blocks of each stage, all at least 1, got {swin.depths!r}.")
    stages = len(swin.depths)
    if not whole(swin.num_heads, 1) or len(swin.num_heads) != stages:
        raise ConfigError(f"num_heads must be {stages} whole numbers, one for each stage, got {swin.num_heads!r}.")
    check_classes(swin)
    if not 0 <= swin.drop_path < 1:
        raise ConfigError(f"drop_path must be in [0, 1), got {swin.drop_path}.")
    if not swin.mlp_ratio * swin.width >= 1:
        raise ConfigError(f"mlp_ratio must leave the MLPs at least one hidden unit, got {swin.mlp_ratio}.")
    for stage, heads in enumerate(swin.num_heads):
        if (swin.width << stage) % heads:
            raise ConfigError(f"Stage {stage} is {swin.width << stage} wide, which {heads} heads do not divide.")
