"""CenterNet-update's loss: a heat map of every class, boxes where objects are centered, and adaptive positives."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from drep_jax.models.detectors.anchors import grid_points
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.coders import encode_distances
from drep_jax.models.detectors.losses import masked_sum, paired_giou
from drep_jax.models.detectors.overlaps import box_area

RANGES = ((0, 80), (64, 160), (128, 320), (256, 640), (512, 1e9))
"""Half diagonals, in pixels, of the objects of each level."""
DELTA = (1 - 0.8) / (1 + 0.8)
SMALLEST_RADIUS = 4.0
LEAST_HEAT = 1e-4
LARGEST_LOSS, MOST_POSITIVES = 0.2, 9
"""Of the cells around a center that are positives for their class as well."""
POSITIVE, NEGATIVE = 0.25, 0.75


@struct.dataclass
class _Wanted:
    """Of one image: heat map, distances in units of the stride and where there are any, positives (objects, candidates)."""

    heat: Float[Array, "places classes"]
    distances: Float[Array, "places 4"]
    regressed: Bool[Array, " places"]
    positives: Int[Array, "objects candidates"]
    positive: Bool[Array, "objects candidates"]


class _Grid:
    """The cells of the levels, one after the other."""

    def __init__(self, shapes: Sequence[tuple[int, int]], strides: Sequence[int]) -> None:
        self.shapes, self.strides = np.asarray(shapes), np.asarray(strides)
        counts = self.shapes.prod(1)
        self.starts = np.cumsum(counts) - counts
        self.points = np.concatenate([grid_points(*level) for level in zip(shapes, strides, strict=True)])
        self.stride = np.repeat(self.strides, counts).astype(np.float32)
        self.low, self.high = (
            np.repeat(np.asarray(column, np.float32), counts) for column in zip(*RANGES, strict=True)
        )


def _half_diagonal(distances: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    sides = distances[..., :2] + distances[..., 2:]
    return jnp.sqrt((sides**2).sum(-1)) / 2


def _heat_and_boxes(grid: _Grid, boxes: Array, labels: Array, there: Array, classes: int) -> tuple[Array, Array, Array]:
    """Returns the heat map, the distances of the nearest object that a cell regresses, and whether there is one."""
    points, stride = jnp.asarray(grid.points)[:, None], jnp.asarray(grid.stride)[:, None]
    sides = jnp.concatenate([points - boxes[None, :, :2], boxes[None, :, 2:] - points], axis=-1)
    middle = (boxes[:, :2] + boxes[:, 2:])[None] / 2
    cell = jnp.trunc(middle / stride[..., None]) * stride[..., None] + stride[..., None] / 2
    offset = points - cell
    half = _half_diagonal(sides)
    regresses = (
        (sides.min(-1) > 0)
        & (jnp.abs(offset) <= stride[..., None]).all(-1)
        & (half >= jnp.asarray(grid.low)[:, None])
        & (half <= jnp.asarray(grid.high)[:, None])
        & there[None]
    )
    squared = jnp.where((offset == 0).all(-1), 0, ((points - middle) ** 2).sum(-1))
    distance = squared / jnp.maximum(2 * DELTA**2 * box_area(boxes), SMALLEST_RADIUS**2)[None]
    heat = jnp.where(there[None], jnp.exp(-distance), 0)
    of_class = jnp.zeros((classes, len(heat)), heat.dtype).at[labels].max(heat.T, mode="drop")
    ranked = jnp.where(regresses, distance, jnp.inf)
    nearest = jnp.take_along_axis(sides, ranked.argmin(1)[:, None, None], axis=1)[:, 0] / stride
    return jnp.where(of_class < LEAST_HEAT, 0, of_class).T, nearest, regresses.any(1)


def _positives(grid: _Grid, boxes: Array, there: Array, predicted: Array) -> tuple[Array, Array]:
    """Returns 9 cells a level around each object's center, and which of them are positives of its class.

    The center's own cell is one on the levels of the object's size; the others if their box has a
    generalized IoU above 0.8 with the object, and less loss than the ninth of all.
    """
    stride = jnp.asarray(grid.strides, boxes.dtype)[None, :, None]
    middle = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    cell = jnp.trunc(middle / stride)
    # As in the original, whole pixels: half of an even stride.
    sides = encode_distances(boxes[:, None], cell * stride + stride // 2)
    half = _half_diagonal(sides)
    low, high = (jnp.asarray(column, boxes.dtype)[None] for column in zip(*RANGES, strict=True))
    own = (sides.min(-1) >= 0) & (half >= low) & (half <= high) & there[:, None]
    steps = jnp.asarray([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)], boxes.dtype)
    around = cell[:, :, None] + steps[None, None]
    limits = jnp.asarray(grid.shapes[:, ::-1], boxes.dtype)[None, :, None]
    wanted = (sides / stride)[:, :, None] + jnp.concatenate([steps, -steps], axis=-1)[None, None]
    inside = ((around >= 0) & (around < limits)).all(-1) & (wanted.min(-1) >= 0) & there[:, None, None]
    widths, starts = jnp.asarray(grid.shapes[:, 1])[None, :, None], jnp.asarray(grid.starts)[None, :, None]
    at = around.astype(jnp.int32)
    index = jnp.where(inside, starts + at[..., 1] * widths + at[..., 0], 0)
    loss = 1 - paired_giou(_around_zero(predicted[index]), _around_zero(jnp.maximum(wanted, 0)))
    loss = jnp.where(inside, loss, jnp.inf)
    loss = loss.at[:, :, 4].set(jnp.where(own, 0, loss[:, :, 4])).reshape(len(boxes), -1)
    ninth = jnp.sort(loss, axis=1)[:, MOST_POSITIVES - 1]
    positive = (loss < jnp.minimum(ninth, LARGEST_LOSS)[:, None]) & there[:, None]
    return index.reshape(len(boxes), -1), positive


def _around_zero(distances: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """Returns boxes whose sides lie this far from the origin."""
    return jnp.concatenate([-distances[..., :2], distances[..., 2:]], axis=-1)


def centernet_losses(
    classes: Float[Array, "batch places classes"],
    distances: Float[Array, "batch places 4"],
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    targets: Targets,
) -> dict[str, Float[Array, ""]]:
    """Returns the parts of the loss (Zhou et al. 2021, as in mmdetection).

        class: −0.25 (1 − p)² ln p at positives, −0.75 (1 − heat)⁴ p² ln(1 − p) everywhere,
               p clamped to [1e-4, 1 − 1e-4], over the positives of the batch, at least 1
        box: 2·(1 − GIoU) of the cells that regress a box, over their number, at least 1

    A cell regresses a box if it lies inside it, within one cell of its center, and the box has the
    size of the cell's level. The heat of a class falls with the squared distance from the center.

    Args:
      classes: logits.
      distances: to the sides, in units of the stride.
      shapes, strides: of the levels.
      targets: the objects; crowds are left out.
    """
    grid = _Grid(shapes, strides)
    number = classes.shape[-1]
    there = (targets.classes >= 0) & ~targets.crowd
    labels = jnp.where(there, targets.classes, number)

    def of_image(boxes: Array, labels: Array, there: Array, predicted: Array) -> _Wanted:
        heat, wanted, regressed = _heat_and_boxes(grid, boxes, labels, there, number)
        return _Wanted(heat, wanted, regressed, *_positives(grid, boxes, there, predicted))

    boxes = targets.boxes.astype(distances.dtype)
    want = lax.map(lambda image: of_image(*image), (boxes, labels, there, lax.stop_gradient(distances)))
    p = jnp.clip(jax.nn.sigmoid(classes), LEAST_HEAT, 1 - LEAST_HEAT)
    negative = -jnp.log(1 - p) * p**2 * (1 - want.heat) ** 4
    flat = want.positives * number + jnp.minimum(labels, number - 1)[..., None]
    at = jnp.take_along_axis(p.reshape(len(p), -1), flat.reshape(len(p), -1), axis=1).reshape(flat.shape)
    positive = masked_sum(-jnp.log(at) * (1 - at) ** 2, want.positive)
    overlap = paired_giou(_around_zero(distances), _around_zero(want.distances))
    return {
        "class": (POSITIVE * positive + NEGATIVE * negative.sum()) / jnp.maximum(want.positive.sum(), 1),
        "box": 2 * masked_sum(1 - overlap, want.regressed) / jnp.maximum(want.regressed.sum(), 1),
    }
