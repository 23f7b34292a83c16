"""Mixed statistics of BatchNorms: the mixture against NumPy, the fused network against the explicit one, rows and programs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.denoisers import init_denoise
from drep_jax.core.fusion import fuse_variables
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.data.npz_source import ArraySource
from drep_jax.errors import ConfigError
from drep_jax.evaluation.arms import score_arms
from drep_jax.exporting.stablehlo import export_stablehlo, load_stablehlo
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.jobs.scores import with_statistics
from drep_jax.run.export import Output
from tests import trees
from tests.setups import make_setup

SIZE = (6, 5)
X = trees.normal(0, (4, *SIZE, 3))


class Net(nn.Module):
    """A BatchNorm over maps and one over vectors, of which an image has no statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="maps")(nn.Conv(4, (3, 3), use_bias=False, name="conv")(x))
        x = jnp.tanh(x).mean((1, 2))
        return nn.BatchNorm(not train, epsilon=1e-3, name="vectors")(nn.Dense(3, use_bias=False, name="dense")(x))


def variables_of(module, x):
    variables = trees.setup(module, x, (), 3)[0]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.2 + abs(leaf) if path[-1].key == "var" else leaf, dict(variables)
    )


VARIABLES = variables_of(Net(), X)


def normalized(name, x, alpha, axes, epsilon):
    """A BatchNorm with mixed statistics, in NumPy."""
    stats, params = VARIABLES["batch_stats"][name], VARIABLES["params"][name]
    x = np.asarray(x, np.float64)
    mean = (1 - alpha) * np.asarray(stats["mean"]) + alpha * x.mean(axes, keepdims=True)
    var = (1 - alpha) * np.asarray(stats["var"]) + alpha * x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * np.asarray(params["scale"]) + np.asarray(params["bias"])


@pytest.mark.parametrize("text", ["image:0.3", "batch:0.25", "batch:1", "image:0"])
def test_the_mixture_against_numpy(text):
    mixture = Statistics.parse(text)
    by_image = mixture.over == "image"
    y = trees.outputs(nn.Conv(4, (3, 3), use_bias=False), {"params": VARIABLES["params"]["conv"]}, X)
    y = normalized("maps", y, mixture.alpha, (1, 2) if by_image else (0, 1, 2), 1e-5)
    y = np.tanh(y).mean((1, 2)) @ np.asarray(VARIABLES["params"]["dense"]["kernel"])
    expected = normalized("vectors", y, 0.0 if by_image else mixture.alpha, (0,), 1e-3)
    outputs = trees.outputs(MixedStatistics(Net(), mixture), VARIABLES, X)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    if not mixture.alpha:
        np.testing.assert_array_equal(outputs, trees.outputs(Net(), VARIABLES, X))
    elif by_image:  # an image by itself gives what it gives among others
        alone = trees.outputs(MixedStatistics(Net(), mixture), VARIABLES, X[2:3])
        np.testing.assert_allclose(outputs[2:3], alone, rtol=1e-5, atol=1e-6)


def test_a_constant_in_the_running_mean_is_explicit_with_mixed_statistics_too():
    """mean' = mean − W·c: the images' mean lacks W·c as well, so every mixture subtracts it once."""
    (site,) = find_sites(Net(), X, pattern="conv", kind="patch", batchnorm_bias=True)
    denoise = trees.randomize(init_denoise((site,)), 1, 0.3)
    with jax.enable_x64(True):
        wide, maps, x = (trees.float64(tree) for tree in (VARIABLES, denoise, X))
        fused = fuse_variables(wide, maps, (site,), Schedule(), rule="affine", steps=1)
        constant = wide["batch_stats"]["maps"]["mean"] - fused["batch_stats"]["maps"]["mean"]
        assert np.abs(constant).max() > 0.05
        # The layer with a bias W·c of its own, and the unfused running mean.
        biased = {**wide, "params": {**wide["params"], "conv": {**fused["params"]["conv"], "bias": constant}}}

        class Biased(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.BatchNorm(True, name="maps")(nn.Conv(4, (3, 3), name="conv")(x))
                x = jnp.tanh(x).mean((1, 2))
                return nn.BatchNorm(True, epsilon=1e-3, name="vectors")(nn.Dense(3, use_bias=False, name="dense")(x))

        for text in ("image:0.3", "batch:0.25", "batch:1"):
            mixture = Statistics.parse(text)
            explicit = trees.outputs(MixedStatistics(Biased(), mixture), biased, x)
            np.testing.assert_allclose(trees.outputs(MixedStatistics(Net(), mixture), fused, x), explicit, rtol=1e-9)


def test_batches_divided_and_padded_count_every_image_once():
    """Ten images among the devices, in batches of eight: the last is mostly padding."""
    images = np.random.default_rng(0).integers(0, 256, (10, *SIZE, 3), np.uint8)
    source = ArraySource("ten", images, np.arange(10, dtype=np.int32) % 3, ("a", "b", "c"), None)
    setup = make_setup(Net(), images, source=source)
    arms, mixed = with_statistics({"evaluate": {"statistics": ["image:0.2", "batch:0.5"]}}, {"net": VARIABLES}, ["net"])
    assert list(arms) == ["net", "net+image:0.2", "net+batch:0.5"]
    ((_, scored),) = score_arms(setup, arms, source, ("clean",), batch_size=8, seed=0, statistics=mixed)
    x = np.asarray(setup.inputs({"image": images}))
    batches = [x[:8], x[8:]]
    for name, mixture in {"net": None, **mixed}.items():
        network = Net() if mixture is None else MixedStatistics(Net(), mixture)
        logits = np.concatenate([trees.outputs(network, VARIABLES, batch) for batch in batches])
        statistics = setup.task.statistics(logits, {"label": np.arange(10) % 3, "mask": np.ones(10, bool)})
        for row, expected in zip(*map(jax.tree.leaves, (scored.statistics[name], statistics)), strict=True):
            np.testing.assert_allclose(row, expected, rtol=1e-5, err_msg=name)


def test_a_file_computes_with_mixed_statistics_at_any_batch_size(tmp_path):
    network = MixedStatistics(Net(), Statistics.parse("image:0.3"))
    path = str(tmp_path / "mixed.stablehlo")
    assert export_stablehlo(network, VARIABLES, SIZE, path, platforms=("cpu",)).passed
    np.testing.assert_allclose(load_stablehlo(path)(X), trees.outputs(network, VARIABLES, X), rtol=1e-4, atol=1e-5)
    output = Output(str(tmp_path), forms=("stablehlo",), statistics=Statistics.parse("image:0.3"))
    assert output.program("stablehlo").endswith("fused_image_0.3.stablehlo")


class Windows(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True, name="norm")(x.reshape(-1, 5, 3)).mean()


def test_refusals():
    for text in ("image", "image:2", "image:-1", "image:x", "layer:0.1", "batch:nan", "batch:1e"):
        with pytest.raises(ConfigError, match="image:α"):
            Statistics.parse(text)
    image = Statistics.parse("image:0.1")
    with pytest.raises(ConfigError, match=r"has no BatchNorm whose statistics image:0\.1 could mix"):
        MixedStatistics(nn.Dense(2), image).apply({"params": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}}, X)
    with pytest.raises(
        ConfigError, match=r"norm: the first axis of its input \(24, 5, 3\) is not the batch of 4 images"
    ):
        MixedStatistics(Windows(), image).apply(variables_of(Windows(), X), X)
    with pytest.raises(ConfigError, match="add --export=stablehlo or onnx"):
        Output("out", statistics=image)
    with pytest.raises(ConfigError, match="fold_batchnorm makes BatchNorms constants"):
        Output("out", forms=("onnx",), statistics=image, fold_batchnorm=True)
