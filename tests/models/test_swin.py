"""SwinV2 against NumPy pixel by pixel, its sites, sizes, stochastic depth, and what it refuses."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import erf, expit

from drep_jax.core.layers import NO_IMAGES, find_layers
from drep_jax.core.sites import find_sites
from drep_jax.errors import ConfigError, SiteError
from drep_jax.models import create_model, list_models
from drep_jax.models.swin import PositionBias, SwinBlock
from tests.swin_cases import CASES, SIZE, images, tiny


def random_variables(module, seed=1):
    """Variables with nothing at zero or one; scales of the scores from 12 to 150, of which 100 is the most that counts."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), images())
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        low, high = {"scale": (0.5, 1.5), "logit_scale": (2.5, 5.0)}.get(path[-1].key, (-0.4, 0.4))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def applied(module):
    return jax.jit(module.apply)


# --- NumPy oracle ----------------------------------------------------------------------------------------------------


def np_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def np_dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def np_bias(row, column, window, pretrained, p):
    """What the heads add for a query that lies so many rows and columns after the key."""
    largest = [pretrained - 1] * 2 if pretrained else [side - 1 for side in window]
    scaled = np.array([8 * d / n if n else 0.0 for d, n in zip((row, column), largest, strict=True)])
    table = np.sign(scaled) * np.log2(1 + np.abs(scaled)) / np.log2(8)
    return 16 * expit(np_dense(np.maximum(np_dense(table, p["fc1"]), 0), p["fc2"]))


def np_fill(x, sides):
    """Zeros on the right and below up to multiples of the sides."""
    return np.pad(x, [*((0, -n % side) for n, side in zip(x.shape, sides, strict=False)), (0, 0)])


def np_attention(x, p, window, shift, pretrained):
    """Each pixel of one feature map (H, W, C), padded to whole windows, asks all that lie in its window after the shift."""
    seen, x = x.shape[:2], np_fill(x, window)
    size, heads, dim = x.shape[:2], len(p["logit_scale"]), x.shape[2] // len(p["logit_scale"])
    q, k, v = (np_dense(x, p[name]).reshape(*size, heads, dim) for name in ("query", "key", "value"))
    q, k = (a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12) for a in (q, k))
    scale = np.minimum(np.exp(p["logit_scale"][:, 0, 0]), 100)
    pixels = list(itertools.product(*map(range, size)))
    moved = {px: tuple((a - s) % n for a, s, n in zip(px, shift, size, strict=True)) for px in pixels}
    place = {px: tuple(a // w for a, w in zip(moved[px], window, strict=True)) for px in pixels}
    wrapped = {px: tuple(a < s for a, s in zip(px, shift, strict=True)) for px in pixels}
    bias = functools.cache(lambda row, column: np_bias(row, column, window, pretrained, p["cpb"]))
    out = np.zeros((*size, heads, dim))
    for i in pixels:
        others = [j for j in pixels if place[j] == place[i]]
        scores = [
            scale * (q[i] * k[j]).sum(-1)
            + bias(moved[i][0] - moved[j][0], moved[i][1] - moved[j][1])
            - 100 * (wrapped[i] != wrapped[j])
            for j in others
        ]
        weights = np.exp(scores - np.max(scores, axis=0))
        weights /= weights.sum(0)
        out[i] = sum(w[:, None] * v[j] for w, j in zip(weights, others, strict=True))
    return np_dense(out.reshape(x.shape), p["out"])[: seen[0], : seen[1]]


def np_swin(image, p, module):
    pair = module.window_size if isinstance(module.window_size, tuple) else (module.window_size,) * 2
    patch = module.patch_size
    image = np_fill(image, (patch, patch))
    rows, columns = (n // patch for n in image.shape[:2])
    cut = image.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4).reshape(rows, columns, -1)
    kernel = p["embedding"]["kernel"]
    x = np_norm(cut @ kernel.reshape(-1, kernel.shape[-1]) + p["embedding"]["bias"], p["embedding_norm"])
    for stage, depth in enumerate(module.depths):
        if stage:
            merge, x = p[f"stage{stage}_merge"], np_fill(x, (2, 2))
            fours = [x[row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = np_norm(np_dense(np.concatenate(fours, -1), merge["reduction"]), merge["norm"])
        window = [min(w, n) for w, n in zip(pair, x.shape[:2], strict=True)]
        for i in range(depth):
            q = p[f"stage{stage}_block{i}"]
            shift = [w // 2 if i % 2 and w < n else 0 for w, n in zip(window, x.shape[:2], strict=True)]
            pretrained = module.pretrained_window_sizes[stage] if module.pretrained_window_sizes else 0
            x = x + np_norm(np_attention(x, q["attn"], window, shift, pretrained), q["norm1"])
            y = np_dense(x, q["mlp"]["fc1"])
            x = x + np_norm(np_dense(y * 0.5 * (1 + erf(y / np.sqrt(2))), q["mlp"]["fc2"]), q["norm2"])
    return np_dense(np_norm(x, p["norm"]).mean((0, 1)), p["head"])


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(name):
    module = tiny(**CASES[name][0])
    variables, x = random_variables(module), images()
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    assert ("bias" in params["stage0_block0"]["attn"]["query"]) == module.qkv_bias
    expected = [np_swin(image, params, module) for image in x]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(applied(module)(variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "pretrained"), [((3, 5), 0), ((4, 4), 7), ((1, 2), 0), ((1, 1), 0)])
def test_position_bias_is_that_of_every_pair_of_pixels(window, pretrained):
    module = PositionBias(3, window, pretrained)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float32), jax.eval_shape(module.init, jax.random.key(0))["params"]
    )
    pixels = list(itertools.product(*map(range, window)))
    expected = [[np_bias(i[0] - j[0], i[1] - j[1], window, pretrained, params) for j in pixels] for i in pixels]
    got = jax.jit(module.apply)({"params": params})
    np.testing.assert_allclose(got, np.moveaxis(expected, -1, 0), rtol=1e-4, atol=1e-4)


def test_blocks_start_as_the_identity():
    module = SwinBlock(num_heads=2, mlp_dim=8, window=(2, 2), shift=(1, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 6)), jnp.float32)
    out, _ = jax.jit(module.init_with_output)(jax.random.key(0, impl="rbg"), x)
    np.testing.assert_array_equal(out, x)


# --- gradients, remat, stochastic depth ------------------------------------------------------------------------------


@functools.cache
def value_and_gradients(module):
    def loss(params):
        logits = module.apply({"params": params}, images())
        return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_remat_changes_nothing():
    options = {"depths": (1, 2), "window_size": (2, 3)}
    params = random_variables(tiny(**options))["params"]
    for block in params.values():
        if "attn" in block:
            block["attn"]["logit_scale"] = np.minimum(block["attn"]["logit_scale"], 4.5)  # above ln 100 it has none
    (_, logits), gradients = value_and_gradients(tiny(**options))(params)
    for path, gradient in flatten_dict(gradients, sep="/").items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path
    remat = tiny(**options, remat=True)
    (_, again), others = value_and_gradients(remat)(params)
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), others, gradients)
    text = str(jax.make_jaxpr(value_and_gradients(remat))(params))
    assert "remat" in text or "checkpoint" in text


def test_drop_path_leaves_out_whole_branches_of_an_image():
    options = {"depths": (1, 1)}
    plain, module = tiny(**options), tiny(**options, drop_path=0.5)  # rates 0 and 0.5
    variables, x = random_variables(plain), images(batch=16)
    np.testing.assert_array_equal(applied(module)(variables, x), applied(plain)(variables, x))

    def scaled(*factors):
        block = dict(variables["params"]["stage1_block0"])
        for name, factor in zip(("norm1", "norm2"), factors, strict=True):
            block[name] = jax.tree.map(lambda a, factor=factor: factor * a, block[name])
        return applied(plain)({"params": {**variables["params"], "stage1_block0": block}}, x)

    kept = np.stack([scaled(*factors) for factors in itertools.product((0.0, 2.0), repeat=2)])
    train = jax.jit(lambda key: module.apply(variables, x, train=True, rngs={"dropout": key}))
    one, two, again = (np.asarray(train(jax.random.key(seed, impl="rbg"))) for seed in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-3
    error = np.abs(kept - one[None]).max(-1)  # of each way of leaving out, for each image
    assert (error.min(0) < 1e-4).all()
    assert set(error.argmin(0)) == {0, 1, 2, 3}


def test_bfloat16_computes_narrow_and_gives_float32():
    wide, narrow = tiny(), tiny(dtype="bfloat16")
    variables = random_variables(wide)
    expected, got = (np.asarray(applied(m)(variables, images())) for m in (wide, narrow))
    assert got.dtype == np.float32
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


def test_float64_is_not_narrowed():
    variables = random_variables(tiny())
    single = np.asarray(applied(tiny())(variables, images()))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, np.float64), variables)
        double = np.asarray(applied(tiny(dtype="float64"))(wide, images().astype(np.float64)))
    expected = np_swin(images()[0].astype(np.float64), jax.tree.map(np.float64, variables["params"]), tiny())
    assert double.dtype == np.float64
    np.testing.assert_allclose(double[0], expected, rtol=1e-10)
    assert 0 < np.abs(double - single).max() < 1e-3


# --- sites -----------------------------------------------------------------------------------------------------------


def test_query_key_and_value_are_one_site_without_a_constant():
    sites = find_sites(tiny(), images(), pattern=".*/attn/(query|key|value)")
    assert [site.name for site in sites] == [f"stage{s}_block{i}/attn/query" for s in (0, 1) for i in (0, 1)]
    for site in sites:
        assert [layer.path[-1] for layer in site.layers] == ["query", "key", "value"]
        assert not site.bias  # key has none to put it in
    alone = find_sites(tiny(), images(), pattern=".*/attn/(query|value)")
    assert all(site.bias and len(site.layers) == 2 for site in alone)


def test_default_sites_are_the_mlps_and_no_pattern_takes_the_position_bias():
    assert [site.name for site in find_sites(tiny(), images())] == [
        f"stage{s}_block{i}/mlp/fc{j}" for s in (0, 1) for i in (0, 1) for j in (1, 2)
    ]
    constant = {layer.name for layer in find_layers(tiny(), images()) if layer.refusal == NO_IMAGES}
    assert constant == {f"stage{s}_block{i}/attn/cpb/fc{j}" for s in (0, 1) for i in (0, 1) for j in (1, 2)}
    every = {layer.name for site in find_sites(tiny(remat=True), images(), pattern=".*") for layer in site.layers}
    blocks = [f"{block}/{name}" for block in ("stage0_block0", "stage1_block1") for name in ("attn/out", "mlp/fc2")]
    assert every.isdisjoint(constant) and every >= {"embedding", "stage1_merge/reduction", "head", *blocks}
    with pytest.raises(SiteError, match=f"stage0_block0/attn/cpb/fc1: {NO_IMAGES}"):
        find_sites(tiny(), images(), pattern=".*/cpb/.*")


# --- sizes and errors ------------------------------------------------------------------------------------------------


def test_names_of_the_family():
    assert list_models("swin*") == [
        *("swin", "swin_s", "swin_t", "swinv2"),
        *(f"swinv2_{size}_w{window}" for size in "bst" for window in (16, 8)),
    ]


def test_one_set_of_weights_serves_other_windows_and_sizes():
    like = jax.eval_shape(tiny().init, jax.random.key(0), images())
    other = tiny(size=(32, 16), window_size=4, pretrained_window_sizes=(6, 6))
    assert jax.eval_shape(other.apply, like, np.zeros((1, 32, 16, 3), np.float32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("image_size", "overrides", "message"),
    [
        ((256, 256), {"window_size": 0}, "window_size must be (height, width) in pixels, both at least 1, got 0"),
        ((256, 256), {"window_size": [8, 8, 8]}, "window_size must be (height, width)"),
        (256, {}, "image_size must be (height, width)"),
        ((256, 256), {"patch_size": "4"}, "patch_size must be (height, width)"),
        ((256, 256), {"width": 0}, "width must be a whole number, at least 1, got 0"),
        ((256, 256), {"depths": 2}, "depths must be the number of blocks of each stage"),
        ((256, 256), {"depths": ()}, "depths must be the number of blocks of each stage"),
        ((256, 256), {"depths": (2, 2, 0, 2)}, "depths must be the number of blocks of each stage"),
        ((256, 256), {"num_heads": (3, 6)}, "num_heads must be 4 whole numbers, one for each stage, got (3, 6)"),
        ((256, 256), {"num_heads": (3, 5, 12, 24)}, "Stage 1 is 192 wide, which 5 heads do not divide"),
        ((256, 256), {"pretrained_window_sizes": (12,)}, "pretrained_window_sizes must be 4 whole numbers"),
        ((256, 256), {"pretrained_window_sizes": (12, 12, 12, -6)}, "pretrained_window_sizes must be 4 whole numbers"),
        ((256, 256), {"num_classes": -1}, "num_classes must be 0 (no head: features) or more, got -1"),
        ((256, 256), {"drop_path": 1.0}, "drop_path must be in [0, 1), got 1.0"),
        ((256, 256), {"mlp_ratio": 0.0}, "mlp_ratio must leave the MLPs at least one hidden unit, got 0.0"),
        ((256, 256), {"windows": 8}, 'no option "windows"'),
    ],
)
def test_bad_input_is_refused_before_anything_is_traced(image_size, overrides, message):
    given = {"num_classes": 5, **overrides}
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_model("swinv2_t_w8", image_size=image_size, **given)


@pytest.mark.parametrize("size", [(14, 21), (5, 30), (1, 1)])
def test_any_size_is_padded_to_patches_windows_and_pairs(size):
    module, x = tiny(size=size), images(size, batch=1)
    variables = random_variables(tiny())
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    expected = np_swin(x[0].astype(np.float64), params, module)
    np.testing.assert_allclose(applied(module)(variables, x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 24, 16, 3), (16, 24, 3)])
def test_images_of_another_size_are_refused(shape):
    height, width = SIZE
    with pytest.raises(ConfigError, match=re.escape(f"(batch, {height}, {width}, channels), got {shape}")):
        jax.eval_shape(tiny().init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
