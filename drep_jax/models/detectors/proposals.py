"""Candidates of static number: the best by score, which of them are valid, and how many did not fit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from drep_jax.models.detectors.nms import Form, nms


@struct.dataclass
class Candidates:
    """The k best of n scores, by falling score, invalid ones last.

    Attributes:
      index: (k,) places among the n scores; 0 where invalid.
      scores: (k,); −1 where invalid.
      valid: (k,) which of them there are.
      left_out: () number of those above the threshold that did not fit.
    """

    index: Int[Array, " k"]
    scores: Float[Array, " k"]
    valid: Bool[Array, " k"]
    left_out: Int[Array, ""]


@struct.dataclass
class Objects:
    """What was found in an image, by falling score, invalid ones last and filled with zeros.

    A leading axis of images is there where they are of a batch.

    Attributes:
      boxes: (k, 4) x0, y0, x1, y1 in pixels.
      scores: (k,) 0 where invalid.
      classes: (k,) from 0; −1 where invalid.
      valid: (k,).
      left_out: () candidates above the threshold that did not fit into the static number of them,
        and so could not be found. Above 0 the result may differ from that without a limit.
      masks: (k, m, m) probabilities of the pixels of each box, m × m cells over it; None where the
        network finds boxes only. `pasting` brings them into the image.
    """

    boxes: Float[Array, "*batch k 4"]
    scores: Float[Array, "*batch k"]
    classes: Int[Array, "*batch k"]
    valid: Bool[Array, "*batch k"]
    left_out: Int[Array, "*batch"]
    masks: Float[Array, "*batch k m m"] | None = None


def each(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function of single items returns for all items, the first axis of every argument.

    On CPUs one item after the other: under `vmap` a loop runs as long as the longest of the batch,
    and computes what it skips. Elsewhere all at once.

    Args:
      function: called with the items and `form`, the form of suppression that suits the platform.
      *arguments: arrays, or trees of them.
    """
    return lax.platform_dependent(
        *arguments,
        cpu=lambda *items: lax.map(lambda item: function(*item, form="sequential"), items),
        default=lambda *items: jax.vmap(lambda *item: function(*item, form="fixed_point"))(*items),
    )


def best(
    scores: Float[Array, " n"], k: int, *, threshold: float = -jnp.inf, valid: Bool[Array, " n"] | None = None
) -> Candidates:
    """Returns the k best scores above a threshold; equal ones in their order.

    >>> candidates = best(jnp.array([0.1, 0.9, 0.4]), 2, threshold=0.2)
    >>> candidates.index.tolist(), candidates.valid.tolist(), int(candidates.left_out)
    ([1, 2], [True, True], 0)

    Args:
      scores: of anything; NaN is never valid.
      k: how many are returned, padded if there are fewer.
      threshold: valid scores are above it, strictly.
      valid: which of them count; None for all.
    """
    known = scores > threshold
    known = known if valid is None else known & valid
    count = min(k, scores.shape[0])
    ranked, index = lax.top_k(jnp.where(known, scores, -jnp.inf), count)
    there = ranked > -jnp.inf
    more = (0, k - count)
    return Candidates(
        jnp.pad(jnp.where(there, index, 0), more),
        jnp.pad(jnp.where(there, ranked, -1), more, constant_values=-1),
        jnp.pad(there, more),
        jnp.maximum(jnp.sum(known) - k, 0),
    )


def best_of_levels(levels: Sequence[Float[Array, " n"]], k: int, *, threshold: float = -jnp.inf) -> Candidates:
    """Returns the k best scores of each pyramid level, one level after the other.

    Args:
      levels: scores of each level, (n_l,).
      k: how many are taken of a level; all of one that has fewer.
      threshold: as for `best`.

    Returns:
      Σ min(k, n_l) candidates; the index counts through the levels laid end to end, in their order.
    """
    parts, indices, start = [], [], 0
    for scores in levels:
        part = best(scores, min(k, scores.shape[0]), threshold=threshold)
        parts.append(part)
        indices.append(jnp.where(part.valid, part.index + start, 0))
        start += scores.shape[0]
    return Candidates(
        index=jnp.concatenate(indices),
        scores=jnp.concatenate([part.scores for part in parts]),
        valid=jnp.concatenate([part.valid for part in parts]),
        left_out=jnp.sum(jnp.stack([part.left_out for part in parts])),
    )


def suppressed(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    classes: Int[Array, " n"],
    *,
    threshold: float,
    k: int,
    valid: Bool[Array, " n"] | None = None,
    apart: Int[Array, " n"] | None = None,
    left_out: Int[Array, ""] | int = 0,
    form: Form = "auto",
) -> Objects:
    """Returns the k best boxes that non-maximum suppression keeps, by falling score.

    Args:
      boxes, scores, classes: the candidates.
      threshold: IoU of `nms`.
      k: how many are returned.
      valid: which candidates count; None for all.
      apart: candidates that differ in this never suppress each other, such as pyramid levels of
        proposals; None for the classes.
      left_out: candidates that were left out before, for the result.
      form: of `nms`.
    """
    keep = nms(boxes, scores, threshold, classes=classes if apart is None else apart, valid=valid, form=form)
    top = best(scores, k, valid=keep)
    return Objects(
        jnp.where(top.valid[:, None], boxes[top.index], 0),
        jnp.where(top.valid, top.scores, 0),
        jnp.where(top.valid, classes[top.index], -1),
        top.valid,
        jnp.asarray(left_out, jnp.int32),
    )


def best_pairs(scores: Float[Array, "boxes classes"], k: int, *, threshold: float) -> tuple[Candidates, Array, Array]:
    """Returns the k best (box, class) pairs above a threshold; equal ones in their order.

    Where there are more boxes than k, those k are looked at whose best class is best: no pair of
    another box is among the k best ones, so the result is the same and much less is sorted.

    Args:
      scores: of each box and class.
      k: how many; the public detectors take all, which have no static number: choose 2,000 to
        4,000 and look at `left_out`.
      threshold: pairs above it are valid, strictly.

    Returns:
      The candidates, the box of each (k,), and its class (k,).
    """
    boxes, classes = scores.shape
    if boxes <= k or not classes:
        candidates = best(scores.reshape(-1), k, threshold=threshold)
        box, label = jnp.divmod(candidates.index, max(classes, 1))
        return candidates, box, label
    known = scores > threshold
    ranked = jnp.where(known, scores, -jnp.inf)
    chosen = jnp.sort(lax.top_k(ranked.max(axis=1), k)[1])
    candidates = best(ranked[chosen].reshape(-1), k)
    row, label = jnp.divmod(candidates.index, classes)
    box = jnp.where(candidates.valid, chosen[row], 0)
    left_out = jnp.maximum(jnp.sum(known) - k, 0).astype(candidates.left_out.dtype)
    index = jnp.where(candidates.valid, box * classes + label, 0)
    return Candidates(index, candidates.scores, candidates.valid, left_out), box, label
