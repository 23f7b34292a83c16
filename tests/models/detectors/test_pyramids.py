"""Anchors, pyramids, positions, matching and pasting against plain NumPy and the published numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from drep_jax.errors import ConfigError
from drep_jax.models.detectors import anchors
from drep_jax.models.detectors.fpn import FPN, upsample_nearest
from drep_jax.models.detectors.matching import match_batch, match_on_host
from drep_jax.models.detectors.pasting import paste_masks, pasted
from drep_jax.models.detectors.positions import sine_positions


def test_base_anchors_are_the_published_ones():
    faster = anchors.ANCHORS["faster"].bases[0]
    root = [[-22.6274, -11.3137, 22.6274, 11.3137], [-16, -16, 16, 16], [-11.3137, -22.6274, 11.3137, 22.6274]]
    np.testing.assert_allclose(faster, root, atol=1e-4)
    assert anchors.ANCHORS["torchvision"].bases[0].tolist() == [
        [-23, -11, 23, 11],
        [-16, -16, 16, 16],
        [-11, -23, 11, 23],
    ]
    retina = anchors.ANCHORS["retinanet"].bases[0]
    assert retina.shape == (9, 4)
    np.testing.assert_allclose(np.ptp(retina[3:6, ::2], axis=1), [32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)])
    assert [base[0, 2] for base in anchors.ANCHORS["atss"].bases] == [32, 64, 128, 256, 512]
    np.testing.assert_allclose(anchors.ANCHORS["yolov3"].bases[0][0], [16 - 58, 16 - 45, 16 + 58, 16 + 45])


def test_anchors_are_laid_row_by_row():
    grid = anchors.grid_anchors((2, 3), (8, 4), np.array([[-1.0, -2.0, 1.0, 2.0], [0.0, 0.0, 1.0, 1.0]]))
    base = ((-1, -2, 1, 2), (0, 0, 1, 1))
    cells = [(y, x) for y in (0, 8) for x in (0, 4, 8)]
    expected = [[x + a, y + b, x + c, y + d] for y, x in cells for a, b, c, d in base]
    assert grid.tolist() == expected and grid.dtype == np.float32
    assert anchors.grid_points((1, 2), 8).tolist() == [[4, 4], [12, 4]]
    shapes = anchors.level_shapes((100, 64), (4, 8, 16, 32, 64))
    levels = anchors.anchors_of("torchvision", shapes, (100, 64))
    assert [len(level) for level in levels] == [3 * height * width for height, width in shapes]
    assert levels[4][3].tolist() == [-362, 50 - 181, 362, 50 + 181]  # the stride of 100 rows in 2 cells is 50, not 64
    with pytest.raises(ConfigError, match="5 pyramid levels"):
        anchors.anchors_of("faster", [(1, 1)])
    with pytest.raises(ConfigError, match="image's size"):
        anchors.anchors_of("torchvision", shapes)


@pytest.mark.parametrize(
    ("inputs", "options", "parameters"),
    [
        ((256, 512, 1024, 2048), {}, 3_344_384),
        ((512, 1024, 2048), {"extra": "convs_on_output"}, 3_868_672),
        ((96, 192, 384, 768), {}, 2_729_984),
    ],
)
def test_pyramids_have_the_published_sizes(inputs, options, parameters):
    maps = [
        jax.ShapeDtypeStruct((1, 32 >> level, 40 >> level, width), jnp.float32) for level, width in enumerate(inputs)
    ]
    outputs, variables = jax.eval_shape(lambda maps: FPN(**options).init_with_output(jax.random.key(0), maps), maps)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    assert len(outputs) == 5 and {output.shape[-1] for output in outputs} == {256}


def test_a_pyramid_is_the_sum_from_the_top():
    """With identities as kernels each output is known: its own map plus the coarser ones, upsampled."""
    rng = np.random.default_rng(0)
    maps = [jnp.asarray(rng.standard_normal((1, side, side + 1, 2)), jnp.float32) for side in (5, 3)]
    lateral, output = jnp.eye(2)[None, None], jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))

    def identities(path, leaf):
        kernel = lateral if leaf.shape[:2] == (1, 1) else output
        return kernel if path[-1].key == "kernel" else leaf

    for extra, third in (("pool", None), ("convs_on_output", 0), ("convs_on_input", 1)):
        net = FPN(2, 4, extra=extra, relu_before_extra=True)
        variables = jax.tree_util.tree_map_with_path(identities, jax.jit(net.init)(jax.random.key(0), maps))
        pyramid = jax.jit(net.apply)(variables, maps)
        rows, columns = np.arange(5) * 3 // 5, np.arange(6) * 4 // 6
        np.testing.assert_allclose(pyramid[0], maps[0] + maps[1][:, rows][:, :, columns], atol=1e-6)
        np.testing.assert_allclose(pyramid[1], maps[1], atol=1e-6)
        np.testing.assert_allclose(pyramid[2], maps[1][:, ::2, ::2], atol=1e-6)
        fourth = pyramid[2][:, ::2, ::2]
        np.testing.assert_allclose(pyramid[3], fourth if third is None else nn.relu(fourth), atol=1e-6)
    with pytest.raises(ConfigError, match="cannot be made"):
        jax.eval_shape(FPN(2, 5, extra="none").init, jax.random.key(0), maps)
    normed = FPN(2, 2, extra="none", norm=lambda name: nn.BatchNorm(use_running_average=True, name=name))
    names = jax.eval_shape(normed.init, jax.random.key(0), maps)["params"]
    assert names["lateral_0"].keys() == {"kernel"} and "output_1_norm" in names
    assert upsample_nearest(maps[1], (6, 8)).shape == (1, 6, 8, 2)


def test_sine_positions_of_a_padded_map():
    valid = np.zeros((2, 3, 4), bool)
    valid[0], valid[1, :2, :3] = True, True
    encode = jax.jit(sine_positions, static_argnums=1)
    encoded = np.asarray(encode(valid, 8))
    for image, (height, width) in enumerate([(3, 4), (2, 3)]):
        for row in range(height):
            for column in range(width):
                y, x = 2 * np.pi * (row + 1) / (height + 1e-6), 2 * np.pi * (column + 1) / (width + 1e-6)
                expected = [
                    f(place / 10_000 ** (2 * i / 4)) for place in (y, x) for i in (0, 1) for f in (np.sin, np.cos)
                ]
                np.testing.assert_allclose(encoded[image, row, column], expected, atol=1e-5)
    turned = np.asarray(encode(valid.transpose(0, 2, 1), 8))
    np.testing.assert_allclose(turned, np.roll(encoded.transpose(0, 2, 1, 3), 4, axis=-1), atol=1e-6)


_match = jax.jit(match_batch)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_matching_costs_least(seed, more_objects):
    rng = np.random.default_rng(seed)
    cost = rng.normal(size=(2, 6, 8) if more_objects else (2, 8, 6)).astype(np.float32)
    valid = rng.uniform(size=(2, cost.shape[2])) < rng.uniform(0, 1.2)
    if seed % 3 == 0:
        cost[0, rng.integers(0, 6), rng.integers(0, 6)] = rng.choice([np.nan, np.inf])
    compiled = np.asarray(_match(cost, valid))
    for image in range(2):
        costs = cost[image].astype(np.float64)
        costs[~np.isfinite(costs)] = 1e3
        rows, columns = linear_sum_assignment(costs[:, valid[image]])
        least = costs[rows, np.flatnonzero(valid[image])[columns]].sum()
        for matched in (compiled[image], match_on_host(cost[image], valid[image])):
            taken = matched >= 0
            assert not taken[~valid[image]].any() and taken.sum() == min(valid[image].sum(), cost.shape[1])
            assert len(set(matched[taken])) == taken.sum()
            np.testing.assert_allclose(costs[matched[taken], np.flatnonzero(taken)].sum(), least, atol=1e-4)


def test_masks_are_pasted_at_pixel_centers():
    rng = np.random.default_rng(0)
    masks = rng.uniform(size=(3, 4, 4)).astype(np.float32)
    boxes = np.array([[1.0, 2.0, 9.5, 8.0], [-3.0, -2.0, 4.0, 20.0], [5.0, 5.0, 5.0, 9.0]])
    expected = np.zeros((3, 10, 12))
    for mask, (x0, y0, x1, y1), out in zip(masks[:2], boxes, expected, strict=False):
        padded = np.pad(mask, 1)
        for row in range(10):
            for column in range(12):
                y, x = (row + 0.5 - y0) / (y1 - y0) * 4 - 0.5, (column + 0.5 - x0) / (x1 - x0) * 4 - 0.5
                if -1 < y < 4 and -1 < x < 4:
                    top, left = int(np.floor(y)), int(np.floor(x))
                    down, right = y - top, x - left
                    cells = padded[top + 1 : top + 3, left + 1 : left + 3]
                    out[row, column] = np.array([1 - down, down]) @ cells @ np.array([1 - right, right])
    np.testing.assert_allclose(np.concatenate([*pasted(masks, boxes, (10, 12))]), expected, atol=1e-6)
    assert (paste_masks(masks, boxes, (10, 12), threshold=0.4) == (expected >= 0.4)).all()
    assert paste_masks(masks[:0], boxes[:0], (10, 12)).shape == (0, 10, 12)
