"""DETR (Carion et al. 2020): a ResNet, a transformer, and a fixed number of queries that are objects or nothing.

Post-norm: x <- LN(x + attention), x <- LN(x + MLP). Queries and keys read their tokens plus a
position, values the tokens alone, so they are two sites; positions are added once for all of a
block's readers, and those of the encoder's output once for the whole decoder. There is no norm
behind the encoder, and one for the outputs of all decoder layers.

The decoder starts at zeros, so what its first layer computes before it looks at the image depends
on no image.

There are two public implementations, whose networks differ in the class layer and in what is done
with boxes:

|                       | mmdet                | facebookresearch                    |
|-----------------------|----------------------|-------------------------------------|
| class outputs of COCO | 80, "no object" last | 91 by COCO's ids, "no object" last  |
| boxes                 | clipped to the image | not clipped                         |

transformers' networks are those of facebookresearch.

Initial values: Xavier uniform for the transformer, normal of standard deviation 1 for the queries.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import (
    Backbone,
    at_least_float32,
    check_batch,
    check_classes,
    check_known,
    check_rate,
    whole,
)
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coco_ids import COCO_IDS
from drep_jax.models.detectors.coders import clip_boxes, from_centers
from drep_jax.models.detectors.detr_losses import detr_distance, detr_losses
from drep_jax.models.detectors.padding import extents, shape_of, valid_cells
from drep_jax.models.detectors.positions import sine_positions
from drep_jax.models.detectors.proposals import Objects
from drep_jax.models.detectors.trunk import ResNetTrunk
from drep_jax.models.transformer import layer_norm
from drep_jax.rows import valid_pixels, valid_rows

IMPLEMENTATIONS = ("mmdet", "facebookresearch")
STAGES = 4

Tokens = Float[Array, "batch tokens width"]
_xavier = nn.initializers.xavier_uniform()


@struct.dataclass
class Predictions:
    """What the queries predict, after the last decoder layer or after each.

    Attributes:
      logits: (batch, layers, queries, classes + 1); the last one is "no object".
      boxes: (batch, layers, queries, 4) center x, center y, width, height, as fractions of the image
        without its padding.
    """

    logits: Float[Array, "batch layers queries outputs"]
    boxes: Float[Array, "batch layers queries 4"]


class CrossAttention(nn.Module):
    """Multi-head attention, softmax(q kᵀ / √d) v, of three inputs.

    Inputs that are the same tensor are given as the very same array, so that a trace can see it.
    """

    num_heads: int
    dropout: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, query: Tokens, key: Tokens, value: Tokens, valid: Bool[Array, "batch tokens"] | None, train: bool
    ) -> Tokens:
        """Returns, for each query, a mixture of the values.

        Args:
          query, key, value: what the three layers read.
          valid: which keys there are; None for all.
          train: whether dropout acts on the weights of the mixture.
        """
        batch, queries, width = query.shape
        head = width // self.num_heads
        dense = functools.partial(nn.Dense, width, kernel_init=_xavier, dtype=self.dtype, param_dtype=self.param_dtype)
        q, k, v = (
            jnp.swapaxes(dense(name=name)(x).reshape(batch, -1, self.num_heads, head), 1, 2)
            for name, x in (("query", query), ("key", key), ("value", value))
        )
        scores = at_least_float32((q * head**-0.5) @ jnp.swapaxes(k, 2, 3))
        if valid is not None:
            scores = jnp.where(valid[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.softmax(scores, axis=-1).astype(v.dtype))
        mixed = jnp.swapaxes(weights @ v, 1, 2).reshape(batch, queries, width)
        return dense(name="out")(mixed)


class FeedForward(nn.Module):
    """fc2(relu(fc1(x))), with dropout between the two."""

    hidden: int
    dropout: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, train: bool) -> Tokens:
        """Maps each token by itself."""
        dense = functools.partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = nn.relu(dense(self.hidden, name="fc1")(x))
        return dense(x.shape[-1], name="fc2")(nn.Dropout(self.dropout, deterministic=not train)(hidden))


class Layer(nn.Module):
    """A layer of the encoder, or with `memory` of the decoder."""

    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        positions: Tokens,
        valid: Bool[Array, "batch tokens"] | None,
        train: bool,
        memory: tuple[Tokens, Tokens] | None = None,
    ) -> Tokens:
        """Mixes tokens, looks at the memory if there is one, and maps each token by itself.

        Args:
          x: tokens.
          positions: what is added to queries and keys.
          valid: which tokens of the image there are; None for all.
          train: whether dropout acts.
          memory: (tokens of the image with their positions, without them), the keys and values of
            the second attention.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = functools.partial(CrossAttention, self.num_heads, self.dropout, **dtypes)
        drop = functools.partial(nn.Dropout(self.dropout), deterministic=not train)
        placed = x + positions
        y = attention(name="attn")(placed, placed, x, None if memory else valid, train)
        x = layer_norm("norm1", 1e-5, **dtypes)(x + drop(y))
        if memory is not None:
            with valid_rows(valid, only="key|value"):
                y = attention(name="cross_attn")(x + positions, *memory, valid, train)
            x = layer_norm("norm2", 1e-5, **dtypes)(x + drop(y))
        y = FeedForward(self.mlp_dim, self.dropout, **dtypes, name="mlp")(x, train)
        return layer_norm("norm3" if memory else "norm2", 1e-5, **dtypes)(x + drop(y))


class DETR(Backbone, kw_only=True):
    """DETR; takes images of any size.

    Attributes:
      stage_sizes: bottleneck blocks in each of the ResNet's four stages.
      num_classes: number of classes.
      trunk_width: channels of the ResNet's stem.
      width, num_heads, mlp_dim: of the transformer.
      encoder_layers, decoder_layers: their numbers.
      num_queries: most objects of an image.
      dropout: rate when `train`. Needs an rng named "dropout".
      implementation: "mmdet" or "facebookresearch", see above. Of "facebookresearch", 80 classes are
        COCO's, whose outputs are numbered as COCO's ids are; another number of classes has as many
        outputs.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    trunk_width: int = 64
    width: int = 256
    num_heads: int = 8
    mlp_dim: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 100
    dropout: float = 0.1
    implementation: str = "mmdet"

    site_pattern = ".*"

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        _check(self)

    @property
    def class_outputs(self) -> tuple[int, ...]:
        """The output of each class; beside them there is at least "no object", the last."""
        coco = self.implementation == "facebookresearch" and self.num_classes == len(COCO_IDS)
        return COCO_IDS if coco else tuple(range(self.num_classes))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        train: bool = False,
        size: Float[Array, "batch 2"] | None = None,
        targets: Targets | None = None,
    ) -> Predictions:
        """Predicts an object, or none, for each query.

        Args:
          x: normalized images, those that are smaller than the batch padded right and below.
          train: whether dropout acts.
          size: (height, width) of each image without its padding; None where nothing is padded.
          targets: given where the outputs are for the losses, which then hold those of each decoder
            layer.

        Raises:
          ConfigError: when `x` is not a batch of images.
        """
        check_batch(x, "A DETR")
        trunk = ResNetTrunk(self.stage_sizes, self.trunk_width, remat=self.remat, **self.dtypes, name="backbone")
        project = nn.Conv(self.width, (1, 1), kernel_init=_xavier, **self.dtypes, name="input_proj")
        with valid_pixels(size, shape_of(x)):
            maps = project(trunk(x)[-1])
        batch, rows, columns, _ = maps.shape
        valid = valid_cells(shape_of(x), (rows, columns), size, batch)
        positions = sine_positions(valid, self.width).astype(maps.dtype).reshape(batch, rows * columns, self.width)
        mask = None if size is None else valid.reshape(batch, rows * columns)
        block: Any = nn.remat(Layer, static_argnums=(4,)) if self.remat else Layer
        layer = functools.partial(block, self.num_heads, self.mlp_dim, self.dropout, **self.dtypes)
        tokens = maps.reshape(batch, rows * columns, self.width)
        for i in range(self.encoder_layers):
            with valid_rows(mask):
                tokens = layer(name=f"encoder_{i}")(tokens, positions, mask, train)
        memory = (tokens + positions, tokens)
        embedding = self.param(
            "query_embedding", nn.initializers.normal(1.0), (self.num_queries, self.width), self.param_dtype
        )
        queries = jnp.broadcast_to(embedding.astype(maps.dtype)[None], (batch, *embedding.shape))
        norm = layer_norm("decoder_norm", 1e-5, **self.dtypes)
        x = jnp.zeros_like(queries)
        states = []
        for i in range(self.decoder_layers):
            x = layer(name=f"decoder_{i}")(x, queries, mask, train, memory)
            states.append(x)
        every = train or targets is not None
        seen = norm(jnp.stack(states if every else states[-1:], axis=1))
        return self._heads(seen)

    def _heads(self, x: Float[Array, "batch layers queries width"]) -> Predictions:
        dense: Any = functools.partial(nn.Dense, **self.dtypes)
        outputs = self.class_outputs[-1] + 2 if self.class_outputs else 1
        logits = dense(outputs, name="class_embed")(x)
        for i in range(2):
            x = nn.relu(dense(self.width, kernel_init=_xavier, name=f"bbox_embed_{i}")(x))
        boxes = nn.sigmoid(at_least_float32(dense(4, name="bbox_embed_2")(x)))
        return Predictions(at_least_float32(logits), boxes)

    def objects(
        self, outputs: Predictions, shape: tuple[int, int], size: Float[Array, "batch 2"] | None = None
    ) -> Objects:
        """Returns the best class and the box of each query, by falling score; see `Detector`."""
        logits, boxes = outputs.logits[:, -1], outputs.boxes[:, -1]
        probability = jax.nn.softmax(logits, axis=-1)[..., jnp.asarray(self.class_outputs)]
        scores, classes = jnp.max(probability, axis=-1), jnp.argmax(probability, axis=-1).astype(jnp.int32)
        extent = extents(shape, size, len(logits), boxes.dtype)
        boxes = from_centers(boxes) * jnp.tile(extent[:, ::-1], 2)[:, None]
        if self.implementation == "mmdet":
            boxes = clip_boxes(boxes, extent)
        valid = jnp.isfinite(boxes).all(axis=-1) & jnp.isfinite(scores)
        order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), axis=-1, stable=True)
        boxes, scores, classes, valid = (
            jnp.take_along_axis(a, order[..., None] if a.ndim == 3 else order, axis=1)
            for a in (boxes, scores, classes, valid)
        )
        return Objects(
            boxes=jnp.where(valid[..., None], boxes, 0),
            scores=jnp.where(valid, scores, 0),
            classes=jnp.where(valid, classes, -1),
            valid=valid,
            left_out=jnp.zeros(len(logits), jnp.int32),
        )

    def distance(self, outputs: Predictions, clean_outputs: Predictions) -> Float[Array, ""]:
        """Returns how far outputs are from those for clean images, query by query; see `detr_distance`."""
        return detr_distance((outputs.logits, clean_outputs.logits), (outputs.boxes, clean_outputs.boxes))

    def losses(
        self,
        outputs: Predictions,
        targets: Targets,
        shape: tuple[int, int],
        size: Float[Array, "batch 2"] | None = None,
    ) -> Mapping[str, Float[Array, ""]]:
        """Returns the three parts of the loss, summed over the decoder layers; see `Detector`."""
        extent = extents(shape, size, len(outputs.logits), outputs.boxes.dtype)
        return detr_losses(outputs.logits, outputs.boxes, targets, extent, self.class_outputs)


def _check(net: DETR) -> None:
    """Raises ConfigError for attributes that cannot work."""
    if not whole(net.stage_sizes, 1) or len(net.stage_sizes) != STAGES:
        raise ConfigError(f"stage_sizes must be the number of blocks of each of 4 stages, got {net.stage_sizes!r}.")
    for name in ("trunk_width", "width", "num_heads", "mlp_dim", "encoder_layers", "decoder_layers", "num_queries"):
        if not whole((getattr(net, name),), 1):
            raise ConfigError(f"{name} must be a whole number, at least 1, got {getattr(net, name)!r}.")
    if net.width % net.num_heads or net.width % 4:
        raise ConfigError(
            f"width {net.width} must be a multiple of 4, for the positions, and of num_heads, {net.num_heads}."
        )
    check_known(net, implementation=IMPLEMENTATIONS)
    check_classes(net)
    check_rate(net, "dropout")
