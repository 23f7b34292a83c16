"""From the maps of YOLOv3's heads to boxes with scores and classes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from drep_jax.errors import ConfigError
from drep_jax.models.detectors.anchors import yolo_anchors
from drep_jax.models.detectors.coders import clip_boxes, decode_yolo
from drep_jax.models.detectors.darknet_cfg import Head
from drep_jax.models.detectors.nms import Form
from drep_jax.models.detectors.proposals import Objects, best, suppressed

Maps = Float[Array, "batch height width channels"]

RULES = ("product", "class")


def decode(
    outputs: Sequence[Maps], heads: Sequence[Head], size: tuple[int, int]
) -> tuple[Float[Array, "batch n 4"], Float[Array, "batch n"], Float[Array, "batch n classes"]]:
    """Returns boxes, objectness and class probabilities of all cells and anchors.

    Args:
      outputs: maps of the heads, (batch, h, w, anchors · (5 + classes)), anchors outermost, then x,
        y, w, h, objectness, classes.
      heads: one a map.
      size: (height, width) of the network's input.

    Returns:
      Boxes in pixels of that input; σ(objectness); σ(class). Order: heads, rows, cells, anchors.
    """
    boxes, objectness, classes = [], [], []
    for maps, head in zip(outputs, heads, strict=True):
        batch, height, width = maps.shape[:3]
        stride = (size[0] / height, size[1] / width)
        anchors = jnp.asarray(yolo_anchors((height, width), stride, head.anchors), maps.dtype)
        rows = maps.reshape(batch, height * width * len(head.anchors), 5 + head.classes)
        anchors = jnp.broadcast_to(anchors[None], (batch, *anchors.shape))
        boxes.append(decode_yolo(rows[..., :4], anchors, stride, scale_xy=head.scale_xy))
        objectness.append(jax.nn.sigmoid(rows[..., 4]))
        classes.append(jax.nn.sigmoid(rows[..., 5:]))
    return jnp.concatenate(boxes, 1), jnp.concatenate(objectness, 1), jnp.concatenate(classes, 1)


def find_objects(
    outputs: Sequence[Maps],
    heads: Sequence[Head],
    size: tuple[int, int],
    *,
    valid_size: Float[Array, "batch 2"] | None = None,
    rule: str = "product",
    score: float = 0.005,
    objectness: float = 0.005,
    iou: float = 0.45,
    candidates: int = 2000,
    keep: int = 100,
    form: Form = "auto",
) -> Objects:
    """Returns the objects of each image, after non-maximum suppression with classes apart.

    Args:
      outputs, heads, size: as for `decode`.
      valid_size: (height, width) of each image without its padding; boxes are clipped to it, and
        those that are empty then are dropped. None clips nothing, as darknet.
      rule: "product": pairs of (box, class) whose objectness · class is above `score` (darknet).
        "class": those whose class probability is above `score`, of boxes whose objectness is at
        least `objectness`; the best by class probability are candidates, ranked by the product
        (mmdetection, with score=0.05 and candidates=1000). Thresholding the product there would
        cost AP.
      score, objectness, iou: thresholds.
      candidates: pairs that suppression sees; what does not fit is counted in `left_out`.
      keep: objects an image.
      form: of `drep_jax.models.detectors.nms.nms`.

    Raises:
      ConfigError: for an unknown rule.
    """
    if rule not in RULES:
        raise ConfigError(f'Boxes are chosen by "product" or "class"; got "{rule}".')
    boxes, confidence, classes = decode(outputs, heads, size)
    usable = jnp.isfinite(boxes).all(axis=-1)
    if valid_size is not None:
        boxes = clip_boxes(boxes, valid_size)
        usable &= (boxes[..., 2:] > boxes[..., :2]).all(axis=-1)

    def of_image(boxes: Array, confidence: Array, classes: Array, usable: Bool[Array, " n"]) -> Objects:
        products = confidence[:, None] * classes
        known = usable if rule == "product" else usable & (confidence >= objectness)
        ranked = jnp.where(known[:, None], products if rule == "product" else classes, -1)
        top = best(ranked.reshape(-1), candidates, threshold=score)
        box, label = jnp.divmod(top.index, classes.shape[1])
        return suppressed(
            boxes[box],
            products.reshape(-1)[top.index],
            label,
            threshold=iou,
            k=keep,
            valid=top.valid,
            left_out=top.left_out,
            form=form,
        )

    # One image after the other: under `vmap` a loop over boxes runs as long as the longest of the batch, and masks what
    # it skips.
    return jax.lax.map(lambda image: of_image(*image), (boxes, confidence, classes, usable))
