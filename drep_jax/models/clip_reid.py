"""CLIP-ReID's image encoder (Li, Sun, Li 2023): CLIP's ViT, and necks behind its feature and behind its projection to the text.

Of its blocks h_1 … h_L, class token only: the features are h_{L−1}, f = LN(h_L) and P f. All three
go into the triplet loss; f and P f each have a BNNeck whose classifier goes into the identity loss,
and side by side they are the feature that is ranked. Differences to our ViT: no bias of the patch
embedding, a LayerNorm before the blocks, QuickGELU, LayerNorm eps 1e-5. The text encoder and the
learned prompts serve the training of the published networks only, and are not here. Initial values
are those of our ViT; normal of 1/√width for class token, positions and projection, as in CLIP.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import BatchNormBackbone, at_least_float32, check_known
from drep_jax.models.neck import FEATURES, BNNeck
from drep_jax.models.transformer import TRUNC_NORMAL, EncoderBlock, grid_of, layer_norm

NORM_EPS = 1e-5

Images = Float[Array, "batch height width channels"]
Vectors = Float[Array, "batch width"]


class CLIPReID(BatchNormBackbone, kw_only=True):
    """Vision Transformer of CLIP that returns the feature that is ranked.

    Attributes:
      patch_size: side of a patch in pixels.
      width: token dimension, a multiple of `num_heads`.
      depth: number of blocks, at least 2.
      num_heads: attention heads.
      projection: width of the feature that CLIP compares with texts.
      num_classes: identities of the training images; 0 for no classifiers.
      image_size: (height, width) in pixels.
      patch_stride: distance of the patches; smaller than the patch where they overlap (12 in the
        published ones); None for the patch's own size. There are (size - patch) // stride + 1 of
        them along a side.
      side_info: number of learned embeddings of cameras or views, one of which is added to the
        class token; then images have a fourth channel, a constant plane that holds the index of the
        image's embedding. An index that has none makes the feature NaN. 0 for no embeddings.
      sie_coefficient: what these embeddings are multiplied by.
      feature: what is ranked, "before" or "after" the batch norm of BNNeck.
      dtype: see `Backbone`. The necks are float32 at least.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    projection: int
    num_classes: int
    image_size: tuple[int, int]
    patch_stride: int | None = None
    side_info: int = 0
    sie_coefficient: float = 1.0
    feature: str = "before"

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches along (height, width)."""
        stride = self.patch_size if self.patch_stride is None else self.patch_stride
        return grid_of(self.image_size, (self.patch_size, self.patch_size), (stride, stride))

    def __call__(self, x: Images, train: bool = False) -> Float[Array, "batch outputs"]:
        """Returns the feature that is ranked [f | P f] (batch, width + projection), float32 at least.

        Args:
          x: normalized images of `image_size`; with `side_info` of four channels.
          train: whether the necks use, and update with, the statistics of this batch (make
            `batch_stats` mutable).

        Raises:
          ConfigError: when the images are not of that shape.
        """
        features, after, _ = self._run(x, train, classify=False)
        return jnp.concatenate(features[1:] if self.feature == "before" else after, axis=1)

    def outputs(self, x: Images, train: bool = False) -> dict[str, tuple[Vectors, ...]]:
        """Returns what the losses read: "features" (h_{L−1}, f, P f) and "logits" (of f, of P f).

        Args:
          x, train: as for `__call__`.
        """
        features, _, logits = self._run(x, train, classify=True)
        return {"features": features, "logits": logits}

    @nn.compact
    def _run(
        self, x: Images, train: bool, classify: bool
    ) -> tuple[tuple[Vectors, ...], tuple[Vectors, ...], tuple[Vectors, ...]]:
        """Returns the three features, two of them after their necks, and the logits (none without classifiers)."""
        x = layer_norm("norm_pre", NORM_EPS, **self.dtypes)(self._embed(x))
        block_class: Any = self.rematerialized(EncoderBlock)
        earlier = x
        for i in range(self.depth):
            earlier = x
            block = block_class(
                num_heads=self.num_heads,
                mlp_dim=4 * self.width,
                activation="quick_gelu",
                norm_eps=NORM_EPS,
                **self.dtypes,
                name=f"encoderblock_{i}",
            )
            x = block(x)
        # The norm works token by token: the class token alone gives the same for less work.
        feature = layer_norm("norm", NORM_EPS, **self.dtypes)(x[:, 0])
        init = nn.initializers.normal(self.width**-0.5)
        projected = nn.Dense(self.projection, use_bias=False, kernel_init=init, **self.dtypes, name="projection")(
            feature
        )
        features = tuple(map(at_least_float32, (earlier[:, 0], feature, projected)))
        necks = (
            BNNeck(self.num_classes, self.axis_name, None, self.param_dtype, name=n) for n in ("neck", "neck_proj")
        )
        results = [neck(f, train, classify) for neck, f in zip(necks, features[1:], strict=True)]
        return features, tuple(a for a, _ in results), tuple(scores for _, scores in results if scores is not None)

    def _embed(self, x: Images) -> Float[Array, "batch tokens width"]:
        """Returns the class token and the patches row by row, with side information and positions added."""
        channels = 4 if self.side_info else 3
        if x.ndim != 4 or tuple(x.shape[1:]) != (*self.image_size, channels):
            height, width = self.image_size
            why = (
                " (the fourth holds the number of the image's camera or view, see side_info)" if self.side_info else ""
            )
            raise ConfigError(
                f"This CLIP-ReID takes images of shape (batch, {height}, {width}, {channels}){why}, got {tuple(x.shape)}. "
                "Resize the images, or set image_size (which changes the number of position embeddings)."
            )
        patches = nn.Conv(
            self.width,
            (self.patch_size,) * 2,
            strides=(self.patch_size if self.patch_stride is None else self.patch_stride,) * 2,
            padding="VALID",
            use_bias=False,
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embedding",
        )(x[..., :3])
        patches = patches.reshape(patches.shape[0], -1, self.width)
        normal = nn.initializers.normal(self.width**-0.5)
        token = self.param("cls", normal, (1, 1, self.width), self.param_dtype).astype(patches.dtype)
        tokens = jnp.broadcast_to(token, (patches.shape[0], 1, self.width))
        if self.side_info:
            tokens += self._side(x[:, 0, 0, 3]).astype(patches.dtype)[:, None]
        shape = (1, 1 + math.prod(self.grid), self.width)
        positions = self.param("pos_embedding", normal, shape, self.param_dtype)
        return jnp.concatenate([tokens, patches], axis=1) + positions.astype(patches.dtype)

    def _side(self, numbers: Float[Array, " batch"]) -> Float[Array, "batch width"]:
        """Returns the weighted embedding of each image's camera or view; 0 for -1, which is none that is known.

        NaN for any other number that there is not.
        """
        table = self.param("sie", TRUNC_NORMAL, (self.side_info, self.width), self.param_dtype)
        index = jnp.round(numbers).astype(jnp.int32)
        known = (index >= 0) & (index < self.side_info)
        rows = table[jnp.clip(index, 0, self.side_info - 1)]
        return self.sie_coefficient * jnp.where(known[:, None], rows, jnp.where(index == -1, 0.0, jnp.nan)[:, None])


def _check(net: CLIPReID) -> None:
    """Raises ConfigError for attributes that cannot work together."""
    for name, least in (("patch_size", 1), ("width", 1), ("depth", 2), ("num_heads", 1), ("projection", 1)):
        value = getattr(net, name)
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number, at least {least}, got {value!r}.")
    for name in ("num_classes", "side_info"):
        value = getattr(net, name)
        if not isinstance(value, int) or value < 0:
            raise ConfigError(f"{name} must be a whole number, 0 (for none) or more, got {value!r}.")
    if net.patch_stride is not None and (not isinstance(net.patch_stride, int) or net.patch_stride < 1):
        raise ConfigError(f"patch_stride must be a number of pixels, at least 1, got {net.patch_stride!r}.")
    if net.width % net.num_heads:
        raise ConfigError(f"width {net.width} is not divisible by num_heads {net.num_heads}.")
    if not math.isfinite(net.sie_coefficient):
        raise ConfigError(f"sie_coefficient must be a finite number, got {net.sie_coefficient!r}.")
    check_known(net, feature=FEATURES)
    sides = net.image_size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ConfigError(f"image_size must be (height, width) in pixels, both at least 1, got {sides!r}.")
    for side, size in zip(("height", "width"), sides, strict=True):
        if size < net.patch_size:
            raise ConfigError(f"Image {side} {size} is smaller than the patch {net.patch_size}.")
        if net.patch_stride is None and size % net.patch_size:
            raise ConfigError(
                f"Image {side} {size} is not divisible by the patch {net.patch_size}; the nearest that are: "
                f"{size // net.patch_size * net.patch_size} and {-(-size // net.patch_size) * net.patch_size}."
            )
