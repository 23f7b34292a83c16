"""TransReID (He et al. 2021) and TransReID-SSL (Luo et al. 2021): ViTs whose class token is the feature of a person or vehicle.

Side information: every token gets λ·S[i], S one learned row for each camera and viewpoint, i the
image's. Jigsaw branch: the patches after the last block but one are shifted, shuffled and dealt
into four groups; a copy of the last block reads each group with the class token, another reads all
of them. Each of these features has a BNNeck of its own.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import BatchNormBackbone, at_least_float32, check_known
from drep_jax.models.neck import FEATURES, BNNeck
from drep_jax.models.transformer import (
    TRUNC_NORMAL,
    check_sizes,
    encode,
    grid_of,
    layer_norm,
    pair,
    patch_embedding,
)

PARTS = 4
"""Groups of patches in the jigsaw branch."""
STEMS = ("patch", "ics")
_STEM_WIDTH = 64

Features = tuple[Float[Array, "batch width"], ...]


class Ibn(nn.Module):
    """IBN-a (Pan et al. 2018): instance norm of the first half of the channels, batch norm of the others."""

    axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch height width channels"]:
        """Normalizes each channel."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        half = x.shape[-1] // 2
        instance = nn.InstanceNorm(1e-5, **dtypes, use_fast_variance=False, name="instance")(x[..., :half])
        return jnp.concatenate(
            [instance, _batch_norm("batch", train, self.axis_name, **dtypes)(x[..., half:])], axis=-1
        )


def _batch_norm(name: str, train: bool, axis_name: str | None, dtype: Any, param_dtype: Any) -> nn.BatchNorm:
    return nn.BatchNorm(
        not train, epsilon=1e-5, momentum=0.9, axis_name=axis_name, dtype=dtype, param_dtype=param_dtype, name=name
    )


class TransReID(BatchNormBackbone, kw_only=True):
    """TransReID, or with `jigsaw=False` and `side_info=0` its baseline; TransReID-SSL's networks are such baselines.

    The tree is that of a ViT (`embedding`, `cls`, `pos_embedding`, `encoderblock_0`, …, `norm`) and
    `sie`, `neck`. With the jigsaw branch `global_block`, `global_norm`, `local_block` and
    `local_norm` stand for the last block and `norm`, and `neck_1` … `neck_4` are added.

    Attributes:
      patch_size: side of a patch in pixels, or (height, width).
      width: token dimension, a multiple of `num_heads`.
      depth: number of blocks, the last of which the jigsaw branch has twice.
      num_heads: attention heads.
      mlp_dim: hidden dimension of the MLPs.
      num_classes: training identities; 0 for no classifiers.
      image_size: (height, width) in pixels.
      patch_stride: distance of the patches, one number or (height, width); None for the patch's own
        size.
      stem: "patch", or "ics": three convolutions with IBN before patches of half the size
        (TransReID-SSL).
      jigsaw: whether there is the jigsaw branch.
      jigsaw_shift: the first patch, counted from 1, that it begins with. 5 for persons, 8 for
        vehicles in the paper's configurations; 1 with one group leaves the patches in their order.
      jigsaw_groups: groups that are interleaved by the shuffle.
      side_info: number of side-information embeddings (cameras, viewpoints, or cameras times
        viewpoints); with any the images have a fourth channel, a constant plane that holds the
        index of the image's embedding. An index that has none makes the feature NaN.
      sie_coefficient: λ, what the embeddings are multiplied by.
      feature: whether what is ranked is the feature "before" or "after" the batch norm of
        BNNeck.
      drop_path: rate at which the last block's branches are left out in training, rising linearly
        from 0 at the first block; needs an rng named "dropout".
      dtype: see `Backbone`. BNNeck computes in float32 at least.
    """

    patch_size: int | tuple[int, int]
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    image_size: tuple[int, int]
    patch_stride: int | tuple[int, int] | None = None
    stem: str = "patch"
    jigsaw: bool = False
    jigsaw_shift: int = 5
    jigsaw_groups: int = 2
    side_info: int = 0
    sie_coefficient: float = 3.0
    feature: str = "before"
    drop_path: float = 0.1

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches along (height, width)."""
        patch = pair(self.patch_size)
        return grid_of(self.image_size, patch, patch if self.patch_stride is None else pair(self.patch_stride))

    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Returns the feature that is ranked.

        Args:
          x: normalized images of `image_size`; with `side_info` the fourth channel holds the index.
          train: whether drop path is on and batch norms use, and update with, the statistics of
            this batch.

        Returns:
          Features (batch, width), with the jigsaw branch (batch, 5·width): the global one, then the
          four local ones, each divided by four. float32 also when `dtype` is narrower.

        Raises:
          ConfigError: when the images are not of `image_size`, or have not the channels expected.
        """
        before, after, _ = self._branches(x, train, classify=False)
        whole, *parts = before if self.feature == "before" else after
        return jnp.concatenate([whole, *(part / PARTS for part in parts)], axis=-1)

    def outputs(self, x: Float[Array, "batch height width channels"], train: bool = False) -> dict[str, Features]:
        """Returns what the losses of training read, the global part first.

        Args:
          x: as for `__call__`.
          train: as for `__call__`.

        Returns:
          "features": before the batch norms, each (batch, width); "logits": of each, (batch,
          num_classes), or none.
        """
        features, _, logits = self._branches(x, train, classify=True)
        return {"features": features, "logits": logits}

    @nn.compact
    def _branches(
        self, x: Float[Array, "batch height width channels"], train: bool, classify: bool
    ) -> tuple[Features, Features, Features]:
        """Returns features before and after the batch norms, and logits where asked for; the global ones first."""
        self._check_images(x)
        x = self._embed(x, train)
        options = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        rates = jnp.linspace(0, self.drop_path, self.depth) if train and self.drop_path else None
        run = functools.partial(encode, options=options, remat=self.remat)
        norm = functools.partial(layer_norm, eps=1e-6, dtype=self.dtype, param_dtype=self.param_dtype)
        x = run(x, [f"encoderblock_{i}" for i in range(self.depth - self.jigsaw)], rates)
        if self.jigsaw:
            last = None if rates is None else rates[-1:]
            whole = norm("global_norm")(run(x, ["global_block"], last)[:, 0])
            # One call for all groups of an image, next to one another: what reads them sees the
            # images in their order.
            groups = run(self._groups(x), ["local_block"], last)[:, 0]
            local = norm("local_norm")(groups).reshape(-1, PARTS, self.width)
            before = [whole, *(local[:, i] for i in range(PARTS))]
        else:
            before = [norm("norm")(x[:, 0])]
        before = [at_least_float32(feature) for feature in before]
        after, logits = [], []
        for i, feature in enumerate(before):
            neck = BNNeck(self.num_classes, self.axis_name, None, self.param_dtype, name=f"neck_{i}" if i else "neck")
            normed, scores = neck(feature, train, classify)
            after.append(normed)
            logits += [] if scores is None else [scores]
        return tuple(before), tuple(after), tuple(logits)

    def _embed(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch tokens dim"]:
        """Returns the class token and the patches row by row, with positions and side information added."""
        picture, patch = x[..., :3], pair(self.patch_size)
        stride = patch if self.patch_stride is None else pair(self.patch_stride)
        if self.stem == "ics":
            picture = self._stem(picture, train)
            patch = stride = (patch[0] // 2, patch[1] // 2)
        tokens = patch_embedding(self.width, patch, stride, self.dtype, self.param_dtype)(picture)
        tokens = tokens.reshape(len(x), -1, self.width)
        cls = self.param("cls", TRUNC_NORMAL, (1, 1, self.width), self.param_dtype)
        cls = jnp.broadcast_to(cls.astype(tokens.dtype), (len(x), 1, self.width))
        tokens = jnp.concatenate([cls, tokens], axis=1)
        shape = (1, tokens.shape[1], self.width)
        tokens += self.param("pos_embedding", TRUNC_NORMAL, shape, self.param_dtype).astype(tokens.dtype)
        if self.side_info:
            tokens += (self.sie_coefficient * self._side(x[:, 0, 0, 3])).astype(tokens.dtype)
        return tokens

    def _stem(
        self, x: Float[Array, "batch height width 3"], train: bool
    ) -> Float[Array, "batch rows columns channels"]:
        """Returns maps of half the size, after three convolutions."""
        for i, (size, stride) in enumerate(((7, 2), (3, 1), (3, 1)), start=1):
            pad = ((size // 2, size // 2),) * 2
            conv = nn.Conv(_STEM_WIDTH, (size, size), stride, pad, use_bias=False, **self.dtypes, name=f"stem_conv{i}")
            if i < 3:
                x = Ibn(self.axis_name, **self.dtypes, name=f"stem_norm{i}")(conv(x), train)
            else:
                x = _batch_norm(f"stem_norm{i}", train, self.axis_name, **self.dtypes)(conv(x))
            x = nn.relu(x)
        return x

    def _side(self, plane: Float[Array, " batch"]) -> Float[Array, "batch 1 dim"]:
        """Returns each image's embedding; 0 for the index -1, which stands for none that is known.

        NaN for any other index that there is not, so that a wrong camera is not passed over.
        """
        table = self.param("sie", TRUNC_NORMAL, (self.side_info, 1, self.width), self.param_dtype)
        index = jnp.round(plane.astype(jnp.float32)).astype(jnp.int32)
        known = (index >= 0) & (index < self.side_info)
        rows = jnp.take(jnp.asarray(table), jnp.clip(index, 0, self.side_info - 1), axis=0)
        return jnp.where(known[:, None, None], rows, jnp.where(index == -1, 0.0, jnp.nan)[:, None, None])

    def _groups(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "groups tokens dim"]:
        """Returns for each image the four groups of patches, each behind the class token."""
        batch, length = len(x), (x.shape[1] - 1) // PARTS
        order = jigsaw_order(x.shape[1] - 1, self.jigsaw_shift, self.jigsaw_groups)[: PARTS * length]
        patches = x[:, order].reshape(batch, PARTS, length, self.width)
        token = jnp.broadcast_to(x[:, None, :1], (batch, PARTS, 1, self.width))
        return jnp.concatenate([token, patches], axis=2).reshape(batch * PARTS, length + 1, self.width)

    def _check_images(self, x: Array) -> None:
        channels = 4 if self.side_info else 3
        if x.ndim == 4 and tuple(x.shape[1:]) == (*self.image_size, channels):
            return
        height, width = self.image_size
        plane = (
            f"with side_info={self.side_info} the fourth channel is a plane that holds the index of the image's embedding"
            if self.side_info
            else "without side_info there is no plane for an index"
        )
        raise ConfigError(
            f"This TransReID takes images of shape (batch, {height}, {width}, {channels}), got {tuple(x.shape)}; {plane}. "
            "Resize the images, or set image_size (which changes the number of position embeddings)."
        )


def jigsaw_order(patches: int, shift: int, groups: int) -> np.ndarray:
    """Returns the tokens that the jigsaw branch deals out, in its order; token 0 is the class token and does not occur.

    Shift: the patches from number `shift` (counted from 1) on come first. Shuffle: that sequence is
    cut into `groups` pieces of equal length, which are interleaved; if one patch is lacking for
    that, the last but one is taken twice.

    >>> jigsaw_order(8, 3, 2).tolist()
    [3, 7, 4, 8, 5, 1, 6, 2]
    """
    order = np.concatenate([np.arange(shift, patches + 1), np.arange(1, shift)])
    if patches % groups:
        order = np.append(order, order[-2])
    return order.reshape(groups, -1).T.ravel()


def _check(net: TransReID) -> None:
    """Raises ConfigError for attributes that cannot work together."""
    check_sizes(net)
    check_known(net, stem=STEMS, feature=FEATURES)
    if not isinstance(net.side_info, int) or net.side_info < 0:
        raise ConfigError(f"side_info must be a number of embeddings, 0 for none, got {net.side_info!r}.")
    if net.stem == "ics" and (net.patch_stride is not None or any(side % 2 for side in pair(net.patch_size))):
        raise ConfigError(
            'The stem "ics" halves the image, so that its patches must have an even size and cannot overlap; got '
            f"patch_size {net.patch_size!r}, patch_stride {net.patch_stride!r}."
        )
    if net.jigsaw:
        _check_jigsaw(net)


def _check_jigsaw(net: TransReID) -> None:
    rows, columns = net.grid
    patches = rows * columns
    if patches < PARTS:
        raise ConfigError(f"The jigsaw branch deals patches into {PARTS} groups, and this model has {rows}×{columns}.")
    if not isinstance(net.jigsaw_shift, int) or not 1 <= net.jigsaw_shift <= patches:
        raise ConfigError(
            f"jigsaw_shift must be one of the {patches} patches, counted from 1; got {net.jigsaw_shift!r}."
        )
    groups = net.jigsaw_groups
    if not isinstance(groups, int) or groups < 1 or (patches % groups and (patches + 1) % groups):
        raise ConfigError(
            f"jigsaw_groups must divide the {patches} patches ({rows}×{columns}), or one more; got {groups!r}."
        )
