"""Boxes taken back to the stored image inside a compiled program, from `Transform`s as rows of a batch."""

from typing import Any

import jax.numpy as jnp

from drep_jax.data.geometry import MOST_STEPS, STEP_NUMBERS
from drep_jax.data.steps import Orient, Resize, Window

_CODES = [Orient(code) for code in range(1, 9)]
_PARTS = [[float(flag) for flag in step.parts] for step in _CODES]


def boxes_back(rows: Any, boxes: Any) -> Any:
    """Returns boxes of the images of a batch as boxes of the images as they were decoded.

    Every step of a transform is an affine map of points that may swap the axes,
    p' = M p + t, and so are all of them together; boxes go through its inverse. What lies outside
    the stored image stays there.

    Args:
      rows: the column "transform" of the batch, int32 (n, 42).
      boxes: (n, m, 4) x0, y0, x1, y1 in pixels of the image in the batch.

    Returns:
      (n, m, 4) of the same type, to its precision; of rows of zeros any values.
    """
    dtype = boxes.dtype
    numbers = rows.astype(dtype)
    size = numbers[:, :2]
    steps = numbers[:, 2:].reshape(-1, MOST_STEPS, STEP_NUMBERS)
    count = len(rows)
    matrix = jnp.broadcast_to(jnp.eye(2, dtype=dtype)[None], (count, 2, 2))
    moved = jnp.zeros((count, 2), dtype)
    parts = jnp.asarray(_PARTS, dtype)
    for number in range(MOST_STEPS):
        step, kind = steps[:, number], rows[:, 2 + number * STEP_NUMBERS]
        own, offset, size = _affine(step, kind, size, parts)
        matrix = own @ matrix
        moved = (own @ moved[:, :, None])[:, :, 0] + offset
    a, b, c, d = matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1]
    determinant = a * d - b * c
    determinant = jnp.where(determinant == 0, 1, determinant)[:, None, None]
    inverse = jnp.stack([jnp.stack([d, -b], axis=-1), jnp.stack([-c, a], axis=-1)], axis=-2) / determinant
    corners = jnp.stack([boxes[..., :2], boxes[..., 2:]], axis=2) - moved[:, None, None, :]
    back = jnp.einsum("nij,nmcj->nmci", inverse, corners)
    return jnp.concatenate([back.min(axis=2), back.max(axis=2)], axis=-1)


def _affine(step: Any, kind: Any, size: Any, parts: Any) -> tuple[Any, Any, Any]:
    """Returns (M, t, size afterwards) of one step of every row."""
    height, width = size[:, 0], size[:, 1]
    one, zero = jnp.ones_like(height), jnp.zeros_like(height)
    code = jnp.clip(jnp.where(kind == Orient.KIND, step[:, 1], 1).astype(jnp.int32) - 1, 0, 7)
    swap, flip_y, flip_x = (parts[code, place] for place in range(3))
    tall, wide = (jnp.where(swap > 0, *pair) for pair in ((width, height), (height, width)))
    turned = _of(kind, Orient)
    resized, window = _of(kind, Resize), _of(kind, Window)
    sign_x, sign_y = 1 - 2 * flip_x, 1 - 2 * flip_y
    across = jnp.where(resized, step[:, 2] / jnp.maximum(width, 1), jnp.where(turned, sign_x, one))
    down = jnp.where(resized, step[:, 1] / jnp.maximum(height, 1), jnp.where(turned, sign_y, one))
    straight, crossed = jnp.where(turned & (swap > 0), zero, one), jnp.where(turned & (swap > 0), one, zero)
    matrix = jnp.stack(
        [
            jnp.stack([across * straight, across * crossed], axis=-1),
            jnp.stack([down * crossed, down * straight], axis=-1),
        ],
        axis=-2,
    )
    offset_x = jnp.where(turned, flip_x * wide, jnp.where(window, -step[:, 2], zero))
    offset_y = jnp.where(turned, flip_y * tall, jnp.where(window, -step[:, 1], zero))
    resized_to = jnp.stack([step[:, 1], step[:, 2]], axis=-1)
    shown = jnp.stack([step[:, 3], step[:, 4]], axis=-1)
    after = jnp.where(resized[:, None], resized_to, jnp.where(window[:, None], shown, jnp.stack([tall, wide], axis=-1)))
    after = jnp.where((kind == 0)[:, None], size, after)
    return matrix, jnp.stack([offset_x, offset_y], axis=-1), after


def _of(kind: Any, step: Any) -> Any:
    return kind == step.KIND
