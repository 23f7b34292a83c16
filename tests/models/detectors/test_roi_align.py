"""RoIAlign against a loop over cells and samples, both samplings, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import ConfigError
from drep_jax.models.detectors.roi_align import level_of, roi_align

SIZE = 3
STRIDES = (4, 8)


def bilinear(grid, y, x):
    height, width = grid.shape[:2]
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0 * grid[0, 0]
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down = 0.0 if top == height - 1 else y - top
    along = 0.0 if left == width - 1 else x - left
    upper = grid[top, left] * (1 - along) + grid[top, right] * along
    return upper * (1 - down) + (grid[bottom, left] * (1 - along) + grid[bottom, right] * along) * down


def one_box(grid, box, stride, samples, aligned):
    x0, y0, x1, y1 = box / stride - (0.5 if aligned else 0.0)
    width, height = x1 - x0, y1 - y0
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    down, right = (samples or int(np.ceil(side / SIZE)) for side in (height, width))
    out = np.zeros((SIZE, SIZE, grid.shape[-1]))
    for i in range(SIZE):
        for j in range(SIZE):
            for a in range(down):
                for b in range(right):
                    y = y0 + (i + (a + 0.5) / down) * height / SIZE
                    x = x0 + (j + (b + 0.5) / right) * width / SIZE
                    out[i, j] += bilinear(grid, y, x)
    return out / max(down * right, 1)


BOXES = np.array(
    [
        [[0, 0, 16, 16], [-9, -7, 30, 21], [3.3, 5.1, 40, 44], [2, 2, 2, 2], [1, 1, 2, 1.5], [0, 5, 39.5, 9]],
        [[60, 60, 90, 90], [10, 0, 3, 20], [-200, 4, 300, 8], [4, 4, 20, 36], [0, 0, 40, 48], [7, 9, 11, 15]],
    ],
    np.float64,
)
LEVELS = np.array([[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0]])


@pytest.mark.parametrize(("samples", "aligned"), [(2, False), (0, True)])
def test_values_and_gradient_are_those_of_a_loop(samples, aligned):
    """Boxes across and beyond borders, of no area, negative, wide ones with many samples, padding."""
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        maps = [rng.standard_normal((2, 12, 10, 2)), rng.standard_normal((2, 6, 5, 2))]
        valid = np.ones((2, 6), bool)
        valid[1, 5] = False

        def align(maps, boxes):
            return roi_align(
                maps, boxes, STRIDES, SIZE, levels=LEVELS, valid=valid, samples=samples, aligned=aligned, chunk=5
            )

        @jax.jit
        def run(maps, boxes, cotangent):
            values, pull = jax.vjp(lambda maps: align(maps, boxes), maps)
            return values, pull(cotangent)[0]

        for boxes in (BOXES, *np.sort(rng.uniform(-9, 60, (4, 2, 6, 2, 2)), axis=3).reshape(4, 2, 6, 4)):
            cotangent = rng.standard_normal((2, 6, SIZE, SIZE, 2))
            values, gradient = run(maps, boxes, cotangent)
            expected = np.zeros(values.shape)
            for image, place in np.argwhere(valid):
                box, level = boxes[image, place], LEVELS[image, place]
                if box[2] > box[0] or not aligned:
                    expected[image, place] = one_box(maps[level][image], box, STRIDES[level], samples, aligned)
            np.testing.assert_allclose(values, expected, atol=1e-12)
            assert np.abs(expected).max() > 0.5
            # Linear in the maps, so the gradient is the adjoint: <g, A·m> = <Aᵀ·g, m>.
            other = [rng.standard_normal(level.shape) for level in maps]
            through = sum((a * b).sum() for a, b in zip(gradient, other, strict=True))
            np.testing.assert_allclose(through, (cotangent * run(other, boxes, cotangent)[0]).sum(), atol=1e-9)


def test_levels_of_boxes_and_refusals():
    sides = np.array([0, 55.9, 56, 111.9, 112, 223.9, 224, 448, 4000], np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    for kind in ("mmdet", "torchvision"):
        assert level_of(boxes, 4, kind=kind).tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3]
    with pytest.raises(ConfigError, match="torchvision"):
        level_of(boxes, 4, kind="x")
    maps = [jnp.zeros((1, 4, 4, 2))]
    assert roi_align(maps, jnp.zeros((1, 0, 4)), (4,), 7).shape == (1, 0, 7, 7, 2)
    with pytest.raises(ConfigError, match="2 strides"):
        roi_align(maps, jnp.zeros((1, 1, 4)), (4, 8), 7)
