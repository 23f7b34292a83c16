"""Losses of R-CNNs, as mmdetection and torchvision sum them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coders import RCNN_STDS, encode_deltas
from drep_jax.models.detectors.rcnn_outputs import Convention, Outputs
from drep_jax.models.detectors.sampling import IGNORED


def losses_of(
    convention: Convention, outputs: Outputs, targets: Targets, anchors: Sequence[np.ndarray]
) -> Mapping[str, Float[Array, ""]]:
    """Returns the parts of the loss: "rpn_class", "rpn_box", "class", "box", and "mask" of a network with masks.

    Cross-entropies are means over the samples of the batch; losses of deltas are sums over the
    positive samples, divided by the number of all samples.

    Args:
      convention: whose network it is.
      outputs: of a call with these targets.
      targets: the labeled objects.
      anchors: of each level, for inputs of this size.
    """
    samples: Any = outputs.samples
    first = 1 + convention.background
    truths = targets.boxes.astype(outputs.boxes.dtype)

    drawn = outputs.anchor_objects > IGNORED
    positive = outputs.anchor_objects >= 0
    count = jnp.maximum(jnp.sum(drawn), 1)
    laid = jnp.broadcast_to(jnp.asarray(np.concatenate(anchors), truths.dtype), outputs.anchor_deltas.shape)
    entropy = optax.sigmoid_binary_cross_entropy(outputs.objectness, positive.astype(outputs.objectness.dtype))
    losses = {
        "rpn_class": jnp.sum(jnp.where(drawn, entropy, 0)) / count,
        "rpn_box": _of_deltas(outputs.anchor_deltas, laid, truths, outputs.anchor_objects, (1.0,) * 4, convention.beta)
        / count,
    }

    positive = samples.valid & (samples.matched >= 0)
    classes = jnp.take_along_axis(targets.classes, jnp.maximum(samples.matched, 0), axis=1)
    background = convention.background % outputs.logits.shape[-1]
    entropy = optax.softmax_cross_entropy_with_integer_labels(
        outputs.logits, jnp.where(positive, classes + first, background)
    )
    count = jnp.maximum(jnp.sum(samples.valid), 1)
    chosen = jnp.take_along_axis(outputs.deltas, jnp.where(positive, classes + first, 0)[..., None, None], axis=2)
    matched = jnp.where(positive, samples.matched, -1)
    losses["class"] = jnp.sum(jnp.where(samples.valid, entropy, 0)) / count
    losses["box"] = _of_deltas(chosen[..., 0, :], outputs.boxes, truths, matched, RCNN_STDS, convention.beta) / count
    if outputs.mask_logits is not None and targets.masks is not None:
        slots = outputs.mask_logits.shape[1]
        masks = _to_learn(
            targets.masks,
            outputs.boxes[:, :slots],
            matched[:, :slots],
            outputs.mask_logits.shape[2],
            convention.aligned,
        )
        masks = (masks >= 0.5).astype(masks.dtype) if convention.hard_masks else masks
        entropy = optax.sigmoid_binary_cross_entropy(outputs.mask_logits, masks).mean(axis=(2, 3))
        positive = matched[:, :slots] >= 0
        losses["mask"] = jnp.sum(jnp.where(positive, entropy, 0)) / jnp.maximum(jnp.sum(positive), 1)
    return losses


def _of_deltas(
    deltas: Array, boxes: Array, truths: Array, matched: Array, stds: Sequence[float], beta: float
) -> Float[Array, ""]:
    """Returns the sum over boxes with an object of |Δ|, quadratic below `beta`: Δ²/2β, then |Δ| − β/2."""
    positive = matched >= 0
    objects = jnp.take_along_axis(truths, jnp.maximum(matched, 0)[..., None], axis=1)
    # Boxes without an object may have no area, whose logarithm would be NaN.
    unit = jnp.asarray([[[0, 0, 1, 1]]], boxes.dtype)
    boxes, objects = (jnp.where(positive[..., None], rows, unit) for rows in (boxes, objects))
    off = jnp.abs(deltas - encode_deltas(objects, boxes, stds=stds))
    loss = jnp.where(off < beta, off**2 / (2 * beta), off - beta / 2) if beta else off
    return jnp.sum(jnp.where(positive[..., None], loss, 0))


def _to_learn(
    masks: Bool[Array, "batch m height width"], boxes: Array, matched: Array, cells: int, aligned: bool
) -> Float[Array, "batch k cells cells"]:
    """Returns the mask of each box's object, cut out by RoIAlign with as many samples as the box needs.

    As a cell's samples are a product of rows and columns, that is two matrix products.
    """
    height, width = masks.shape[2:]

    def of_box(image_masks: Array, box: Array, index: Array) -> Array:
        mask = image_masks[jnp.maximum(index, 0)].astype(jnp.float32)
        down = _weights(box[1], box[3], cells, height, aligned)
        right = _weights(box[0], box[2], cells, width, aligned)
        return down @ mask @ right.T

    def of_image(image: tuple[Array, Array, Array]) -> Array:
        return lax.map(lambda box: of_box(image[0], *box), image[1:])

    return lax.map(of_image, (masks, lax.stop_gradient(boxes), matched))


def _weights(low: Array, high: Array, cells: int, pixels: int, aligned: bool) -> Float[Array, "cells pixels"]:
    """Returns what each cell of a box takes of each pixel along one axis."""
    length = high - low if aligned else jnp.maximum(high - low, 1)
    cell = length / cells
    count = jnp.maximum(jnp.ceil(cell), 1)
    sample = jnp.arange(max(1, math.ceil(pixels / cells)), dtype=low.dtype)[None]
    place = low - (0.5 if aligned else 0) + (jnp.arange(cells)[:, None] + (sample + 0.5) / count) * cell
    seen = (place >= -1) & (place <= pixels) & (sample < count)
    near = jnp.maximum(1 - jnp.abs(jnp.clip(place, 0, pixels - 1)[..., None] - jnp.arange(pixels)[None, None]), 0)
    return jnp.sum(jnp.where(seen[..., None], near, 0), axis=1) / count
