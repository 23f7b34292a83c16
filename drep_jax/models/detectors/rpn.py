"""Region proposals (Ren et al. 2015): a small head over all levels of a pyramid, and the boxes that are kept of it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from drep_jax.models.detectors.coders import clip_boxes, decode_deltas
from drep_jax.models.detectors.nms import Form, nms
from drep_jax.models.detectors.proposals import each

Maps = Float[Array, "batch height width channels"]
_normal = nn.initializers.normal(0.01)


class RPNHead(nn.Module):
    """3×3 convolutions with ReLU, then objectness and deltas of each anchor of a cell; shared by all levels.

    It runs layer by layer over the levels, so that the input of no call waits for another call of
    the same layer.

    Attributes:
      anchors: of a cell.
      convs: number of 3×3 convolutions.
    """

    anchors: int = 3
    convs: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Sequence[Maps]) -> tuple[Float[Array, "batch n"], Float[Array, "batch n 4"]]:
        """Returns logits of the objectness and deltas of all anchors: levels, rows, cells, anchors of a cell."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = list(pyramid)
        for i in range(self.convs):
            name = f"conv{i + 1}" if i else "conv"
            conv = nn.Conv(maps[0].shape[-1], (3, 3), padding=1, kernel_init=_normal, **dtypes, name=name)
            maps = [nn.relu(conv(x)) for x in maps]
        objectness = nn.Conv(self.anchors, (1, 1), kernel_init=_normal, **dtypes, name="objectness")
        logits = [objectness(x) for x in maps]
        box = nn.Conv(4 * self.anchors, (1, 1), kernel_init=_normal, **dtypes, name="deltas")
        deltas = [box(x) for x in maps]
        return (
            jnp.concatenate([x.reshape(x.shape[0], -1) for x in logits], axis=1),
            jnp.concatenate([x.reshape(x.shape[0], -1, 4) for x in deltas], axis=1),
        )


def propose(
    objectness: Float[Array, "batch n"],
    deltas: Float[Array, "batch n 4"],
    anchors: Sequence[np.ndarray],
    size: Float[Array, "batch 2"],
    *,
    per_level: int,
    keep: int,
    iou: float = 0.7,
    least: float = 0.0,
    clamp_below: bool = True,
) -> tuple[Float[Array, "batch k 4"], Float[Array, "batch k"], Bool[Array, "batch k"]]:
    """Returns the proposals of each image: boxes, scores and which are there, by falling score.

    Of each level the best by objectness, without those that overlap a better one of their level;
    of these the best.

    Args:
      objectness: logits, as `RPNHead` lays them.
      deltas: of the anchors.
      anchors: of each level, (n_l, 4).
      size: height and width of each image without its padding, to which boxes are clipped.
      per_level: candidates of a level.
      keep: proposals of an image; fewer where there are fewer candidates.
      iou: threshold of the suppression.
      least: sides of a box are above it if it is 0, at least it otherwise.
      clamp_below: as for `decode_deltas`.
    """
    # Suppression and ranking have no gradient; proposals are constants of the second stage.
    objectness, deltas = lax.stop_gradient(objectness), lax.stop_gradient(deltas)
    most = min(per_level, max(len(level) for level in anchors))
    boxes, scores, valid, start = [], [], [], 0
    for level in anchors:
        end, count = start + len(level), min(per_level, len(level))
        ranked, index = lax.top_k(objectness[:, start:end], count)
        chosen = jnp.take_along_axis(deltas[:, start:end], index[..., None], axis=1)
        decoded = decode_deltas(chosen, jnp.asarray(level, deltas.dtype)[index], clamp_below=clamp_below)
        decoded = clip_boxes(decoded, size)
        sides = decoded[..., 2:] - decoded[..., :2]
        there = (sides >= least if least else sides > 0).all(axis=-1)
        more = ((0, 0), (0, most - count))
        boxes.append(jnp.pad(decoded, (*more, (0, 0))))
        scores.append(jnp.pad(jax.nn.sigmoid(ranked), more))
        valid.append(jnp.pad(there, more))
        start = end
    levels, batch = len(anchors), len(objectness)
    rows = [
        jnp.stack(parts, axis=1).reshape(batch * levels, most, *parts[0].shape[2:]) for parts in (boxes, scores, valid)
    ]

    def suppress(boxes: Array, scores: Array, valid: Array, *, form: Form) -> Array:
        return nms(boxes, scores, iou, valid=valid, form=form)

    kept = each(suppress, *rows)
    ranks = jnp.where(kept, rows[1], -1).reshape(batch, levels * most)
    best, index = lax.top_k(ranks, min(keep, levels * most))
    found = jnp.take_along_axis(rows[0].reshape(batch, levels * most, 4), index[..., None], axis=1)
    there = best >= 0
    return jnp.where(there[..., None], found, 0), jnp.where(there, best, 0), there
