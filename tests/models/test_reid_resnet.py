"""ResNets of re-identification: stems, one branch and two, what retrieval and the losses get, bad input."""

import functools
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
from tests.models.test_models import np_conv, np_norm, random_variables

SIZE = (17, 12)
TINY = {"stage_sizes": (1, 2), "block": "basic", "width": 4}


def tiny(num_classes=6, **options):
    return create_model("resnet_reid", num_classes=num_classes, image_size=SIZE, **{**TINY, **options})


def pictures(batch=4):
    return np.random.default_rng(0).normal(size=(batch, *SIZE, 3)).astype(np.float32)


def np_stage(x, p, s, name, size):
    """Basic blocks of stride 1 in float64."""
    for i in range(size):
        q, r = p[f"{name}_{i}"], s[f"{name}_{i}"]
        y = np.maximum(np_norm(np_conv(x, q["conv1"]["kernel"], 1), q["bn1"], r["bn1"]), 0)
        y = np_norm(np_conv(y, q["conv2"]["kernel"], 1), q["bn2"], r["bn2"])
        if "downsample_conv" in q:
            x = np_norm(np_conv(x, q["downsample_conv"]["kernel"], 1), q["downsample_bn"], r["downsample_bn"])
        x = np.maximum(y + x, 0)
    return x


def np_stem(x, p, s, stem):
    x = np_norm(np_conv(x, p["conv1"]["kernel"], 2), p["bn1"], s["bn1"])
    x = x if stem == "strong_baseline" else np.maximum(x, 0)
    if stem == "fast_reid":  # each window begins inside the maps and may end outside
        rows, columns = ([slice(i, i + 3) for i in range(0, max(n - 1, 1), 2)] for n in x.shape[1:3])
    else:
        rows, columns = ([slice(max(i - 1, 0), i + 2) for i in range(0, n, 2)] for n in x.shape[1:3])
    return np.stack([np.stack([x[:, r, c].max((1, 2)) for c in columns], axis=1) for r in rows], axis=1)


@pytest.mark.parametrize(
    ("stem", "branches", "feature"),
    [("torchvision", 2, "before"), ("strong_baseline", 1, "after"), ("fast_reid", 1, "before")],
)
def test_features_and_logits_equal_numpy(stem, branches, feature):
    module, x = tiny(stem=stem, branches=branches, feature=feature), pictures()
    variables = random_variables(module, x)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    p, s = wide["params"], wide["batch_stats"]
    trunk = np_stage(np_stem(x.astype(np.float64), p, s, stem), p, s, "layer1", 1)

    def both(variables, x):
        return module.apply(variables, x), module.apply(variables, x, method="outputs")

    retrieved, outputs = jax.jit(both)(variables, x)
    assert len(outputs["features"]) == len(outputs["logits"]) == branches
    wanted = []
    for i, branch in enumerate(("same", "different") if branches == 2 else ("",)):
        prefix, suffix = (f"{branch}_", f"_{branch}") if branch else ("", "")
        before = np_stage(trunk, p, s, f"{prefix}layer2", 2).mean((1, 2))
        held, q = s[f"neck{suffix}"]["bottleneck"], p[f"neck{suffix}"]
        after = (before - held["mean"]) / np.sqrt(held["var"] + 1e-5) * q["bottleneck"]["scale"]
        np.testing.assert_allclose(outputs["features"][i], before, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(outputs["logits"][i], after @ q["classifier"]["kernel"], rtol=1e-3, atol=1e-3)
        wanted.append(before if feature == "before" else after)
    np.testing.assert_allclose(retrieved, np.concatenate(wanted, axis=1), rtol=1e-3, atol=1e-3)
    assert retrieved.shape == (4, 8 * branches) and module.branches == branches


def test_training_uses_and_updates_the_statistics_of_both_necks():
    module, x = tiny(branches=2), pictures()
    variables = random_variables(module, x)
    train = jax.jit(lambda v: module.apply(v, x, train=True, method="outputs", mutable=["batch_stats"]))
    outputs, updated = train(variables)
    for branch, feature, logits in zip(("same", "different"), outputs["features"], outputs["logits"], strict=True):
        old, new = (v["batch_stats"][f"neck_{branch}"]["bottleneck"]["mean"] for v in (variables, updated))
        np.testing.assert_allclose(new, 0.9 * old + 0.1 * feature.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits.mean(0), 0, atol=1e-3)  # no shift, no bias


@pytest.mark.parametrize("remat", [False, True])
def test_devices_share_the_statistics_of_their_batches(remat):
    x = pictures()
    variables = random_variables(tiny(branches=2), x)

    def train(module, x):
        return module.apply(variables, x, train=True, method="outputs", mutable=["batch_stats"])

    whole, statistics = jax.jit(functools.partial(train, tiny(branches=2)))(x)
    shared = functools.partial(train, tiny(branches=2, axis_name="devices", remat=remat))
    parts, each = jax.jit(jax.vmap(shared, axis_name="devices"))(x.reshape(2, 2, *x.shape[1:]))
    for got, wanted in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-3)
    for got, wanted in zip(jax.tree.leaves(each), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_allclose(got, np.stack([wanted, wanted]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected", "width"),
    # ResNet-50 has 25,557,032 with its fc; a last stage 14,964,736, as torchvision counts them.
    [
        ("resnet50_reid", 25_557_032 - 2_049_000 + 2048 * (1 + 576), 2048),
        ("resnet50_vanet", 25_557_032 - 2_049_000 + 14_964_736 + 2 * 2048 * (1 + 576), 4096),
    ],
)
def test_parameters_and_feature_at_full_size(name, expected, width):
    module, x = create_model(name, num_classes=576, image_size=(256, 256)), jnp.zeros((2, 256, 256, 3))
    feature, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected
    assert (feature.shape, feature.dtype) == ((2, width), jnp.float32)


@pytest.mark.slow
def test_the_branches_begin_with_one_tensor_and_share_its_denoiser_and_classifiers_are_no_layers():
    module, x = tiny(branches=2, block="bottleneck"), pictures()
    assert not any("neck" in layer.name for layer in find_layers(module, x))
    sites = find_sites(module, x, pattern=".*layer2_0/.*")
    firsts = {
        f"{branch}_layer2_0/{layer}" for branch in ("same", "different") for layer in ("conv1", "downsample_conv")
    }
    assert firsts == {layer.name for layer in sites[0].layers}
    rng, tree = np.random.default_rng(3), {}
    for site in sites:
        kernel = rng.normal(0, 0.3, site.denoiser_shape).astype(np.float32)
        tree.setdefault(site.path[0], {})[site.path[1]] = {"kernel": kernel}
    certificate = certify(module, random_variables(module, x), tree, sites, Schedule(beta_end=0.02), x)
    assert certificate.passed, str(certificate)


def test_bfloat16_computes_narrow_and_gives_float32():
    module, x = tiny(), pictures()
    variables = random_variables(module, x)
    wide = np.asarray(jax.jit(module.apply)(variables, x))
    narrow = np.asarray(jax.jit(tiny(dtype="bfloat16").apply)(variables, x))
    assert narrow.dtype == np.float32 and 0 < np.abs(narrow - wide).max() < 0.1 * np.abs(wide).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": 3}, "branches must be 1 or 2, got 3"),
        ({"last_stride": 0}, "last_stride must be 1 or 2, got 0"),
        ({"stem": "fastreid"}, 'Unknown stem "fastreid". Did you mean "fast_reid"?'),
        ({"feature": "afer"}, 'Unknown feature "afer". Did you mean "after"?'),
        ({"block": "bottlenek"}, 'Unknown block "bottlenek". Did you mean "bottleneck"?'),
        ({"stage_sizes": ()}, "stage_sizes must be the number of blocks"),
        ({"width": 0}, "width must be a number of channels, at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be 0 (no head: features) or more, got -1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_traced(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_model("resnet_reid", **{"num_classes": 6, "image_size": SIZE, **TINY, **options})


def test_four_channels_are_refused():
    with pytest.raises(ConfigError, match=re.escape("(batch, height, width, 3), got (2, 17, 12, 4)")):
        jax.eval_shape(tiny().init, jax.random.key(0), jax.ShapeDtypeStruct((2, *SIZE, 4), jnp.float32))
