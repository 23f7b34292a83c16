"""Heads that read all levels of a pyramid with the same layers: two rows of convolutions, then one convolution an output.

The layers run breadth first: one layer on all levels, then the next one. A layer shared by levels
is one site with several calls, and what is learned for it has to see all its inputs before it has
given any output. The first convolutions of the two rows read the same maps, and are one site.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import Backbone, at_least_float32, check_batch, check_classes, whole
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coders import clip_boxes
from drep_jax.models.detectors.fpn import FPN
from drep_jax.models.detectors.padding import shape_of
from drep_jax.models.detectors.proposals import Objects, best_pairs, suppressed
from drep_jax.models.detectors.trunk import ResNetTrunk
from drep_jax.rows import valid_pixels

Maps = Float[Array, "batch height width channels"]
STRIDES = (8, 16, 32, 64, 128)
"""Of the levels P3 to P7."""
TOWERS = ("cls", "reg")
STAGES = 4

_normal = nn.initializers.normal(0.01)
RARE = nn.initializers.constant(-math.log(99))
"""Bias with which every class begins at a probability of 0.01."""


def tower_convs(
    levels: Sequence[Maps], depth: int, groups: int, dtypes: dict[str, Any]
) -> tuple[list[Maps], list[Maps]]:
    """Returns all levels after the row for classes and after the row for boxes, layers of the module that calls.

    Args:
      levels: of the pyramid.
      depth: convolutions of a row, each 3x3 without bias, with GroupNorm (eps 1e-5) and ReLU.
      groups: of the GroupNorms.
      dtypes: `dtype` and `param_dtype` of the layers.
    """
    rows = {tower: list(levels) for tower in TOWERS}
    for i in range(depth):
        for tower, maps in rows.items():
            conv = conv3x3(f"{tower}_conv_{i}", maps[0].shape[-1], dtypes, use_bias=False)
            norm = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False, name=f"{tower}_gn_{i}", **dtypes)
            convolved = [conv(x) for x in maps]
            rows[tower] = [nn.relu(norm(x)) for x in convolved]
    return rows["cls"], rows["reg"]


def conv3x3(name: str, channels: int, dtypes: dict[str, Any], **options: Any) -> nn.Conv:
    """Returns a 3x3 convolution of the module that calls; normal initial values of standard deviation 0.01."""
    pads = ((1, 1), (1, 1))
    return nn.Conv(channels, (3, 3), padding=pads, kernel_init=_normal, name=name, **{**dtypes, **options})


def on_levels(layer: nn.Module, levels: Sequence[Maps]) -> tuple[Maps, ...]:
    """Returns what a layer makes of every level, in float32 at least."""
    return tuple(at_least_float32(layer(x)) for x in levels)


def flat(levels: Sequence[Maps], width: int) -> Float[Array, "batch places width"]:
    """Returns the levels' cells one after the other."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, width) for x in levels], axis=1)


def found(
    scores: Sequence[Float[Array, "batch n classes"]],
    factors: Sequence[Float[Array, "batch n"]] | None,
    boxes: Sequence[Float[Array, "batch n 4"]],
    extent: Float[Array, "batch 2"],
    *,
    score: float,
    iou: float,
    candidates: int,
    keep: int,
) -> Objects:
    """Returns what is found on the levels of a pyramid, as mmdetection's dense heads do.

    The (cell, class) pairs above a score, at most so many of each level, then non-maximum
    suppression with classes apart.

    Args:
      scores: of each level, cell and class, which choose.
      factors: of each level and cell, with which scores are multiplied afterwards; None for none.
      boxes: of each level and cell. They are clipped to the image, and those without area dropped.
      extent: (height, width) of each image.
      score, iou: thresholds.
      candidates: pairs of a level.
      keep: objects an image.
    """

    def of_image(scores: list[Array], factors: list[Array] | None, boxes: list[Array], extent: Array) -> Objects:
        parts = []
        for level, of_level in enumerate(scores):
            top, box, label = best_pairs(of_level, candidates, threshold=score)
            factor = 1.0 if factors is None else factors[level][box]
            clipped = clip_boxes(boxes[level][box], extent)
            valid = top.valid & (clipped[:, 2:] > clipped[:, :2]).all(axis=-1)
            parts.append((clipped, top.scores * factor, label, valid))
        chosen, ranked, labels, valid = (jnp.concatenate(column) for column in zip(*parts, strict=True))
        return suppressed(chosen, ranked, labels, threshold=iou, k=keep, valid=valid)

    # One image after the other: under `vmap` a loop over boxes runs as long as the longest of the batch.
    factors = None if factors is None else list(factors)
    return lax.map(lambda image: of_image(*image), (list(scores), factors, list(boxes), extent))


class PyramidDetector(Backbone, kw_only=True):
    """Base of the detectors of one stage with two rows of convolutions on P3 to P7; they take images of any size.

    A subclass gives its head, `objects` and `losses`.

    Attributes:
      stage_sizes: bottleneck blocks in each of the ResNet's four stages.
      num_classes: number of classes.
      trunk_width: channels of the ResNet's stem.
      width: channels of the pyramid and the head.
      depth: convolutions of each row of the head.
      groups: of the GroupNorms.
      score, iou: thresholds of what is found: of the class, and of non-maximum suppression.
      candidates: most (cell, class) pairs of a level.
      keep: most objects of an image.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    trunk_width: int = 64
    width: int = 256
    depth: int = 4
    groups: int = 32
    score: float = 0.05
    iou: float = 0.6
    candidates: int = 1000
    keep: int = 100

    site_pattern = ".*"
    kind = ""
    """Of the network with its article, for messages."""
    trunk_style = "pytorch"
    relu_before_extra = False

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        if not whole(self.stage_sizes, 1) or len(self.stage_sizes) != STAGES:
            raise ConfigError(
                f"stage_sizes must be the number of blocks of each of 4 stages, got {self.stage_sizes!r}."
            )
        for name in ("trunk_width", "width", "groups", "depth", "candidates", "keep"):
            if not whole((getattr(self, name),), 1):
                raise ConfigError(f"{name} must be a whole number, at least 1, got {getattr(self, name)!r}.")
        if self.width % self.groups:
            raise ConfigError(f"width {self.width} is not divisible by groups {self.groups}.")
        check_classes(self)

    def head(self) -> nn.Module:
        """Returns the layers that read the levels, named "head"."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: Maps,
        train: bool = False,
        size: Float[Array, "batch 2"] | None = None,
        targets: Targets | None = None,
    ) -> Any:
        """Returns the head's predictions in every cell of five levels.

        Args:
          x: normalized images, padded right and below to multiples of 32.
          train, targets: change nothing here: there is no dropout, and batch norms have stored
            statistics.
          size: of the images without padding. It changes no output, but padding is no feature that
            denoisers learn from.

        Raises:
          ConfigError: when `x` is not a batch of images.
        """
        del train, targets
        check_batch(x, self.kind)
        trunk = ResNetTrunk(
            self.stage_sizes, self.trunk_width, self.trunk_style, remat=self.remat, **self.dtypes, name="backbone"
        )
        pyramid = FPN(
            self.width,
            extra="convs_on_output",
            relu_before_extra=self.relu_before_extra,
            **self.dtypes,
            name="neck",
        )
        head = self.head()
        with valid_pixels(size, shape_of(x)):
            return head(pyramid(trunk(x)[1:]))
