"""The loss of YOLOv3: which priors learn which object, and four sums (mmdetection's GridAssigner and YOLOV3Head).

A prior may be positive only in a cell that holds the center of an object: if its IoU with an object
is above 0.5, and in any case the prior whose IoU with an object is the largest. Of two objects that
claim a prior so, the later one gets it. Priors whose IoU with every object is at most 0.5 are
negative, all others are ignored.

    L = 8/n · Σ_images [Σ₊ BCE(class) + Σ₊₋ BCE(objectness) + 2·Σ₊ BCE(xy) + 2·Σ₊ (wh − wh*)²]

Sums are published for eight images a device; 8/n makes the loss independent of the number of images.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from drep_jax.models.detectors.anchors import yolo_anchors
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coders import encode_yolo
from drep_jax.models.detectors.darknet_cfg import Head
from drep_jax.models.detectors.overlaps import box_iou

Maps = Float[Array, "batch height width channels"]

POSITIVE = 0.5
"""IoU above which a prior is positive, and up to which it is negative."""

IMAGES = 8
"""Images over which the published sums go."""

XY_WEIGHT, WH_WEIGHT = 2.0, 2.0


def yolo_losses(
    outputs: Sequence[Maps], heads: Sequence[Head], targets: Targets, shape: tuple[int, int]
) -> dict[str, Float[Array, ""]]:
    """Returns the parts of the loss: "class", "objectness", "xy" and "wh", with their weights.

    Args:
      outputs, heads: as for `drep_jax.models.detectors.yolo.decode`.
      targets: the labeled objects. Crowds, empty boxes and classes below 0 are none.
      shape: (height, width) of the network's input.
    """
    grids = [(maps.shape[1], maps.shape[2]) for maps in outputs]
    strides = [(shape[0] / height, shape[1] / width) for height, width in grids]
    levels = list(zip(grids, strides, heads, strict=True))
    anchors = [yolo_anchors(grid, stride, head.anchors) for grid, stride, head in levels]
    cells = np.concatenate([_cells(grid, len(head.anchors)) for grid, _, head in levels])
    sizes = np.concatenate([np.tile(stride, (len(rows), 1)) for stride, rows in zip(strides, anchors, strict=True)])
    usable = (targets.classes >= 0) & ~targets.crowd & (targets.boxes[..., 2:] > targets.boxes[..., :2]).all(axis=-1)
    priors = np.concatenate(anchors)

    def assigned(boxes: Array, usable: Array) -> tuple[Array, Array]:
        return assign(
            boxes, usable, jnp.asarray(priors, boxes.dtype), jnp.asarray(cells), jnp.asarray(sizes, boxes.dtype)
        )

    owner, negative = jax.vmap(assigned)(targets.boxes, usable)
    totals = dict.fromkeys(("class", "objectness", "xy", "wh"), jnp.float32(0))
    start = 0
    for maps, (_, stride, head), level in zip(outputs, levels, anchors, strict=True):
        batch, count = maps.shape[0], len(level)
        part = slice(start, start + count)
        start += count
        rows = maps.reshape(batch, count, 5 + head.classes)
        mine, free = owner[:, part], negative[:, part]
        positive = mine >= 0
        place = jnp.maximum(mine, 0)
        boxes = jnp.take_along_axis(targets.boxes, place[..., None], axis=1)
        # Where there is no object the targets are those of the prior itself, which are finite.
        prior = jnp.broadcast_to(jnp.asarray(level, boxes.dtype)[None], boxes.shape)
        boxes = jnp.where(positive[..., None], boxes, prior)
        scaled = (stride[0] * head.scale_xy, stride[1] * head.scale_xy)
        wanted = encode_yolo(boxes, prior, scaled).astype(rows.dtype)
        classes = jax.nn.one_hot(jnp.take_along_axis(targets.classes, place, axis=1), head.classes, dtype=rows.dtype)
        bce = optax.sigmoid_binary_cross_entropy
        parts = {
            "class": _sum(bce(rows[..., 5:], classes), positive),
            "objectness": _sum(bce(rows[..., 4:5], positive[..., None].astype(rows.dtype)), positive | free),
            "xy": XY_WEIGHT * _sum(bce(rows[..., :2], wanted[..., :2]), positive),
            "wh": WH_WEIGHT * _sum((rows[..., 2:4] - wanted[..., 2:]) ** 2, positive),
        }
        totals = {name: total + parts[name] for name, total in totals.items()}
    return {name: total * IMAGES / outputs[0].shape[0] for name, total in totals.items()}


def assign(
    boxes: Float[Array, "m 4"],
    usable: Bool[Array, " m"],
    priors: Float[Array, "n 4"],
    cells: Int[Array, "n 2"],
    strides: Float[Array, "n 2"],
) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """Returns the object of each prior, −1 for none, and which priors are negative.

    Args:
      boxes: objects of an image.
      usable: which of them there are.
      priors: anchors of all levels.
      cells: (row, column) of each prior in its map.
      strides: pixels a cell of that map, (down, right).
    """
    overlap = jnp.where(usable[:, None], box_iou(boxes, priors), -1.0)
    centers = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None, ::-1]
    held = (jnp.floor(centers / strides[None]).astype(cells.dtype) == cells[None]).all(axis=-1)
    responsible = (held & usable[:, None]).any(axis=0)
    highest = overlap.max(axis=0, initial=-1.0)
    negative = highest <= POSITIVE
    there = jnp.where(responsible[None], overlap, -1.0)
    owner = jnp.where(there.max(axis=0, initial=-1.0) > POSITIVE, jnp.argmax(there, axis=0), -1)
    best = there.max(axis=1, keepdims=True)
    claims = (there == best) & (best > 0)
    last = len(boxes) - 1 - jnp.argmax(claims[::-1], axis=0)
    owner = jnp.where(claims.any(axis=0), last, owner)
    return owner, negative & (owner < 0)


def _cells(grid: tuple[int, int], anchors: int) -> np.ndarray:
    """Returns (row, column) of every prior of a map, in the order of `yolo_anchors`."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    return np.repeat(np.stack([rows.reshape(-1), columns.reshape(-1)], axis=1), anchors, axis=0).astype(np.int32)


def _sum(values: Array, where: Array) -> Array:
    return jnp.sum(jnp.where(where[..., None], values, 0)).astype(jnp.float32)


def yolo_distance(outputs: Sequence[Maps], clean_outputs: Sequence[Maps], heads: Sequence[Head]) -> Float[Array, ""]:
    """Returns how far what the heads give is from what they give for clean images, with minimum 0.

        1/n Σ_priors KL(o* ‖ o) + o*·[Σ_classes KL(c* ‖ c) + ‖xy − xy*‖² + ‖wh − wh*‖²]

    with the objectness o, the class probabilities c and the cell's coordinates xy behind the sigmoid;
    * marks the clean outputs. Boxes and classes matter where the clean network sees an object.

    Args:
      outputs, clean_outputs: maps of the heads.
      heads: one a map.
    """
    total = jnp.float32(0)
    for maps, clean, head in zip(outputs, clean_outputs, heads, strict=True):
        rows, wanted = (each.reshape(-1, 5 + head.classes) for each in (maps, clean))
        seen = jax.nn.sigmoid(wanted[:, 4])
        moved = jnp.sum((jax.nn.sigmoid(rows[:, :2]) - jax.nn.sigmoid(wanted[:, :2])) ** 2, axis=1)
        moved += jnp.sum((rows[:, 2:4] - wanted[:, 2:4]) ** 2, axis=1)
        classes = jnp.sum(_divergence(wanted[:, 5:], rows[:, 5:]), axis=1)
        total += jnp.sum(_divergence(wanted[:, 4], rows[:, 4]) + seen * (classes + moved))
    return total / outputs[0].shape[0]


def _divergence(wanted: Array, logits: Array) -> Array:
    """Returns KL(σ(wanted) ‖ σ(logits)) of single events."""
    return jax.nn.sigmoid(wanted) * (wanted - logits) + jax.nn.softplus(logits) - jax.nn.softplus(wanted)
