"""ATSS's loss: anchors are assigned to objects by a threshold that each object's own overlaps give."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coders import RCNN_STDS, decode_deltas, encode_distances
from drep_jax.models.detectors.losses import binary_cross_entropy, focal_loss, masked_sum, paired_giou
from drep_jax.models.detectors.overlaps import box_iou

NEAREST = 9
"""Anchors of a level that an object is compared with."""
PADDED_TO = 32
"""Multiple of pixels to which each image is padded by itself; only what the batch pads beyond that counts for nothing."""
INSIDE = 0.01
"""Pixels by which an anchor's center must lie inside an object."""


def cells_of_image(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], extent: Float[Array, "2"]
) -> Bool[Array, " places"]:
    """Returns which cells of the levels, one after the other, begin inside the image padded to a multiple of 32."""
    padded = jnp.ceil(extent / PADDED_TO) * PADDED_TO
    parts = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        rows, columns = (jnp.arange(count) * stride < side for count, side in zip((height, width), padded, strict=True))
        parts.append((rows[:, None] & columns[None, :]).reshape(-1))
    return jnp.concatenate(parts)


def assign(
    anchors: Sequence[np.ndarray],
    boxes: Float[Array, "objects 4"],
    there: Bool[Array, " objects"],
    usable: Bool[Array, " places"],
) -> Int[Array, " places"]:
    """Returns the object of each anchor, −1 for the background (Zhang et al. 2020, algorithm 1).

    Of each level the 9 anchors whose centers are nearest to the object's are candidates; those
    whose IoU is at least mean + standard deviation (unbiased) of the candidates', and whose center
    lies inside, are the object's. Of several objects an anchor takes the one of highest IoU.

    Args:
      anchors: of each level, (n, 4).
      boxes: of the objects.
      there: which objects there are.
      usable: which anchors, of all levels one after the other, may be candidates.
    """
    laid = jnp.asarray(np.concatenate(anchors), boxes.dtype)
    centers = (laid[:, :2] + laid[:, 2:]) / 2
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = jnp.sqrt(((middle[:, None] - centers[None]) ** 2).sum(-1))
    distance = jnp.where(usable[None], distance, jnp.inf)
    candidates, start = [], 0
    for of_level in anchors:
        count = len(of_level)
        nearest = lax.top_k(-distance[:, start : start + count], min(NEAREST, count))[1]
        candidates.append(nearest + start)
        start += count
    index = jnp.concatenate(candidates, axis=1)
    overlap = jax.vmap(lambda box, rows: box_iou(box[None], laid[rows])[0])(boxes, index)
    known = usable[index]
    number = jnp.maximum(known.sum(1), 1)
    mean = jnp.where(known, overlap, 0).sum(1) / number
    spread = jnp.where(known, (overlap - mean[:, None]) ** 2, 0).sum(1) / jnp.maximum(number - 1, 1)
    threshold = mean + jnp.sqrt(spread)
    sides = jnp.concatenate([centers[index] - boxes[:, None, :2], boxes[:, None, 2:] - centers[index]], axis=-1)
    taken = known & (overlap >= threshold[:, None]) & (sides.min(-1) > INSIDE) & there[:, None]
    claims = jnp.full((len(boxes), len(laid)), -jnp.inf, boxes.dtype)
    claims = claims.at[jnp.arange(len(boxes))[:, None], index].set(jnp.where(taken, overlap, -jnp.inf))
    return jnp.where(claims.max(0) > -jnp.inf, claims.argmax(0), -1).astype(jnp.int32)


def centerness_of(distances: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Returns √(min(l, r)/max(l, r) · min(t, b)/max(t, b)) of the distances l, t, r, b to a box's sides; 0 outside."""
    first, second = distances[..., :2], distances[..., 2:]
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    return jnp.sqrt(jnp.prod(jnp.where(high > 0, jnp.maximum(low, 0) / jnp.where(high > 0, high, 1), 0), axis=-1))


def atss_losses(
    classes: Float[Array, "batch places classes"],
    deltas: Float[Array, "batch places 4"],
    centerness: Float[Array, "batch places"],
    anchors: Sequence[np.ndarray],
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    targets: Targets,
    extent: Float[Array, "batch 2"],
) -> dict[str, Float[Array, ""]]:
    """Returns the parts of the loss; positives are the anchors that have an object.

        class: focal (α 0.25, γ 2), over the positives of the batch, at least 1
        box: 2·(1 − GIoU) weighted by the centerness of the target, over the sum of these, at least 1
        centerness: binary cross-entropy of positives, over their number, at least 1

    Args:
      classes, centerness: logits.
      deltas: to the anchors.
      anchors: of each level, (n, 4).
      shapes, strides: of the levels.
      targets: the objects; crowds are left out.
      extent: (height, width) of each image without its padding; see `PADDED_TO`.
    """
    laid = jnp.asarray(np.concatenate(anchors), deltas.dtype)
    there = (targets.classes >= 0) & ~targets.crowd

    def of_image(boxes: Array, there: Array, extent: Array) -> tuple[Array, Array]:
        usable = cells_of_image(shapes, strides, extent)
        return assign(anchors, boxes, there, usable), usable

    assigned, usable = lax.map(lambda image: of_image(*image), (targets.boxes, there, extent))
    positive = assigned >= 0
    place = jnp.where(positive, assigned, 0)
    boxes = jnp.take_along_axis(targets.boxes, place[..., None], axis=1).astype(deltas.dtype)
    label = jnp.where(positive, jnp.take_along_axis(targets.classes, place, axis=1), -1)
    count = jnp.maximum(positive.sum(), 1)
    wanted = jax.nn.one_hot(label, classes.shape[-1], dtype=classes.dtype)
    of_classes = focal_loss(classes, wanted).sum(-1)
    predicted = decode_deltas(deltas, laid[None], stds=RCNN_STDS)
    centers = jnp.broadcast_to(((laid[:, :2] + laid[:, 2:]) / 2)[None], (*positive.shape, 2))
    middle = jnp.where(positive, centerness_of(encode_distances(boxes, centers)), 0)
    overlap = paired_giou(predicted, boxes)
    return {
        "class": masked_sum(of_classes, usable) / count,
        "box": 2 * masked_sum(middle * (1 - overlap), positive) / jnp.maximum(middle.sum(), 1),
        "centerness": masked_sum(binary_cross_entropy(centerness, middle), positive) / count,
    }
