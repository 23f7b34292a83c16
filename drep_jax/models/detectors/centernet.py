"""CenterNet-update: the anchor-free first stage of CenterNet2 (Zhou et al. 2021) as a detector, as in mmdetection.

ResNet in Caffe's style (stride in the first 1x1 convolution; batch norms on their stored
statistics), pyramid P3 to P7, heads with GroupNorm. Images are RGB as everywhere, minus a mean and
not divided: the public weights, which are for BGR, are turned around as they are read. A cell
predicts classes, and the distances of its center to the four sides of a box in units of the stride,
max(0, scale of the level · output). It is not the CenterNet of 2019.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from drep_jax.models.backbone import Backbone, check_batch
from drep_jax.models.detectors.anchors import grid_points
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.centernet_losses import centernet_losses
from drep_jax.models.detectors.coders import decode_distances
from drep_jax.models.detectors.fpn import FPN
from drep_jax.models.detectors.losses import dense_distance
from drep_jax.models.detectors.padding import extents, shape_of
from drep_jax.models.detectors.proposals import Objects
from drep_jax.models.detectors.towers import (
    RARE,
    STRIDES,
    Maps,
    check_pyramid_head,
    conv3x3,
    flat,
    found,
    on_levels,
    tower_convs,
)
from drep_jax.models.detectors.trunk import ResNetTrunk
from drep_jax.rows import valid_pixels


@struct.dataclass
class Predictions:
    """Maps of the levels P3 to P7, finest first.

    Attributes:
      classes: logits (batch, h, w, classes).
      boxes: distances left, up, right and down in units of the stride (batch, h, w, 4).
    """

    classes: tuple[Maps, ...]
    boxes: tuple[Maps, ...]


class CenterNetHead(nn.Module):
    """The head that all levels share."""

    num_classes: int
    depth: int
    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[Maps]) -> Predictions:
        """Returns the maps of all levels."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        classes, boxes = tower_convs(levels, self.depth, self.groups, dtypes)
        logits = on_levels(conv3x3("cls", self.num_classes, dtypes, bias_init=RARE), classes)
        distances = on_levels(conv3x3("reg", 4, dtypes), boxes)
        scales = [self.param(f"scale_{i}", nn.initializers.ones, (), self.param_dtype) for i in range(len(levels))]
        return Predictions(
            logits, tuple(nn.relu(scale.astype(x.dtype) * x) for scale, x in zip(scales, distances, strict=True))
        )


class CenterNet(Backbone, kw_only=True):
    """CenterNet-update detector; takes images of any size.

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

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        check_pyramid_head(self)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        train: bool = False,
        size: Float[Array, "batch 2"] | None = None,
        targets: Targets | None = None,
    ) -> Predictions:
        """Predicts classes and distances in every cell of five levels.

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
        check_batch(x, "A CenterNet")
        trunk = ResNetTrunk(
            self.stage_sizes, self.trunk_width, "caffe", remat=self.remat, **self.dtypes, name="backbone"
        )
        pyramid = FPN(self.width, extra="convs_on_output", relu_before_extra=True, **self.dtypes, name="neck")
        head = CenterNetHead(self.num_classes, self.depth, self.groups, **self.dtypes, name="head")
        with valid_pixels(size, shape_of(x)):
            return head(pyramid(trunk(x)[1:]))

    def objects(
        self, outputs: Predictions, shape: tuple[int, int], size: Float[Array, "batch 2"] | None = None
    ) -> Objects:
        """Returns what is found; see `Detector`."""
        first = outputs.boxes[0]
        boxes = []
        for x, stride in zip(outputs.boxes, STRIDES, strict=True):
            points = jnp.asarray(grid_points(shape_of(x), stride), x.dtype)[None]
            boxes.append(decode_distances(x.reshape(x.shape[0], -1, 4) * stride, points))
        return found(
            [jax.nn.sigmoid(x.reshape(x.shape[0], -1, x.shape[-1])) for x in outputs.classes],
            None,
            boxes,
            extents(shape, size, first.shape[0], first.dtype),
            score=self.score,
            iou=self.iou,
            candidates=self.candidates,
            keep=self.keep,
        )

    def distance(self, outputs: Predictions, clean_outputs: Predictions) -> Float[Array, ""]:
        """Returns how far outputs are from those for clean images; see `dense_distance`."""
        return dense_distance(
            (flat(outputs.classes, self.num_classes), flat(clean_outputs.classes, self.num_classes)),
            (flat(outputs.boxes, 4), flat(clean_outputs.boxes, 4)),
        )

    def losses(
        self,
        outputs: Predictions,
        targets: Targets,
        shape: tuple[int, int],
        size: Float[Array, "batch 2"] | None = None,
    ) -> Mapping[str, Float[Array, ""]]:
        """Returns the losses of classes and boxes; see `Detector`. Cells of padding count as background."""
        del shape, size
        return centernet_losses(
            flat(outputs.classes, outputs.classes[0].shape[-1]),
            flat(outputs.boxes, 4),
            [shape_of(x) for x in outputs.boxes],
            STRIDES,
            targets,
        )
