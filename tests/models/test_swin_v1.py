"""Swin, first version, against NumPy pixel by pixel at sizes that windows divide and do not, its trunk, and its sites."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from drep_jax.core.sites import find_sites
from drep_jax.models import create_model
from drep_jax.models.detectors.swin_trunk import SwinTrunk, SwinV2Trunk
from tests.models.test_swin import np_dense, np_fill, np_norm

COMMON = {"patch_size": 2, "width": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": (4, 3)}


def tiny(size=(16, 12), **options):
    return create_model("swin", num_classes=5, image_size=size, **{**COMMON, **options})


def images(size=(16, 12), batch=1):
    return np.random.default_rng(7).normal(size=(batch, *size, 3)).astype(np.float32)


@functools.cache
def random_variables(module, size=(16, 12)):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        low, high = (0.5, 1.5) if path[-1].key == "scale" else (-0.5, 0.5)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def np_attention(x, p, window, table, shift):
    seen, x = x.shape[:2], np_fill(x, window)
    size, heads = x.shape[:2], p["position_bias"].shape[1]
    dim = x.shape[2] // heads
    q, k, v = (np_dense(x, p[name]).reshape(*size, heads, dim) for name in ("query", "key", "value"))
    bias = p["position_bias"].reshape(2 * table[0] - 1, 2 * table[1] - 1, heads)
    pixels = list(itertools.product(*map(range, size)))
    moved = {px: tuple((a - s) % n for a, s, n in zip(px, shift, size, strict=True)) for px in pixels}
    place = {px: tuple(a // w for a, w in zip(moved[px], window, strict=True)) for px in pixels}
    wrapped = {px: tuple(a < s for a, s in zip(px, shift, strict=True)) for px in pixels}
    out = np.zeros((*size, heads, dim))
    for i in pixels:
        others = [j for j in pixels if place[j] == place[i]]
        rows = [
            (q[i] * k[j]).sum(-1) / np.sqrt(dim)
            + bias[moved[i][0] - moved[j][0] + table[0] - 1, moved[i][1] - moved[j][1] + table[1] - 1]
            - 100 * (wrapped[i] != wrapped[j])
            for j in others
        ]
        weights = np.exp(rows - np.max(rows, axis=0))
        weights /= weights.sum(0)
        out[i] = sum(w[:, None] * v[j] for w, j in zip(weights, others, strict=True))
    return np_dense(out.reshape(x.shape), p["out"])[: seen[0], : seen[1]]


def np_stages(image, p, whole_windows):
    image = np_fill(image, (2, 2))
    rows, columns = (n // 2 for n in image.shape[:2])
    cut = image.reshape(rows, 2, columns, 2, 3).transpose(0, 2, 1, 3, 4).reshape(rows, columns, -1)
    x = np_norm(cut @ p["embedding"]["kernel"].reshape(12, -1) + p["embedding"]["bias"], p["embedding_norm"])
    for stage in (0, 1):
        if stage:
            merge, x = p["stage1_merge"], np_fill(x, (2, 2))
            fours = [x[row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = np_dense(np_norm(np.concatenate(fours, -1), merge["norm"]), merge["reduction"])
        table = (4, 3)
        window = table if whole_windows else tuple(min(w, n) for w, n in zip(table, x.shape, strict=False))
        for i in (0, 1):
            q = p[f"stage{stage}_block{i}"]
            moves = [whole_windows or w < n for w, n in zip(window, x.shape, strict=False)]
            shift = [w // 2 if i and moved else 0 for w, moved in zip(window, moves, strict=True)]
            x = x + np_attention(np_norm(x, q["norm1"]), q["attn"], window, table, shift)
            y = np_dense(np_norm(x, q["norm2"]), q["mlp"]["fc1"])
            x = x + np_dense(y * 0.5 * (1 + erf(y / np.sqrt(2))), q["mlp"]["fc2"])
        yield x


@pytest.mark.parametrize("size", [(16, 12), (13, 11), (5, 30)])
def test_equals_numpy(size):
    module = tiny(size)
    variables, x = random_variables(tiny()), images(size)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    *_, last = np_stages(x[0].astype(np.float64), params, False)
    expected = np_dense(np_norm(last, params["norm"]).mean((0, 1)), params["head"])
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_trunk_gives_normalized_maps_of_whole_windows():
    """5×30 pixels are maps of 3×15 and 2×8, whose windows stay 4×3, padded and shifted."""
    module, x = SwinTrunk(**COMMON), images((5, 30))
    variables = random_variables(module)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    maps = jax.jit(module.apply)(variables, x)
    for stage, expected in enumerate(np_stages(x[0].astype(np.float64), params, True)):
        np.testing.assert_allclose(maps[stage][0], np_norm(expected, params[f"norm{stage}"]), rtol=1e-4, atol=1e-4)


def test_the_trunk_of_the_second_version_has_no_norms_behind_its_stages():
    module = SwinV2Trunk(**{**COMMON, "window_size": 4})
    maps, variables = jax.eval_shape(
        module.init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((1, 15, 21, 3), jnp.float32)
    )
    assert [leaf.shape for leaf in maps] == [(1, 8, 11, 8), (1, 4, 6, 16)]
    assert not [name for name in variables["params"] if name.startswith("norm")]


def test_sites():
    sites = find_sites(tiny(), images(), pattern=".*")
    readers = [[layer.path[-1] for layer in site.layers] for site in sites]
    block = [["query", "key", "value"], ["out"], ["fc1"], ["fc2"]]
    assert readers == [["embedding"], *block, *block, ["reduction"], *block, *block, ["head"]]
    assert all(site.bias or site.layers[0].path[-1] == "reduction" for site in sites)
    assert len(find_sites(tiny(), images())) == 8
