"""DETR's loss: predictions are matched one to one with objects, the others learn to be no object."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coders import from_centers, to_centers
from drep_jax.models.detectors.losses import masked_sum, paired_giou
from drep_jax.models.detectors.matching import match_batch
from drep_jax.models.detectors.overlaps import generalized_iou

DISTANCE, OVERLAP, NO_OBJECT = 5.0, 2.0, 0.1
"""Weights of the L1 distance and the generalized IoU, in cost and loss, and of "no object" in the cross-entropy."""


def detr_losses(
    logits: Float[Array, "batch layers queries outputs"],
    boxes: Float[Array, "batch layers queries 4"],
    targets: Targets,
    extent: Float[Array, "batch 2"],
    class_outputs: Sequence[int],
) -> dict[str, Float[Array, ""]]:
    """Returns the parts of the loss (Carion et al. 2020), each summed over the decoder layers.

        cost = −p(class) + 5·L1 − 2·GIoU
        class: cross-entropy with weight 0.1 on "no object", over the sum of the weights
        box: 5·L1 and 2·(1 − GIoU) of matched pairs, over the number of objects, at least 1

    Args:
      logits: "no object" last.
      boxes: center x, center y, width, height, as fractions of the image.
      targets: the objects; crowds are left out.
      extent: (height, width) of each image without its padding.
      class_outputs: the output of each class.
    """
    batch, layers, queries, outputs = logits.shape
    there = (targets.classes >= 0) & ~targets.crowd
    wanted = to_centers(targets.boxes / jnp.tile(extent[:, ::-1], 2)[:, None])
    outputs_of = jnp.asarray(class_outputs, jnp.int32)
    labels = outputs_of[jnp.clip(targets.classes, 0, len(class_outputs) - 1)]

    def pairs(logits: Array, boxes: Array) -> Int[Array, "batch objects"]:
        probability = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None, :], axis=2)
        distance = jnp.abs(boxes[:, :, None] - wanted[:, None]).sum(-1)
        overlap = generalized_iou(from_centers(boxes), from_centers(wanted))
        return match_batch(-probability + DISTANCE * distance - OVERLAP * overlap, there)

    by_layer = jnp.swapaxes(logits, 0, 1), jnp.swapaxes(boxes, 0, 1)
    matched = jnp.swapaxes(lax.map(lambda of: pairs(*of), lax.stop_gradient(by_layer)), 0, 1)
    used = matched >= 0
    place = jnp.where(used, matched, queries)
    image, layer = jnp.ogrid[:batch, :layers]
    target = jnp.full((batch, layers, queries), outputs - 1, jnp.int32)
    target = target.at[image[..., None], layer[..., None], place].set(
        jnp.broadcast_to(labels[:, None], place.shape), mode="drop"
    )
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
    weight = jnp.where(target == outputs - 1, NO_OBJECT, 1.0)
    classes = jnp.sum((weight * entropy).sum((0, 2)) / weight.sum((0, 2)))
    count = jnp.maximum(jnp.sum(there), 1)
    predicted = jnp.take_along_axis(boxes, jnp.where(used, matched, 0)[..., None], axis=2)
    objects = jnp.broadcast_to(wanted[:, None], predicted.shape)
    distance = jnp.abs(predicted - objects).sum(-1)
    overlap = paired_giou(from_centers(predicted), from_centers(objects))
    return {
        "class": classes,
        "box": DISTANCE * masked_sum(distance, used) / count,
        "giou": OVERLAP * masked_sum(1 - overlap, used) / count,
    }


def detr_distance(
    logits: tuple[Float[Array, "*queries outputs"], Float[Array, "*queries outputs"]],
    boxes: tuple[Float[Array, "*queries 4"], Float[Array, "*queries 4"]],
) -> Float[Array, ""]:
    """Returns how far what the queries give is from what they give for clean images, at least 0.

        1/n Σ_queries KL(p* ‖ p) + (1 − p*(no object)) · [5·L1 + 2·(1 − GIoU)]

    with the probabilities p of an image's queries; * marks the clean outputs. A query is compared
    with itself, and its box matters where the clean network sees an object.

    Args:
      logits: (those, clean ones).
      boxes: (those, clean ones), center x, center y, width, height.
    """
    chance, wanted = (jax.nn.log_softmax(each) for each in logits)
    divergence = jnp.sum(jnp.exp(wanted) * (wanted - chance), axis=-1)
    apart = DISTANCE * jnp.abs(boxes[0] - boxes[1]).sum(-1)
    apart += OVERLAP * (1 - paired_giou(from_centers(boxes[0]), from_centers(boxes[1])))
    return jnp.sum(divergence + (1 - jnp.exp(wanted[..., -1])) * apart) / logits[0].shape[0]
