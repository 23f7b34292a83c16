"""Faster R-CNN (Ren et al. 2015) and Mask R-CNN (He et al. 2017) on a feature pyramid, on ResNets and Swin Transformers.

There are two public networks under each name, whose weights fit each other but whose boxes differ
(`rcnn_outputs.CONVENTIONS`): mmdetection's has anchors without rounding, RoIAlign with shifted coordinates and as
many samples as a box needs, and the background as the last class; torchvision's rounds its anchors,
takes two samples a side, and has the background first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError
from drep_jax.models.backbone import Backbone, at_least_float32, check_batch, check_classes, check_known, whole
from drep_jax.models.detectors.anchors import anchors_of, level_shapes
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coders import RCNN_STDS, clip_boxes, decode_deltas
from drep_jax.models.detectors.fpn import FPN
from drep_jax.models.detectors.losses import dense_distance
from drep_jax.models.detectors.nms import Form
from drep_jax.models.detectors.padding import extents
from drep_jax.models.detectors.proposals import Objects, best_pairs, each, suppressed
from drep_jax.models.detectors.rcnn_losses import losses_of
from drep_jax.models.detectors.rcnn_outputs import CONVENTIONS, Convention, Outputs
from drep_jax.models.detectors.roi_align import level_of, roi_align
from drep_jax.models.detectors.roi_heads import BoxHead, MaskHead
from drep_jax.models.detectors.rpn import RPNHead, propose
from drep_jax.models.detectors.sampling import LowQuality, Samples, as_labels, assign, sample
from drep_jax.models.detectors.swin_trunk import SwinTrunk, SwinV2Trunk
from drep_jax.models.detectors.trunk import STYLES, ResNetTrunk
from drep_jax.rows import clean_stream, valid_pixels, valid_rows

TRUNKS = ("resnet", "swin", "swinv2")
STRIDES = (4, 8, 16, 32, 64)
RPN_SAMPLES, RPN_POSITIVE = 256, 128
ROI_SAMPLES, ROI_POSITIVE = 512, 128
BOX_CELLS, MASK_CELLS = 7, 14
"""Cells a side that RoIAlign reads for boxes and for masks."""

Size = Float[Array, "batch 2"]
Shape = tuple[int, int]


class RCNN(Backbone, kw_only=True):
    """Region-based detector on a feature pyramid; takes images of any size.

    Attributes:
      num_classes: without the background.
      masks: whether it is a Mask R-CNN.
      implementation: "mmdet" or "torchvision", see `CONVENTIONS`.
      trunk: "resnet" (of bottlenecks), "swin" or "swinv2".
      depths: blocks of each stage.
      width: channels of the ResNet's stem, or of the Swin's first stage.
      style, norm_eps: of a ResNet, see `ResNetTrunk`. torchvision's first COCO weights have eps 0.
      num_heads, window_size, drop_path: of a Swin, see `ShiftedWindows`.
      pyramid_width: channels of the pyramid and of the heads on it.
      head_width: of the dense layers of the box head.
      per_level, proposals: candidates of a level and proposals of an image, in inference.
      score, iou, keep: threshold of the score, of the suppression, and objects of an image.
      candidates: (box, class) pairs that suppression sees; what does not fit is counted in
        `left_out`.
    """

    num_classes: int
    masks: bool = False
    implementation: str = "mmdet"
    trunk: str = "resnet"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    style: str = "pytorch"
    norm_eps: float = 1e-5
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, int] = 7
    drop_path: float = 0.0
    pyramid_width: int = 256
    head_width: int = 1024
    per_level: int = 1000
    proposals: int = 1000
    score: float = 0.05
    iou: float = 0.5
    keep: int = 100
    candidates: int = 2000

    site_pattern = ".*"

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""
        check_known(self, implementation=tuple(CONVENTIONS), trunk=TRUNKS, style=STYLES)
        check_classes(self)
        if not whole(self.depths, 1) or len(self.depths) != 4:
            raise ConfigError(f"depths must be the number of blocks of each of 4 stages, got {self.depths!r}.")
        for name in ("width", "pyramid_width", "head_width", "per_level", "proposals", "keep", "candidates"):
            if not whole((getattr(self, name),), 1):
                raise ConfigError(f"{name} must be a whole number, at least 1, got {getattr(self, name)!r}.")

    @property
    def convention(self) -> Convention:
        """Whose network it is."""
        return CONVENTIONS[self.implementation]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        train: bool = False,
        size: Size | None = None,
        targets: Targets | None = None,
    ) -> Outputs:
        """Returns what `objects`, or with targets `losses`, reads.

        Args:
          x: normalized images.
          train: whether blocks of a Swin are dropped. Batch norms take their stored statistics.
          size: height and width of each image without its padding; None for all of it.
          targets: objects by which proposals are sampled, with the rng "dropout" where there is
            one, else always alike. None for inference.

        Raises:
          ConfigError: when `x` is not a batch of images, or masks are missing in the targets.
        """
        check_batch(x, "An R-CNN")
        shape = (x.shape[1], x.shape[2])
        limit = extents(shape, size, len(x), jnp.float32)
        with valid_pixels(size, shape):
            maps = self._trunk_of(x, train)
            pyramid = FPN(self.pyramid_width, len(STRIDES), **self.dtypes, name="neck")(maps)
            objectness, deltas = RPNHead(**self.dtypes, name="rpn")(pyramid)
        objectness, deltas = at_least_float32(objectness), at_least_float32(deltas)
        anchors = self._anchors(shape)
        convention = self.convention
        boxes, _, valid = propose(
            objectness,
            deltas,
            anchors,
            limit,
            per_level=convention.train_per_level if targets is not None else self.per_level,
            keep=convention.train_keep if targets is not None else self.proposals,
            least=convention.least_proposal,
            clamp_below=convention.clamp_below,
        )
        boxes, valid = clean_stream((boxes, valid))
        samples = anchor_objects = None
        if targets is not None:
            key = self.make_rng("dropout") if self.has_rng("dropout") else jax.random.key(0)
            anchor_objects, boxes, samples = self._sample(key, anchors, boxes, valid, targets, limit)
            valid = samples.valid
        mmdet = convention.background < 0
        head = BoxHead(
            self.num_classes + 1, self.num_classes + (not mmdet), self.head_width, **self.dtypes, name="box_head"
        )
        with valid_rows(valid):
            logits, box_deltas = head(self._read(pyramid, boxes, valid, BOX_CELLS))
        outputs = Outputs(
            objectness=objectness,
            anchor_deltas=deltas,
            boxes=boxes,
            valid=valid,
            logits=at_least_float32(logits),
            deltas=at_least_float32(box_deltas),
            anchor_objects=anchor_objects,
            samples=samples,
        )
        return self._with_masks(outputs, pyramid, limit, targets) if self.masks else outputs

    def objects(self, outputs: Outputs, shape: Shape, size: Size | None = None) -> Objects:
        """Returns what is found in each image, see `Detector`; masks are those of the class of each object."""
        if outputs.samples is not None:
            raise ConfigError("These outputs are of a call with targets, for losses: call the network without targets.")
        if outputs.found is not None:
            return dataclasses.replace(outputs.found, masks=jax.nn.sigmoid(outputs.mask_logits))
        return self._find(outputs, extents(shape, size, len(outputs.boxes), jnp.float32))

    def losses(
        self, outputs: Outputs, targets: Targets, shape: Shape, size: Size | None = None
    ) -> Mapping[str, Float[Array, ""]]:
        """Returns the parts of the loss by name, see `Detector` and `losses_of`."""
        del size
        if outputs.samples is None:
            raise ConfigError("These outputs have no samples to learn from: call the network with targets.")
        return losses_of(self.convention, outputs, targets, self._anchors(shape))

    def distance(self, outputs: Outputs, clean_outputs: Outputs) -> Float[Array, ""]:
        """Returns how far the first stage is from that for clean images: the second reads other proposals; `dense_distance`."""
        return dense_distance(
            (outputs.objectness[..., None], clean_outputs.objectness[..., None]),
            (outputs.anchor_deltas, clean_outputs.anchor_deltas),
        )

    def _trunk_of(self, x: Array, train: bool) -> list[Array]:
        """Returns the maps of strides 4 to 32."""
        if self.trunk == "resnet":
            options: dict[str, Any] = {"style": self.style, "norm_eps": self.norm_eps, "remat": self.remat}
            return ResNetTrunk(self.depths, self.width, **options, **self.dtypes, name="backbone")(x)
        kind: Any = SwinTrunk if self.trunk == "swin" else SwinV2Trunk
        return kind(
            width=self.width,
            depths=self.depths,
            num_heads=self.num_heads,
            window_size=self.window_size,
            drop_path=self.drop_path,
            remat=self.remat,
            **self.dtypes,
            name="backbone",
        )(x, train)

    def _anchors(self, shape: Shape) -> list[np.ndarray]:
        """Returns the anchors of each level for inputs of this size."""
        shapes = level_shapes(shape, STRIDES)
        return anchors_of(self.convention.anchors, shapes, shape)

    def _read(self, pyramid: list[Array], boxes: Array, valid: Array, cells: int) -> Array:
        """Returns the features of boxes."""
        convention = self.convention
        levels = level_of(boxes, 4, kind=convention.level_kind)
        return roi_align(
            pyramid[:4],
            boxes,
            STRIDES[:4],
            cells,
            levels=levels,
            valid=valid,
            samples=convention.samples,
            aligned=convention.aligned,
        )

    def _sample(
        self, key: Array, anchors: list[np.ndarray], boxes: Array, valid: Array, targets: Targets, limit: Size
    ) -> tuple[Array, Array, Samples]:
        """Returns what each anchor learns from, the sampled boxes, and which these are."""
        convention = self.convention
        laid = jnp.asarray(np.concatenate(anchors), boxes.dtype)
        middles = (laid[:, :2] + laid[:, 2:]) / 2
        low_quality = convention.low_quality

        def of_image(key: Array, boxes: Array, valid: Array, targets: Targets, limit: Array) -> tuple[Any, ...]:
            first, second = jax.random.split(key)
            there = (targets.classes >= 0) & ~targets.crowd
            truths = targets.boxes.astype(boxes.dtype)
            owner = assign(
                laid,
                truths,
                there,
                positive=0.7,
                negative=0.3,
                least=convention.least_low_quality,
                low_quality=low_quality,
            )
            # Cells beyond the image, padded to a multiple of 32, are no negatives.
            inside = (middles < (jnp.ceil(limit / 32) * 32)[None, ::-1]).all(axis=-1)
            drawn = as_labels(sample(first, owner, RPN_SAMPLES, RPN_POSITIVE, usable=inside), len(laid))
            boxes, valid = jnp.concatenate([boxes, truths]), jnp.concatenate([valid, there])
            second_kind: LowQuality = "mmdet" if self.masks and low_quality == "mmdet" else "none"
            owner = assign(boxes, truths, there, positive=0.5, negative=0.5, least=0.5, low_quality=second_kind)
            samples = sample(second, owner, ROI_SAMPLES, ROI_POSITIVE, usable=valid)
            return drawn, jnp.where(samples.valid[:, None], boxes[samples.index], 0), samples

        plain = dataclasses.replace(targets, masks=None)
        return jax.vmap(of_image)(jax.random.split(key, len(boxes)), boxes, valid, plain, limit)

    def _find(self, outputs: Outputs, limit: Size) -> Objects:
        """Returns the objects of each image."""
        convention = self.convention
        first = 1 + convention.background  # of the classes among the logits

        def of_image(logits: Array, deltas: Array, boxes: Array, valid: Array, limit: Array, *, form: Form) -> Objects:
            chances = jax.nn.softmax(logits, axis=-1)[:, first : first + self.num_classes]
            chances = jnp.where(valid[:, None], chances, -1)
            top, box, label = best_pairs(chances, self.candidates, threshold=self.score)
            decoded = decode_deltas(
                deltas[box, label + first], boxes[box], stds=RCNN_STDS, clamp_below=convention.clamp_below
            )
            decoded = clip_boxes(decoded, limit)
            there = top.valid
            if convention.least_object is not None:
                there &= (decoded[:, 2:] - decoded[:, :2] >= convention.least_object).all(axis=-1)
            return suppressed(
                decoded,
                top.scores,
                label,
                threshold=self.iou,
                k=self.keep,
                valid=there,
                left_out=top.left_out,
                form=form,
            )

        values = lax.stop_gradient((outputs.logits, outputs.deltas, outputs.boxes, outputs.valid))
        return each(of_image, *values, limit)

    def _with_masks(self, outputs: Outputs, pyramid: list[Array], limit: Size, targets: Targets | None) -> Outputs:
        """Returns the outputs with the masks of what was found, or of the positive samples."""
        found, first = None, 1 + self.convention.background
        if targets is not None:
            if targets.masks is None:
                raise ConfigError(
                    "A Mask R-CNN learns from masks, and the labels have none: take data with masks, or set "
                    "--config.model.masks=False."
                )
            samples = jax.tree.map(lambda leaf: leaf[:, :ROI_POSITIVE], outputs.samples)
            boxes, valid = outputs.boxes[:, :ROI_POSITIVE], samples.valid & (samples.matched >= 0)
            classes = jnp.take_along_axis(targets.classes, jnp.maximum(samples.matched, 0), axis=1)
        else:
            found = clean_stream(self._find(outputs, limit))
            boxes, valid, classes = found.boxes, found.valid, found.classes
        head = MaskHead(self.num_classes + first, **self.dtypes, name="mask_head")
        with valid_rows(valid):
            logits = at_least_float32(head(self._read(pyramid, boxes, valid, MASK_CELLS)))
        index = jnp.maximum(classes, 0) + first
        chosen = jnp.take_along_axis(logits, index[..., None, None, None], axis=-1)[..., 0]
        return dataclasses.replace(outputs, found=found, mask_logits=chosen)
