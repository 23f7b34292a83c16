"""How much boxes overlap: intersection over union, and its generalized form."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Boxes = Float[Array, "*batch boxes 4"]


def box_area(boxes: Boxes) -> Float[Array, "*batch boxes"]:
    """Returns (x1 − x0)·(y1 − y0); 0 for boxes of a negative side."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def box_iou(boxes: Float[Array, "*batch n 4"], others: Float[Array, "*batch m 4"]) -> Float[Array, "*batch n m"]:
    """Returns the intersection over union of all pairs, |A ∩ B| / |A ∪ B|; 0 where the intersection is empty.

    >>> box_iou(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[1.0, 0.0, 3.0, 2.0], [2.0, 0.0, 3.0, 1.0]])).round(3).tolist()
    [[0.3330000042915344, 0.0]]

    Args:
      boxes, others: x0, y0, x1, y1. Boxes of no area overlap nothing.
    """
    shared, union = _parts(boxes, others)
    return jnp.where(shared > 0, shared / jnp.where(shared > 0, union, 1), 0)


def generalized_iou(
    boxes: Float[Array, "*batch n 4"], others: Float[Array, "*batch m 4"]
) -> Float[Array, "*batch n m"]:
    """Returns IoU − |hull \\ (A ∪ B)| / |hull|, between −1 and 1 (Rezatofighi et al. 2019).

    Args:
      boxes, others: x0, y0, x1, y1. Where even the hull has no area, the value is that of the IoU, 0.
    """
    shared, union = _parts(boxes, others)
    iou = jnp.where(shared > 0, shared / jnp.where(shared > 0, union, 1), 0)
    first, second = boxes[..., :, None, :], others[..., None, :, :]
    low, high = jnp.minimum(first[..., :2], second[..., :2]), jnp.maximum(first[..., 2:], second[..., 2:])
    hull = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    return iou - jnp.where(hull > 0, (hull - union) / jnp.where(hull > 0, hull, 1), 0)


def _parts(boxes: Array, others: Array) -> tuple[Array, Array]:
    """Returns areas of intersection and union of all pairs."""
    first, second = boxes[..., :, None, :], others[..., None, :, :]
    sides = jnp.minimum(first[..., 2:], second[..., 2:]) - jnp.maximum(first[..., :2], second[..., :2])
    sides = jnp.maximum(sides, 0)
    shared = sides[..., 0] * sides[..., 1]
    return shared, box_area(boxes)[..., :, None] + box_area(others)[..., None, :] - shared
