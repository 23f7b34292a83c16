"""Folding BatchNorm changes no function and no tree, finds its layer by the numbers that flow, and says what it leaves."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.denoisers import init_denoise
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import ExportError, NonFiniteError
from drep_jax.exporting.fold_batchnorm import find_folds, fold_batchnorm, unit_variance
from drep_jax.exporting.fold_certificate import certify_folds
from tests.exporting.tiny import FAMILIES, SIZE, network
from tests.trees import float64, normal, randomize, zeros

X = normal(3, (3, 6, 5, 4))


class Net(nn.Module):
    """One layer, one BatchNorm, and a head that tells channels and pixels apart."""

    layer: str
    bias: bool
    scale: bool = True
    shift: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        parts = {
            "conv": lambda: nn.Conv(6, (3, 2), strides=(2, 1), use_bias=self.bias, dtype=self.dtype, name="layer"),
            "depthwise": lambda: nn.Conv(8, (3, 3), feature_group_count=4, use_bias=self.bias, name="layer"),
            "grouped": lambda: nn.Conv(6, (2, 2), feature_group_count=2, use_bias=self.bias, name="layer"),
            "dense": lambda: nn.Dense(6, use_bias=self.bias, name="layer"),
            "general": lambda: nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=self.bias, name="layer"),
        }
        x = parts[self.layer]()(x)
        norm = nn.BatchNorm(
            True, epsilon=1e-3, use_scale=self.scale, use_bias=self.shift, dtype=self.dtype, name="norm"
        )
        return nn.Dense(3, name="head")(jnp.tanh(norm(x)).reshape(x.shape[0], -1))


def variables_of(module, *args, seed=0):
    """Random variables: every leaf, γ of both signs and one exactly 0, variances from 1e-4 to 10."""
    variables = randomize(zeros(jax.eval_shape(module.init, jax.random.key(0), *args)), seed, 0.7)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.asarray(leaf).at[..., 0].set(0.0).at[..., -1].set(-abs(leaf[..., -1]))
        if path[-1].key == "var":
            return jnp.asarray(10.0 ** random.uniform(-4, 1, leaf.shape), leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(draw, variables)


def exactly(module, variables, *args):
    """What the module computes in float64."""
    with jax.enable_x64(True):
        wide, inputs = float64(variables), float64(args)
        return np.asarray(module.apply(wide, *inputs))


def leaves(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", ["conv", "depthwise", "grouped", "dense", "general"])
def test_function_tree_and_forms_stay_and_the_norm_becomes_a_constant(layer, bias):
    module = Net(layer, bias)
    variables, folds = variables_of(module, X), find_folds(module, X)
    assert [(f.layer.name, f.norm) for f in folds.found] == [("layer", ("norm",))] and not folds.left
    folded = fold_batchnorm(variables, folds, round_back=False)
    assert jax.tree_util.tree_structure(folded) == jax.tree_util.tree_structure(variables)
    before, after = exactly(module, variables, X), exactly(module, folded, X)
    assert np.abs(before).max() > 0.1
    np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-10)

    stored = leaves(fold_batchnorm(variables, folds))
    assert {n: (v.shape, v.dtype) for n, v in stored.items()} == {
        n: (v.shape, v.dtype) for n, v in leaves(variables).items()
    }
    assert np.all(stored["params/norm/scale"] == 1) and np.all(stored["batch_stats/norm/mean"] == 0)
    assert np.all(stored["batch_stats/norm/var"] + np.float32(1e-3) == 1)
    assert np.all(stored["params/norm/bias"] == 0) == bias
    kernel = variables["params"]["layer"]["kernel"]
    assert np.abs(stored["params/layer/kernel"] - kernel).max() > 0.1
    assert np.all(stored["params/layer/kernel"][..., 0] == 0)  # γ = 0
    np.testing.assert_array_equal(stored["params/head/kernel"], variables["params"]["head"]["kernel"])


def test_kernel_and_constant_against_numpy():
    module = Net("conv", True)
    variables, folds = variables_of(module, X), find_folds(module, X)
    folded = fold_batchnorm(variables, folds, round_back=False)
    params, stats = float64(variables["params"]), float64(variables["batch_stats"]["norm"])
    for o in range(6):
        gain = params["norm"]["scale"][o] / np.sqrt(stats["var"][o] + 1e-3)
        np.testing.assert_allclose(
            folded["params"]["layer"]["kernel"][..., o], params["layer"]["kernel"][..., o] * gain
        )
        constant = (params["layer"]["bias"][o] - stats["mean"][o]) * gain + params["norm"]["bias"][o]
        np.testing.assert_allclose(folded["params"]["layer"]["bias"][o], constant, rtol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(False, False), (True, False), (False, True)])
def test_norms_without_scale_or_bias(bias, scale, shift):
    module = Net("conv", bias, scale, shift)
    variables, folds = variables_of(module, X), find_folds(module, X)
    certificate = certify_folds(module, variables, folds, X)
    assert certificate.passed, str(certificate)
    folded = fold_batchnorm(variables, folds)
    assert np.all(folded["batch_stats"]["norm"]["mean"] == 0) == (bias or shift)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3, 1e-6, 0.001 / 3, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16])
def test_variance_and_epsilon_add_up_to_one_in_every_type(epsilon, dtype):
    v = unit_variance(epsilon, dtype)
    assert v.dtype == dtype and v + np.asarray(epsilon, dtype) == 1


# --- which layer -----------------------------------------------------------------------------------------------------


class Untouchable(nn.BatchNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


class Odd(nn.Module):
    """Every way in which a BatchNorm cannot be folded, and some names that mislead."""

    @nn.compact
    def __call__(self, x):
        def norm(name, **options):
            return nn.BatchNorm(True, name=name, **options)

        def conv(name):
            return nn.Conv(4, (1, 1), name=name)

        x = norm("first")(x)
        y = conv("norm_conv")(x)
        unused = jnp.cos(y)  # nothing depends on it, so it reads nothing
        y = norm("conv_norm")(y)
        y = norm("again")(y)
        y = norm("after_sum")(conv("summed")(y) + x)
        z = conv("shared")(y)
        y = norm("beside")(z) + jnp.sin(z)
        two = conv("two")
        y = norm("of_two")(two(y)) + jnp.tanh(two(x))
        both = norm("both")
        y = both(conv("one")(y)) + jnp.tanh(both(conv("other")(x)))
        y = norm("rows", axis=1)(conv("before_rows")(y))
        y = Untouchable(True, name="own")(conv("before_own")(y))
        y = norm("moved")(conv("before_moved")(y).transpose(0, 2, 1, 3))
        out = norm("early")(conv("before_early")(y))
        del unused
        return nn.Dense(2, name="head")(out), out


def test_what_is_not_exact_is_left_and_the_reason_is_said():
    module = Odd()
    folds = find_folds(module, X)
    assert [(f.layer.name, "/".join(f.norm)) for f in folds.found] == [
        ("norm_conv", "conv_norm"),
        ("before_early", "early"),
    ]
    expected = {
        "first": "it reads an input",
        "again": "it reads the result of",
        "after_sum": 'it reads the result of "add"',
        "beside": "others read the output of shared too",
        "of_two": "two is called more than once",
        "both": "both is called more than once",
        "rows": "it normalizes axis 1",
        "own": "Untouchable overrides __call__",
        "moved": 'it reads the result of "transpose"',
    }
    assert set(folds.left) == set(expected)
    for name, reason in expected.items():
        assert folds.left[name].startswith(reason), (name, folds.left[name])
        assert f"  {name}: {reason}" in str(folds)


class OutputToo(nn.Module):
    """The layer's output is an output of the network."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(2, (1, 1), name="conv")(x)
        return y, nn.BatchNorm(True, name="norm")(y)


def test_nothing_to_fold_is_an_error_with_the_reasons():
    folds = find_folds(OutputToo(), X)
    with pytest.raises(ExportError, match="norm: others read the output of conv too"):
        fold_batchnorm(variables_of(OutputToo(), X), folds)
    module, variables = network(*FAMILIES["vit"])
    with pytest.raises(ExportError, match="no BatchNorm that can be folded"):
        fold_batchnorm(variables, find_folds(module, jnp.zeros((1, *SIZE, 3))))


def test_variables_of_another_network():
    folds = find_folds(Net("conv", True), X)
    with pytest.raises(ExportError, match="another network"):
        fold_batchnorm({"params": {"head": {}}}, folds)


def test_a_weight_that_overflows_is_refused():
    module = Net("conv", False)
    variables = variables_of(module, X)
    huge = jnp.full_like(variables["params"]["layer"]["kernel"], 3e38)
    variables["params"]["layer"]["kernel"] = huge
    variables["batch_stats"]["norm"]["var"] = jnp.zeros_like(variables["batch_stats"]["norm"]["var"])
    with pytest.raises(NonFiniteError, match=re.escape("Refusing to fold BatchNorm: params/layer/kernel")):
        fold_batchnorm(variables, find_folds(module, X))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.BatchNorm(True, name="norm")(nn.Conv(x.shape[-1], (3, 3), use_bias=False, name="conv")(x))
        return x + jnp.tanh(y), None


class Looped(nn.Module):
    """Stacked and recomputed blocks."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0, "denoise": 0}
        looped = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)
        x, _ = looped(name="blocks")(x, None)
        return nn.remat(Block)(name="last")(x)[0].mean((1, 2))


def test_stacked_and_recomputed_blocks():
    module = Looped()
    variables, folds = variables_of(module, X), find_folds(module, X)
    assert [f.layer.name for f in folds.found] == ["blocks/conv", "last/conv"] and not folds.left
    certificate = certify_folds(module, variables, folds, X)
    assert certificate.passed, str(certificate)
    folded = fold_batchnorm(variables, folds, round_back=False)
    assert folded["params"]["blocks"]["conv"]["kernel"].shape == (3, 3, 3, 4, 4)
    np.testing.assert_allclose(exactly(module, folded, X), exactly(module, variables, X), rtol=1e-9, atol=1e-10)


# --- the certificate -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    """A ResNet whose denoisers are fused already."""
    module, variables = network(*FAMILIES["resnet, bottleneck"])
    images = normal(1, (2, *SIZE, 3))
    sites = find_sites(module, images, bias=False)
    denoise = randomize(zeros(jax.eval_shape(lambda: init_denoise(sites))), 1, 0.1)
    fused = fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, Schedule(beta_end=0.02))
    return module, {**variables, "params": fused}, images, find_folds(module, images)


def test_certificate_after_fusion(resnet):
    module, variables, images, folds = resnet
    assert len(folds.found) == 9 and not folds.left
    certificate = certify_folds(module, variables, folds, images)
    assert certificate.passed and "PASSED" in str(certificate)
    assert certificate.end_to_end["float64"].error < 1e-13
    assert certificate.structure == {
        "same_tree": True,
        "same_dtypes": True,
        "same_program": True,
        "norms_are_constants": True,
    }
    assert set(certificate.layers["float64"]) == {f.layer.name for f in folds.found}
    assert certificate.to_json()["passed"] is True


def test_weights_that_are_not_folded_or_folded_wrongly_fail(resnet):
    module, variables, images, folds = resnet
    untouched = certify_folds(module, variables, folds, images, folded=variables)
    assert not untouched.passed and not untouched.structure["norms_are_constants"]

    wrong = fold_batchnorm(variables, folds)
    kernel = wrong["params"]["layer1_0"]["conv2"]["kernel"]
    wrong["params"]["layer1_0"]["conv2"]["kernel"] = kernel * np.float32(1 + 1e-4)
    found = certify_folds(module, variables, folds, images, folded=wrong)
    assert [name for name, row in found.layers["float64"].items() if not row.passed] == ["layer1_0/conv2"]
    assert not found.passed and "FAILED" in str(found)


def test_narrow_types():
    module = Net("conv", False, dtype=jnp.bfloat16)
    variables = variables_of(module, X)
    variables["params"] = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
    certificate = certify_folds(module, variables, find_folds(module, X), X)
    assert certificate.passed, str(certificate)
    assert set(certificate.end_to_end) == {"float64", "bfloat16"}
    assert certificate.end_to_end["float64"].error < 1e-12
