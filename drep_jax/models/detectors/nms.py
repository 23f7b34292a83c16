"""Exact greedy non-maximum suppression with static shapes.

Boxes are visited by falling score, equal ones in their order; a box is kept unless a kept one of
its class overlaps it by an IoU above the threshold (strictly). Classes are compared, not told apart
by shifted coordinates, which would round the boxes.

Two forms give the same boxes. The sequential one computes one row of IoUs a kept box, needs O(n)
memory, and wins on CPUs. The fixed point keeps a box if no kept one before it overlaps it, and
repeats that until nothing changes: keep ← valid ∧ ¬∃j: (j before i, same class, IoU > t) ∧ keep_j.
It takes as many rounds as the longest chain of boxes that decide on each other, which is few, and
suits accelerators.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from drep_jax.errors import ConfigError, did_you_mean
from drep_jax.models.detectors.overlaps import box_iou

Form = Literal["auto", "sequential", "fixed_point"]
FORMS = ("auto", "sequential", "fixed_point")


def usable(boxes: Float[Array, "*batch n 4"], scores: Float[Array, "*batch n"]) -> Bool[Array, "*batch n"]:
    """Returns which boxes can be ranked: those of finite coordinates and a score that is not NaN."""
    return jnp.isfinite(boxes).all(axis=-1) & ~jnp.isnan(scores)


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    threshold: float,
    *,
    classes: Int[Array, " n"] | None = None,
    valid: Bool[Array, " n"] | None = None,
    form: Form = "auto",
) -> Bool[Array, " n"]:
    """Returns which boxes greedy non-maximum suppression keeps.

    >>> boxes = jnp.array([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [9.0, 9.0, 10.0, 10.0]])
    >>> nms(boxes, jnp.array([0.8, 0.9, 0.1]), 0.5).tolist()
    [False, True, True]

    Args:
      boxes: x0, y0, x1, y1.
      scores: of the boxes.
      threshold: a box goes if its IoU with a kept one is above this.
      classes: boxes of different classes (or pyramid levels) never suppress each other; None for a
        single class.
      valid: which boxes count; None for all. Boxes with NaN or Inf, or a score of NaN, never count.
      form: "sequential", "fixed_point", or "auto" for the one that suits the platform. For a batch,
        use `jax.vmap`, or on CPUs `jax.lax.map`.

    Raises:
      ConfigError: for an unknown form.
    """
    if form not in FORMS:
        raise ConfigError(f'Unknown form of suppression "{form}".{did_you_mean(form, FORMS)}')
    count = len(boxes)
    boxes, scores = jnp.asarray(boxes), jnp.asarray(scores)
    known = usable(boxes, scores)
    known = known if valid is None else known & valid
    classes = jnp.zeros(count, jnp.int32) if classes is None else jnp.asarray(classes)
    # Invalid boxes go last; the sort is stable.
    order = jnp.lexsort((-scores, ~known))
    arguments = (jnp.where(known[:, None], boxes, 0)[order], classes[order], known[order])
    if form == "sequential":
        keep = _sequential(threshold, *arguments)
    elif form == "fixed_point":
        keep = _fixed_point(threshold, *arguments)
    else:
        keep = lax.platform_dependent(
            *arguments,
            cpu=lambda *values: _sequential(threshold, *values),
            default=lambda *values: _fixed_point(threshold, *values),
        )
    return jnp.zeros(count, bool).at[order].set(keep)


def _sequential(threshold: float, boxes: Array, classes: Array, valid: Array) -> Array:
    """Returns which of the boxes are kept; they are sorted, the valid ones first."""
    # Side by side in memory, a coordinate of all boxes is read in vectors.
    x0, y0, x1, y1 = (boxes[:, axis] for axis in range(4))
    area = jnp.maximum(x1 - x0, 0) * jnp.maximum(y1 - y0, 0)
    place = jnp.arange(len(boxes))

    def visit(i: Array, keep: Array) -> Array:
        def clear(keep: Array) -> Array:
            width = jnp.maximum(jnp.minimum(x1, x1[i]) - jnp.maximum(x0, x0[i]), 0)
            height = jnp.maximum(jnp.minimum(y1, y1[i]) - jnp.maximum(y0, y0[i]), 0)
            shared = width * height
            overlap = shared / jnp.where(shared > 0, area[i] + area - shared, 1)
            return keep & ~((overlap > threshold) & (classes == classes[i]) & (place > i))

        return lax.cond(keep[i], clear, lambda keep: keep, keep)

    return lax.fori_loop(0, jnp.sum(valid), visit, valid)


def _fixed_point(threshold: float, boxes: Array, classes: Array, valid: Array) -> Array:
    """Returns which of the boxes are kept; they are sorted."""
    place = jnp.arange(len(boxes))
    decides = (
        (box_iou(boxes, boxes) > threshold)
        & (classes[:, None] == classes[None, :])
        & (place[:, None] < place[None, :])
        & valid[:, None]
    )

    def again(state: tuple[Array, Array]) -> Array:
        return jnp.any(state[0] != state[1])

    def round_of(state: tuple[Array, Array]) -> tuple[Array, Array]:
        keep = state[1]
        return keep, valid & ~jnp.any(decides & keep[:, None], axis=0)

    return lax.while_loop(again, round_of, (jnp.zeros_like(valid), valid))[1] & valid


__all__ = ["FORMS", "Form", "nms", "usable"]
