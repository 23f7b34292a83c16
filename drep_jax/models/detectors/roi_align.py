"""RoIAlign (He et al. 2017): a fixed number of cells a box, each the mean of bilinear samples.

Two samplings:
- "fixed:2" as torchvision: coordinates are not shifted, a side is at least one cell of the map, and
  each cell has 2 × 2 samples.
- "adaptive" as mmdetection and detectron2: coordinates are shifted by half a cell of the map, there
  is no least side, and a cell of the output has ⌈its height⌉ × ⌈its width⌉ samples, each box its
  own number.

A sample further outside than one cell counts as 0; nearer ones take the border's value.

Boxes are read in chunks, so memory is bounded by the chunk: chunk · cells² · channels numbers. The
samples of a chunk are a loop of as many rounds as its box with the most; boxes are sorted by that
number first. The gradient with respect to the maps is the same loop backwards; boxes get none.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from drep_jax.errors import ConfigError

ADAPTIVE = 0
"""Samples a side that stand for the adaptive number."""

CHUNK = 64


def level_of(
    boxes: Float[Array, "*batch n 4"], levels: int, *, kind: str = "mmdet", finest: float = 56.0
) -> Int[Array, "*batch n"]:
    """Returns the pyramid level of each box, clip(⌊log2(√(w·h) / finest)⌋, 0, levels − 1).

    >>> level_of(jnp.array([[0.0, 0.0, 111.0, 111.0], [0.0, 0.0, 112.0, 112.0]]), 4).tolist()
    [0, 1]

    Args:
      boxes: x0, y0, x1, y1 in pixels.
      levels: how many there are.
      kind: where 1e-6 is added, which decides for boxes of exactly a power of two: "mmdet" inside
        the logarithm, "torchvision" outside.
      finest: side of the smallest box of level 1, halved.

    Raises:
      ConfigError: for an unknown kind.
    """
    if kind not in ("mmdet", "torchvision"):
        raise ConfigError(f'Levels are chosen as by "mmdet" or "torchvision"; got "{kind}".')
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    scale = jnp.sqrt(sides[..., 0] * sides[..., 1]) / finest
    level = jnp.log2(scale + 1e-6) if kind == "mmdet" else jnp.log2(scale) + 1e-6
    return jnp.clip(jnp.floor(level), 0, levels - 1).astype(jnp.int32)


def roi_align(
    maps: Sequence[Float[Array, "batch _ _ channels"]],
    boxes: Float[Array, "batch n 4"],
    strides: Sequence[float],
    size: int,
    *,
    levels: Int[Array, "batch n"] | None = None,
    valid: Bool[Array, "batch n"] | None = None,
    samples: int = ADAPTIVE,
    aligned: bool = True,
    chunk: int = CHUNK,
) -> Float[Array, "batch n size size channels"]:
    """Returns the features of each box, size × size cells of its pyramid level.

    Args:
      maps: one a level, (batch, height, width, channels).
      boxes: x0, y0, x1, y1 in pixels of the image.
      strides: pixels a cell, one a level.
      size: cells a side of the output: 7 for boxes, 14 for masks.
      levels: of each box; None for `level_of`.
      valid: boxes that count; the others give zeros and cost nothing. None for all.
      samples: a side of each cell; `ADAPTIVE` for ⌈its size⌉.
      aligned: whether coordinates are shifted by half a cell and sides may be of any length; False
        as in torchvision.
      chunk: boxes at a time.

    Raises:
      ConfigError: for sizes that cannot be.
    """
    if size < 1 or samples < 0 or chunk < 1 or len(maps) != len(strides):
        raise ConfigError(
            f"RoIAlign needs size ≥ 1, samples ≥ 0, chunk ≥ 1 and one stride a map; got size={size}, samples={samples}, "
            f"chunk={chunk}, {len(maps)} maps and {len(strides)} strides."
        )
    batch, count = boxes.shape[:2]
    channels = maps[0].shape[-1]
    if not batch * count:
        return jnp.zeros((batch, count, size, size, channels), maps[0].dtype)
    boxes = boxes.astype(jnp.promote_types(boxes.dtype, jnp.float32))
    levels = level_of(boxes, len(maps)) if levels is None else levels
    valid = jnp.ones((batch, count), bool) if valid is None else valid
    heights, widths = (jnp.array([level.shape[axis] for level in maps], jnp.int32) for axis in (1, 2))
    starts, start = [], 0
    for level in maps:
        starts.append(start)
        start += level.shape[0] * level.shape[1] * level.shape[2]
    flat = jnp.concatenate([level.reshape(-1, channels) for level in maps])
    image = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], (batch, count))
    first = jnp.array(starts, jnp.int32)[levels] + image * (heights * widths)[levels]
    plan = _plan(
        boxes.reshape(-1, 4) / jnp.array(strides, boxes.dtype)[levels].reshape(-1, 1),
        first.reshape(-1),
        heights[levels].reshape(-1),
        widths[levels].reshape(-1),
        valid.reshape(-1),
        size,
        samples,
        aligned,
    )
    return _read(size, min(chunk, batch * count), flat, plan).reshape(batch, count, size, size, channels)


Plan = dict[str, Array]


def _plan(
    boxes: Array,
    first: Array,
    height: Array,
    width: Array,
    valid: Array,
    size: int,
    samples: int,
    aligned: bool,
) -> Plan:
    """Returns what is known of each box: corner, cell, samples a side, and where its map lies."""
    corner = boxes[:, :2] - (0.5 if aligned else 0.0)
    sides = boxes[:, 2:] - boxes[:, :2]
    sides = sides if aligned else jnp.maximum(sides, 1)
    cell = sides / size
    per_side = jnp.full(cell.shape, samples, jnp.int32) if samples else jnp.ceil(cell).astype(jnp.int32)
    there = valid & jnp.isfinite(boxes).all(axis=1)
    # A box of no side has no samples, as in mmdetection: its cells are 0.
    per_side = jnp.where(there[:, None], jnp.maximum(per_side, 0), 0)
    corner, cell = (jnp.where(there[:, None], values, 0) for values in (corner, cell))
    return {
        "corner": corner,
        "cell": cell,
        "per_side": per_side,
        "first": first,
        "height": height,
        "width": width,
    }


def _axis(position: Array, length: Array) -> tuple[Array, Array, Array, Array]:
    """Returns the two neighbors of positions on an axis, and their weights."""
    inside = (position >= -1.0) & (position <= length[:, None].astype(position.dtype))
    position = jnp.maximum(position, 0)
    last = (length - 1)[:, None]
    low = jnp.minimum(jnp.floor(position).astype(jnp.int32), last)
    high = jnp.minimum(low + 1, last)
    fraction = jnp.where(low >= last, 0, position - low.astype(position.dtype))
    return low, high, jnp.where(inside, 1 - fraction, 0), jnp.where(inside, fraction, 0)


def _neighbors(size: int, round_number: Array, plan: Plan) -> list[tuple[Array, Array]]:
    """Returns where one sample of each cell of each box is read, and the weights of that, for its four neighbors."""
    real = plan["corner"].dtype
    total = plan["per_side"][:, 0] * plan["per_side"][:, 1]
    down, right = jnp.divmod(round_number, jnp.maximum(plan["per_side"][:, 0], 1))

    def positions(axis: int, sample: Array) -> Array:
        corner, cell = plan["corner"][:, axis, None], plan["cell"][:, axis, None]
        within = (sample[:, None].astype(real) + 0.5) / jnp.maximum(plan["per_side"][:, axis, None], 1).astype(real)
        return corner + (jnp.arange(size, dtype=real)[None] + within) * cell

    y = _axis(positions(1, down), plan["height"])
    x = _axis(positions(0, right), plan["width"])
    share = jnp.where(round_number < total, 1 / jnp.maximum(total, 1), 0).astype(real)[:, None, None]
    return [
        (
            plan["first"][:, None, None] + row[:, :, None] * plan["width"][:, None, None] + column[:, None, :],
            of_row[:, :, None] * of_column[:, None, :] * share,
        )
        for row, of_row in ((y[0], y[2]), (y[1], y[3]))
        for column, of_column in ((x[0], x[2]), (x[1], x[3]))
    ]


def _chunks(chunk: int, plan: Plan) -> tuple[Plan, Array]:
    """Returns the plan in chunks of boxes of about as many samples, and the order of the boxes."""
    order = jnp.argsort(plan["per_side"][:, 0] * plan["per_side"][:, 1])
    missing = -len(order) % chunk
    return {
        name: jnp.pad(values[order], [(0, missing)] + [(0, 0)] * (values.ndim - 1)).reshape(
            -1, chunk, *values.shape[1:]
        )
        for name, values in plan.items()
    }, order


def _rounds(plan: Plan) -> Array:
    return jnp.max(plan["per_side"][:, 0] * plan["per_side"][:, 1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read(size: int, chunk: int, flat: Array, plan: Plan) -> Array:
    """Returns the cells of all boxes, (n, size, size, channels), from the maps laid end to end."""
    chunks, order = _chunks(chunk, plan)

    def read(part: Plan) -> Array:
        def add(i: Array, cells: Array) -> Array:
            for place, weight in _neighbors(size, i, part):
                cells += flat[place] * weight[..., None].astype(flat.dtype)
            return cells

        return lax.fori_loop(0, _rounds(part), add, jnp.zeros((chunk, size, size, flat.shape[1]), flat.dtype))

    values = lax.map(read, chunks).reshape(-1, size, size, flat.shape[1])[: len(order)]
    return jnp.zeros_like(values).at[order].set(values)


def _forward(size: int, chunk: int, flat: Array, plan: Plan) -> tuple[Array, tuple[Array, Plan]]:
    return _read(size, chunk, flat, plan), (flat, plan)


def _backward(size: int, chunk: int, kept: tuple[Array, Plan], gradient: Array) -> tuple[Array, None]:
    flat, plan = kept
    chunks, order = _chunks(chunk, plan)
    rows = jnp.pad(gradient[order], [(0, -len(order) % chunk)] + [(0, 0)] * 3).reshape(-1, chunk, *gradient.shape[1:])

    def spread(of_maps: Array, part: tuple[Plan, Array]) -> tuple[Array, None]:
        def add(i: Array, of_maps: Array) -> Array:
            for place, weight in _neighbors(size, i, part[0]):
                of_maps = of_maps.at[place].add(part[1] * weight[..., None].astype(flat.dtype))
            return of_maps

        return lax.fori_loop(0, _rounds(part[0]), add, of_maps), None

    return lax.scan(spread, jnp.zeros_like(flat), (chunks, rows))[0], None


_read.defvjp(_forward, _backward)
