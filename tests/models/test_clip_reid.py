"""CLIP-ReID's image encoder: against NumPy, its side information, what retrieval and the losses get, bad input."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax import certify, find_sites
from drep_jax.core.layers import find_layers
from drep_jax.core.schedule import Schedule
from drep_jax.errors import ConfigError
from drep_jax.models import create_model

SIZE = (10, 7)
TINY = {"patch_size": 4, "patch_stride": 3, "width": 12, "depth": 2, "num_heads": 3, "projection": 5}


def tiny(num_classes=6, **options):
    return create_model("clip_reid", num_classes=num_classes, image_size=SIZE, **{**TINY, **options})


def pictures(batch=4, numbers=None):
    x = np.random.default_rng(0).normal(size=(batch, *SIZE, 3)).astype(np.float32)
    if numbers is None:
        return x
    plane = np.broadcast_to(np.reshape(numbers, (-1, 1, 1, 1)), (batch, *SIZE, 1))
    return np.concatenate([x, plane.astype(np.float32)], axis=3)


def variables_of(module, seed=1):
    """Variables with nothing at zero or one."""
    channels = 4 if module.side_info else 3
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((2, *module.image_size, channels), np.float32))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        low, high = {"scale": (0.5, 1.5), "var": (0.5, 2.0)}.get(path[-1].key, (-0.4, 0.4))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(module, variables, x, train=False):
    """(retrieval's feature, what the losses read, statistics after it), from one compilation."""

    def both(variables, x):
        feature = module.apply(variables, x)
        return feature, *module.apply(variables, x, train, method="outputs", mutable=["batch_stats"])

    return jax.tree.map(np.asarray, jax.jit(both)(variables, x))


def oracle(image, p, module, number):
    """(h_{L−1}, f, P f) of one image in float64, by loops."""

    def norm(x, q):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * q["scale"] + q["bias"]

    def dense(x, q):
        return x @ q["kernel"] + q["bias"]

    size, stride = module.patch_size, module.patch_stride
    kernel = p["embedding"]["kernel"].reshape(-1, module.width)
    tokens = [p["cls"][0, 0] + module.sie_coefficient * p["sie"][number]]
    for i in range(0, image.shape[0] - size + 1, stride):
        for j in range(0, image.shape[1] - size + 1, stride):
            tokens.append(image[i : i + size, j : j + size].ravel() @ kernel)
    x = norm(np.array(tokens) + p["pos_embedding"][0], p["norm_pre"])
    for n in range(module.depth):
        q, earlier = p[f"encoderblock_{n}"], x
        y, mixed = norm(x, q["norm1"]), []
        for part in np.split(np.arange(module.width), module.num_heads):
            query, key, value = (dense(y, q["attn"][name])[:, part] for name in ("query", "key", "value"))
            scores = np.exp(query @ key.T / np.sqrt(len(part)))
            mixed.append(scores / scores.sum(1, keepdims=True) @ value)
        x = x + dense(np.concatenate(mixed, 1), q["attn"]["out"])
        hidden = dense(norm(x, q["norm2"]), q["mlp"]["fc1"])
        x = x + dense(hidden / (1 + np.exp(-1.702 * hidden)), q["mlp"]["fc2"])
    feature = norm(x[0], p["norm"])
    return earlier[0], feature, feature @ p["projection"]["kernel"]


def test_features_necks_and_logits_equal_numpy_and_the_statistics_follow_the_batch():
    module, numbers = tiny(side_info=3, sie_coefficient=1.5), [2, 0, 1, 2]
    variables, x = variables_of(module), pictures(numbers=numbers)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    expected = [oracle(image[..., :3], wide["params"], module, n) for image, n in zip(x, numbers, strict=True)]
    expected = [np.array(f) for f in zip(*expected, strict=True)]
    retrieved, outputs, statistics = run(module, variables, x, train=True)
    np.testing.assert_allclose(retrieved, np.concatenate(expected[1:], axis=1), rtol=1e-4, atol=1e-4)
    assert len(outputs["features"]) == 3 and len(outputs["logits"]) == 2
    for got, wanted in zip(outputs["features"], expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    for name, feature, logits in zip(("neck", "neck_proj"), expected[1:], outputs["logits"], strict=True):
        q, old = wide["params"][name], wide["batch_stats"][name]["bottleneck"]
        normed = (feature - feature.mean(0)) / np.sqrt(feature.var(0) + 1e-5) * q["bottleneck"]["scale"]
        np.testing.assert_allclose(logits, normed @ q["classifier"]["kernel"], rtol=1e-3, atol=1e-3)
        new = statistics["batch_stats"][name]["bottleneck"]["mean"]
        np.testing.assert_allclose(new, 0.9 * old["mean"] + 0.1 * feature.mean(0), rtol=1e-4, atol=1e-4)


def test_the_feature_after_the_necks_uses_the_running_statistics():
    module = tiny(feature="after")
    variables, x = variables_of(module), pictures()
    after, outputs, _ = run(module, variables, x)
    parts = []
    for name, feature in zip(("neck", "neck_proj"), outputs["features"][1:], strict=True):
        held, scale = variables["batch_stats"][name]["bottleneck"], variables["params"][name]["bottleneck"]["scale"]
        parts.append((feature - held["mean"]) / np.sqrt(held["var"] + 1e-5) * scale)
    np.testing.assert_allclose(after, np.concatenate(parts, axis=1), rtol=1e-4, atol=1e-5)
    assert after.shape == (4, 12 + 5) and after.dtype == np.float32


def test_side_information_moves_the_feature_and_an_unknown_number_is_never_taken_for_another():
    module, plain = tiny(side_info=3), tiny()
    variables = variables_of(module)
    images = np.repeat(pictures(1), 6, axis=0)
    plane = np.broadcast_to(np.reshape([0, 1, 2, 3, -2, -1], (-1, 1, 1, 1)), (6, *SIZE, 1)).astype(np.float32)
    apply = jax.jit(module.apply)
    got = np.asarray(apply(variables, np.concatenate([images, plane], axis=3)))
    assert np.abs(got[0] - got[1]).max() > 1e-3 and np.abs(got[1] - got[2]).max() > 1e-3
    assert np.isnan(got[3:5]).all(), "the evaluation refuses these"
    params = dict(variables["params"])
    table = params.pop("sie")
    nothing = {**variables, "params": {**params, "sie": np.zeros_like(table)}}
    without = jax.jit(plain.apply)({**variables, "params": params}, images[:1])
    same = apply(nothing, np.concatenate([images, plane], axis=3))[:3]
    np.testing.assert_allclose(same, np.repeat(without, 3, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[5:], without, rtol=1e-5, atol=1e-6)  # -1: no side information is told


def test_classifiers_are_there_but_no_layers_of_retrieval():
    module = tiny(side_info=2)
    x = jax.ShapeDtypeStruct((1, *SIZE, 4), jnp.float32)
    names = [layer.name for layer in find_layers(module, x)]
    assert names[0] == "embedding" and names[-1] == "projection" and len(names) == 2 + 2 * 6
    assert not any("neck" in name for name in names)
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    assert params["neck"]["classifier"]["kernel"].shape == (12, 6)
    assert params["neck_proj"]["classifier"]["kernel"].shape == (5, 6)
    bare = tiny(0, side_info=2)
    headless = jax.eval_shape(bare.init, jax.random.key(0), x)
    assert set(headless["params"]["neck"]) == {"bottleneck"}
    outputs = jax.eval_shape(lambda v, x: bare.apply(v, x, method="outputs"), headless, x)
    assert len(outputs["features"]) == 3 and outputs["logits"] == ()


def test_remat_recomputes_the_blocks_and_changes_nothing():
    plain, remat, x = tiny(), tiny(remat=True), pictures()
    variables = variables_of(plain)
    assert str(jax.make_jaxpr(remat.apply)(variables, x)).count("remat") >= 2
    got, wanted = (jax.jit(module.apply)(variables, x) for module in (remat, plain))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stride", "side", "tokens"), [(None, 0, 129), (12, 6, 211)])
def test_published_network_has_the_published_number_of_parameters(stride, side, tokens):
    """86,192,640 in CLIP's ViT-B/16 for 224 pixels (197 positions), of which positions depend on the size."""
    module = create_model("clip_reid_b16", num_classes=751, image_size=(256, 128), patch_stride=stride, side_info=side)
    x = jax.ShapeDtypeStruct((2, 256, 128, 4 if side else 3), jnp.float32)
    feature, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    expected = 86_192_640 + (tokens - 197 + side) * 768 + (768 + 512) * (1 + 751)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected
    assert (feature.shape, feature.dtype) == ((2, 1280), jnp.float32)


@pytest.mark.slow
def test_fused_equals_explicit_in_float64_with_side_information():
    module = tiny(side_info=3)
    variables, x = variables_of(module), pictures(numbers=[2, 0, 1, 2])
    sites, rng, tree = find_sites(module, x, pattern="embedding|.*_1/mlp/fc1|projection"), np.random.default_rng(3), {}
    for site in sites:
        at = tree
        for part in site.path[:-1]:
            at = at.setdefault(part, {})
        at[site.path[-1]] = {"kernel": rng.normal(0, 0.3, site.denoiser_shape).astype(np.float32)}
        if site.bias:
            at[site.path[-1]]["bias"] = rng.normal(0, 0.3, site.denoiser_shape[:-1]).astype(np.float32)
    certificate = certify(module, variables, tree, sites, Schedule(beta_end=0.02), x)
    assert certificate.passed, str(certificate)


def test_bfloat16_computes_narrow_and_gives_float32():
    module, narrow = tiny(), tiny(dtype="bfloat16")
    variables, x = variables_of(module), pictures()
    wide = np.asarray(jax.jit(module.apply)(variables, x))
    got, outputs, _ = run(narrow, variables, x)
    assert 0 < np.abs(got - wide).max() < 0.1 * np.abs(wide).max()
    assert {leaf.dtype for leaf in jax.tree.leaves((got, outputs))} == {np.dtype(np.float32)}
    initial = jax.eval_shape(narrow.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, "depth must be a whole number, at least 2, got 1"),
        ({"num_heads": 5}, "width 12 is not divisible by num_heads 5"),
        ({"projection": 0}, "projection must be a whole number, at least 1, got 0"),
        ({"side_info": -1}, "side_info must be a whole number, 0 (for none) or more, got -1"),
        ({"sie_coefficient": float("nan")}, "sie_coefficient must be a finite number"),
        ({"feature": "befor"}, 'Unknown feature "befor". Did you mean "before"?'),
        ({"patch_stride": 0}, "patch_stride must be a number of pixels, at least 1, got 0"),
        ({"patch_stride": None}, "height 10 is not divisible by the patch 4; the nearest that are: 8 and 12"),
        ({"patch_size": 8}, "width 7 is smaller than the patch 8"),
        ({"image_size": 10}, "image_size must be (height, width)"),
        ({"num_classes": -2}, "num_classes must be a whole number"),
    ],
)
def test_bad_options_are_refused_before_anything_is_traced(options, message):
    given = {"num_classes": 6, "image_size": SIZE, **TINY, **options}
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_model("clip_reid", **given)


@pytest.mark.parametrize(
    ("side", "shape", "expected"),
    [
        (0, (2, 10, 7, 4), "(batch, 10, 7, 3), got (2, 10, 7, 4)"),
        (0, (2, 7, 10, 3), "which changes the number of position embeddings"),
        (3, (2, 10, 7, 3), "(batch, 10, 7, 4) (the fourth holds the number of the image's camera or view"),
    ],
)
def test_images_that_do_not_fit_are_refused(side, shape, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        jax.eval_shape(tiny(side_info=side).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
