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

from drep_jax.models.detectors.anchors import grid_points
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.centernet_losses import centernet_losses
from drep_jax.models.detectors.coders import decode_distances
from drep_jax.models.detectors.losses import dense_distance
from drep_jax.models.detectors.padding import extents, shape_of
from drep_jax.models.detectors.proposals import Objects
from drep_jax.models.detectors.towers import (
    RARE,
    STRIDES,
    Maps,
    PyramidDetector,
    conv3x3,
    flat,
    found,
    on_levels,
    tower_convs,
)


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


class CenterNet(PyramidDetector, kw_only=True):
    """CenterNet-update detector; takes images of any size. Attributes are those of `PyramidDetector`."""

    kind = "A CenterNet"
    trunk_style = "caffe"
    relu_before_extra = True

    def head(self) -> nn.Module:
        """Returns the layers that read the levels."""
        return CenterNetHead(self.num_classes, self.depth, self.groups, **self.dtypes, name="head")

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
