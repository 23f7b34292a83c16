"""Which boxes learn from which objects: assignment by largest overlap, and random samples of static number."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from drep_jax.models.detectors.overlaps import box_iou

LowQuality = Literal["none", "mmdet", "torchvision"]
IGNORED = -2
BACKGROUND = -1


@struct.dataclass
class Samples:
    """Boxes of an image that the second stage learns from, the positive ones first.

    Attributes:
      index: (k,) places among the boxes that were sampled.
      matched: (k,) the object of each; `BACKGROUND` where it has none.
      valid: (k,) which samples there are.
    """

    index: Int[Array, "*batch k"]
    matched: Int[Array, "*batch k"]
    valid: Bool[Array, "*batch k"]


def assign(
    boxes: Float[Array, "n 4"],
    objects: Float[Array, "m 4"],
    there: Bool[Array, " m"],
    *,
    positive: float,
    negative: float,
    least: float = 0.0,
    low_quality: LowQuality = "none",
) -> Int[Array, " n"]:
    """Returns the object of each box, `BACKGROUND` where it has none, `IGNORED` in between (Ren et al. 2015).

    A box is background if its largest overlap is below `negative`, and of that object if it is at
    least `positive`. Low-quality matches are the boxes that attain an object's own largest overlap.

    Args:
      boxes: x0, y0, x1, y1.
      objects: of which `there` says which there are.
      there: see above.
      positive, negative: IoU.
      least: least overlap of a low-quality match.
      low_quality: "none"; "mmdet": such a box is given to that object, in the order of the objects,
        a later one overwriting; "torchvision": to the object that it overlaps most.
    """
    overlap = jnp.where(there[:, None], box_iou(objects, boxes), -1)
    largest, owner = jnp.max(overlap, axis=0), jnp.argmax(overlap, axis=0)
    result = jnp.where(largest < negative, BACKGROUND, IGNORED)
    result = jnp.where(largest >= positive, owner, result)
    if low_quality == "none":
        return result.astype(jnp.int32)
    best = jnp.max(overlap, axis=1, keepdims=True)
    attained = (overlap == best) & (best > 0) & (best >= least) & there[:, None]
    last = jnp.max(jnp.where(attained, jnp.arange(len(objects))[:, None], -1), axis=0)
    given = last if low_quality == "mmdet" else owner
    return jnp.where(last >= 0, given, result).astype(jnp.int32)


def sample(
    key: Array, matched: Int[Array, " n"], count: int, most_positive: int, *, usable: Bool[Array, " n"] | None = None
) -> Samples:
    """Returns a random sample of boxes: at most so many with an object, the rest background.

    Args:
      key: of the draw.
      matched: of `assign`; `IGNORED` boxes are never drawn.
      count: samples in all; fewer where there are fewer boxes.
      most_positive: of those with an object.
      usable: which boxes count; None for all.
    """
    usable = jnp.ones(matched.shape, bool) if usable is None else usable
    draw = jax.random.uniform(key, matched.shape)
    size = len(matched)

    def first(chosen: Array, most: int) -> tuple[Array, Array]:
        chosen &= usable
        _, index = lax.top_k(jnp.where(chosen, draw, -1), min(most, size))
        return jnp.pad(index, (0, count - len(index))), jnp.minimum(jnp.sum(chosen), most)

    positives, positive_count = first(matched >= 0, min(most_positive, count))
    negatives, negative_count = first(matched == BACKGROUND, count)
    place = jnp.arange(count)
    index = jnp.where(place < positive_count, positives, jnp.roll(negatives, positive_count))
    valid = place < jnp.minimum(positive_count + negative_count, count)
    index = jnp.where(valid, index, 0)
    return Samples(index, jnp.where(place < positive_count, matched[index], BACKGROUND), valid)


def as_labels(samples: Samples, size: int) -> Int[Array, " n"]:
    """Returns the object of each of `size` boxes, `BACKGROUND` or, where it was not drawn, `IGNORED`."""
    place = jnp.where(samples.valid, samples.index, size)
    return jnp.full(size, IGNORED, jnp.int32).at[place].set(samples.matched, mode="drop")
