"""Logits of coarse feature maps as answers at the pixels of an image, in blocks of rows.

Logits of 150 classes at 1024 x 2048 pixels are 1.3 GB. What is computed of them, such as the class
of each pixel, is small, so a few rows of them are made at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Size = tuple[int, int]
"""(height, width) in pixels."""

BLOCK_NUMBERS = 2**23
"""Enlarged logits of one block, about: 32 MiB in float32."""


def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what bilinear resizing along one axis reads of `old` pixels, for each of the `new`.

    Pixel i has its center at (i + ½)·old/new − ½, between two pixels or beyond the outermost. It is
    PyTorch's `interpolate(…, mode="bilinear", align_corners=False)`, without antialiasing.

    >>> indices, weights = taps(2, 4)
    >>> indices.tolist(), weights.tolist()
    ([[0, 1], [0, 1], [0, 1], [1, 1]], [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [1.0, 0.0]])

    Returns:
      Indices, int32 (new, 2), and their weights, float32 (new, 2), which sum to 1.
    """
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    below = np.floor(at).astype(np.int32)
    above = np.minimum(below + 1, old - 1)
    weight = (at - below).astype(np.float32)
    return np.stack([below, above], axis=1), np.stack([1 - weight, weight], axis=1)


def chained_taps(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns what several resizes in turn read of the first size, for each pixel of the last.

    Args:
      sizes: lengths of the axis, two or more; n − 1 resizes.

    Returns:
      Indices and weights, (last size, 2^(resizes that change the size)), or (last size, 1) for none.
    """
    indices, weights = np.arange(sizes[-1], dtype=np.int32)[:, None], np.ones((sizes[-1], 1), np.float32)
    for old, new in zip(reversed(sizes[:-1]), reversed(sizes[1:]), strict=True):
        if old == new:
            continue
        before, parts = taps(old, new)
        weights = (weights[:, :, None] * parts[indices]).reshape(len(indices), -1)
        indices = before[indices].reshape(len(indices), -1)
    return indices, weights


def resized(maps: Float[Array, "n h w c"], sizes: Sequence[Size]) -> Float[Array, "n height width c"]:
    """Returns maps resized bilinearly to each of these sizes in turn.

    >>> resized(jnp.array([[[[0.0], [1.0]]]]), [(1, 4)])[0, 0, :, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    for axis in (1, 2):
        indices, weights = chained_taps([maps.shape[axis], *(size[axis - 1] for size in sizes)])
        if not _same(indices, maps.shape[axis]):
            maps = _read(maps, axis, indices, weights)
    return maps


def in_blocks(
    maps: Float[Array, "n h w c"],
    sizes: Sequence[Size],
    function: Callable[..., Any],
    *rows: Any,
    backward: bool = False,
) -> Any:
    """Returns `function` of enlarged maps, a block of rows at a time.

    Args:
      maps: logits.
      sizes: the maps are resized bilinearly to each of these in turn; one or more.
      function: (block (n, rows, width, c), valid rows bool (rows,), block of each of `rows`) ↦ a tree.
      rows: further maps of the last size, (n, height, width, …), cut into the same blocks.
      backward: whether gradients will be taken; blocks are then computed again for them.

    Returns:
      The trees of all blocks, with a first axis (blocks,). The last block may have rows beyond the
      map, which are not valid.
    """
    height, width = sizes[-1]
    count, classes = maps.shape[0], maps.shape[-1]
    block = int(np.clip(BLOCK_NUMBERS // max(1, count * width * classes), 1, height))
    blocks = -(-height // block)
    if blocks == 1:
        whole = function(resized(maps, sizes), jnp.ones(height, bool), *rows)
        return jax.tree_util.tree_map(lambda leaf: leaf[None], whole)
    block = -(-height // blocks)
    beyond = blocks * block - height
    indices, weights = chained_taps([maps.shape[1], *(size[0] for size in sizes)])
    indices, weights = (np.pad(part, ((0, beyond), (0, 0)), mode="edge") for part in (indices, weights))
    columns = chained_taps([maps.shape[2], *(size[1] for size in sizes)])

    def cut(part: Any) -> Any:
        part = jnp.pad(part, [(0, 0), (0, beyond)] + [(0, 0)] * (part.ndim - 2))
        return jnp.moveaxis(part.reshape(count, blocks, block, *part.shape[2:]), 1, 0)

    def one(piece: Any) -> Any:
        place, factors, valid, further = piece
        tall = sum(
            factors[:, tap, None, None].astype(maps.dtype)[None] * maps[:, place[:, tap]]
            for tap in range(place.shape[1])
        )
        wide = tall if _same(columns[0], maps.shape[2]) else _read(tall, 2, *columns)
        return function(wide, valid, *further)

    valid = np.arange(blocks * block) < height
    pieces = (
        jnp.asarray(indices.reshape(blocks, block, -1)),
        jnp.asarray(weights.reshape(blocks, block, -1)),
        jnp.asarray(valid.reshape(blocks, block)),
        tuple(map(cut, rows)),
    )
    return jax.lax.map(jax.checkpoint(one) if backward else one, pieces)


def classes_of(logits: Float[Array, "n h w c"], sizes: Sequence[Size]) -> Int[Array, "n height width"]:
    """Returns the class of each pixel: of the largest logit, the first of equal ones.

    A pixel whose largest logit is not finite has no class and gets the number of logits.

    Args:
      logits: at any fraction of the image.
      sizes: they are resized to each of these in turn before the comparison.

    Returns:
      int32, of the last size.
    """
    count = logits.shape[0]
    if not sizes or all(tuple(size) == logits.shape[1:3] for size in sizes):
        return largest(logits)
    height, width = sizes[-1]
    answers = in_blocks(logits, sizes, lambda block, valid: largest(block))
    return jnp.moveaxis(answers, 0, 1).reshape(count, -1, width)[:, :height]


def largest(logits: Float[Array, "*b c"]) -> Int[Array, "*b"]:
    """Returns the index of the largest logit; the number of logits where it is not finite.

    Two passes over all logits take half the time of `argmax` on a CPU.
    """
    count = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    places = jnp.arange(count, dtype=jnp.int32).reshape((1,) * (logits.ndim - 1) + (count,))
    first = jnp.min(jnp.where(logits == top, places, count), axis=-1)
    return jnp.where(jnp.isfinite(top[..., 0]), first, count)


def _same(indices: np.ndarray, length: int) -> bool:
    return indices.shape == (length, 1)


def _read(maps: Any, axis: int, indices: np.ndarray, weights: np.ndarray) -> Any:
    """Returns the weighted sum of the pixels that `indices` (new, taps) name along an axis."""
    shape = [1] * maps.ndim
    shape[axis] = len(indices)
    return sum(
        jnp.asarray(weights[:, tap].reshape(shape), maps.dtype)
        * jnp.take(maps, jnp.asarray(indices[:, tap]), axis=axis)
        for tap in range(indices.shape[1])
    )
