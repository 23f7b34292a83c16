"""Boxes as what a network predicts: deltas to anchors, YOLO's cells, distances to the sides."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST_LOG = math.log(1000 / 16)
"""Bound of the logarithm of a side's ratio, 4.1352."""

RCNN_STDS = (0.1, 0.1, 0.2, 0.2)
"""Of the second stage of R-CNNs and of ATSS; torchvision's weights 10, 10, 5, 5."""

Boxes = Float[Array, "*batch n 4"]


def to_centers(boxes: Boxes) -> Boxes:
    """Returns x0, y0, x1, y1 as center x, center y, width, height."""
    return jnp.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=-1)


def from_centers(centers: Boxes) -> Boxes:
    """Returns center x, center y, width, height as x0, y0, x1, y1."""
    half = centers[..., 2:] / 2
    return jnp.concatenate([centers[..., :2] - half, centers[..., :2] + half], axis=-1)


def clip_boxes(boxes: Boxes, size: Float[Array, "*batch 2"]) -> Boxes:
    """Returns boxes cut at the borders of the image, [0, width] × [0, height].

    Args:
      boxes: x0, y0, x1, y1.
      size: (height, width) of the image without its padding.
    """
    limit = jnp.concatenate([size[..., ::-1], size[..., ::-1]], axis=-1)[..., None, :].astype(boxes.dtype)
    return jnp.clip(boxes, 0, jnp.broadcast_to(limit, boxes.shape))


def encode_deltas(boxes: Boxes, anchors: Boxes, *, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Boxes:
    """Returns the deltas of boxes to anchors (Girshick et al. 2014).

        dx = (x − x_a)/w_a, dy = (y − y_a)/h_a, dw = ln(w/w_a), dh = ln(h/h_a), divided by stds

    Args:
      boxes, anchors: x0, y0, x1, y1, of positive sides.
      stds: of dx, dy, dw, dh.
    """
    box, anchor = to_centers(boxes), to_centers(anchors)
    moved = (box[..., :2] - anchor[..., :2]) / anchor[..., 2:]
    scaled = jnp.log(box[..., 2:] / anchor[..., 2:])
    return jnp.concatenate([moved, scaled], axis=-1) / _row(stds, boxes)


def decode_deltas(
    deltas: Boxes,
    anchors: Boxes,
    *,
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clamp_below: bool = True,
    largest_log: float = LARGEST_LOG,
) -> Boxes:
    """Returns the boxes of deltas; the inverse of `encode_deltas` where nothing is clamped.

    Args:
      deltas: of each anchor.
      anchors: x0, y0, x1, y1.
      stds: as for `encode_deltas`.
      clamp_below: whether dw and dh are clamped to ±`largest_log`, as in mmdetection; False clamps
        the upper side only, as in torchvision and detectron2.
      largest_log: the bound.
    """
    scaled = deltas * _row(stds, deltas)
    logs = jnp.clip(scaled[..., 2:], -largest_log if clamp_below else None, largest_log)
    anchor = to_centers(anchors)
    centers = anchor[..., :2] + scaled[..., :2] * anchor[..., 2:]
    return from_centers(jnp.concatenate([centers, anchor[..., 2:] * jnp.exp(logs)], axis=-1))


def decode_yolo(outputs: Boxes, anchors: Boxes, stride: float | Sequence[float], *, scale_xy: float = 1.0) -> Boxes:
    """Returns the boxes of a YOLOv3 head.

        center = anchor's center + (σ(xy) − ½)·scale·stride, size = anchor's size · e^wh

    Args:
      outputs: x, y, w, h as the last convolution gives them.
      anchors: of `drep_jax.models.detectors.anchors.yolo_anchors`.
      stride: pixels a cell, or (down, right).
      scale_xy: darknet's `scale_x_y`, 1 in YOLOv3.
    """
    anchor = to_centers(anchors)
    cell = _cell(stride, outputs)
    centers = anchor[..., :2] + (jax.nn.sigmoid(outputs[..., :2]) - 0.5) * scale_xy * cell
    return from_centers(jnp.concatenate([centers, anchor[..., 2:] * jnp.exp(outputs[..., 2:])], axis=-1))


def encode_yolo(boxes: Boxes, anchors: Boxes, stride: float | Sequence[float], *, eps: float = 1e-6) -> Boxes:
    """Returns the targets of a YOLOv3 head: σ(x), σ(y), w, h.

    Args:
      boxes: of positive sides, with their centers in the anchors' cells.
      anchors, stride: as for `decode_yolo`.
      eps: the first two are kept this far from 0 and 1, where their logits would be infinite.
    """
    box, anchor = to_centers(boxes), to_centers(anchors)
    inside = jnp.clip((box[..., :2] - anchor[..., :2]) / _cell(stride, boxes) + 0.5, eps, 1 - eps)
    return jnp.concatenate([inside, jnp.log(box[..., 2:] / anchor[..., 2:])], axis=-1)


def decode_distances(distances: Boxes, points: Float[Array, "*batch n 2"]) -> Boxes:
    """Returns the boxes whose sides lie this far left of, above, right of and below points.

    >>> decode_distances(jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.array([[10.0, 10.0]])).tolist()
    [[9.0, 8.0, 13.0, 14.0]]
    """
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def encode_distances(boxes: Boxes, points: Float[Array, "*batch n 2"]) -> Boxes:
    """Returns the distances from points to the left, upper, right and lower side; negative where a point lies outside."""
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def _row(values: Sequence[float], like: Array) -> Array:
    """Returns four numbers in the shape of one box among `like`."""
    return jnp.asarray(values, like.dtype).reshape((1,) * (like.ndim - 1) + (4,))


def _cell(stride: float | Sequence[float], like: Array) -> Array:
    """Returns the width and height of a cell in the shape of one point among `like`."""
    down, right = stride if isinstance(stride, Sequence) else (stride, stride)
    return jnp.asarray([right, down], like.dtype).reshape((1,) * (like.ndim - 1) + (2,))
