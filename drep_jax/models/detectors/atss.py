"""ATSS (Zhang et al. 2020) as in mmdetection: one square anchor a cell, classes, boxes and centerness from a shared head.

ResNet (batch norms on their stored statistics), pyramid P3 to P7, heads with GroupNorm. Boxes are
deltas to the anchors times a learned number a level; the score of a box is that of its class times
its centerness, √(min(l, r)/max(l, r) · min(t, b)/max(t, b)).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from drep_jax.models.detectors.anchors import anchors_of
from drep_jax.models.detectors.atss_losses import atss_losses
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coders import RCNN_STDS, decode_deltas
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
      boxes: deltas to the anchors (batch, h, w, 4).
      centerness: logits (batch, h, w, 1).
    """

    classes: tuple[Maps, ...]
    boxes: tuple[Maps, ...]
    centerness: tuple[Maps, ...]


class ATSSHead(nn.Module):
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
        deltas = on_levels(conv3x3("reg", 4, dtypes), boxes)
        centerness = on_levels(conv3x3("centerness", 1, dtypes), boxes)
        scales = [self.param(f"scale_{i}", nn.initializers.ones, (), self.param_dtype) for i in range(len(levels))]
        return Predictions(
            logits,
            tuple(scale.astype(x.dtype) * x for scale, x in zip(scales, deltas, strict=True)),
            centerness,
        )


class ATSS(PyramidDetector, kw_only=True):
    """ATSS detector; takes images of any size. Attributes are those of `PyramidDetector`."""

    kind = "An ATSS"

    def head(self) -> nn.Module:
        """Returns the layers that read the levels."""
        return ATSSHead(self.num_classes, self.depth, self.groups, **self.dtypes, name="head")

    def objects(
        self, outputs: Predictions, shape: tuple[int, int], size: Float[Array, "batch 2"] | None = None
    ) -> Objects:
        """Returns what is found; see `Detector`."""
        boxes = outputs.boxes[0]
        anchors = [jnp.asarray(a, boxes.dtype)[None] for a in _anchors(outputs)]
        return found(
            [jax.nn.sigmoid(x.reshape(x.shape[0], -1, x.shape[-1])) for x in outputs.classes],
            [jax.nn.sigmoid(x.reshape(x.shape[0], -1)) for x in outputs.centerness],
            [
                decode_deltas(x.reshape(x.shape[0], -1, 4), a, stds=RCNN_STDS)
                for x, a in zip(outputs.boxes, anchors, strict=True)
            ],
            extents(shape, size, boxes.shape[0], boxes.dtype),
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
            (flat(outputs.centerness, 1)[..., 0], flat(clean_outputs.centerness, 1)[..., 0]),
        )

    def losses(
        self,
        outputs: Predictions,
        targets: Targets,
        shape: tuple[int, int],
        size: Float[Array, "batch 2"] | None = None,
    ) -> Mapping[str, Float[Array, ""]]:
        """Returns the losses of classes, boxes and centerness; see `Detector`."""
        classes = flat(outputs.classes, outputs.classes[0].shape[-1])
        return atss_losses(
            classes,
            flat(outputs.boxes, 4),
            flat(outputs.centerness, 1)[..., 0],
            _anchors(outputs),
            [shape_of(x) for x in outputs.boxes],
            STRIDES,
            targets,
            extents(shape, size, classes.shape[0], classes.dtype),
        )


def _anchors(outputs: Predictions) -> list[Any]:
    return anchors_of("atss", [shape_of(x) for x in outputs.boxes])
