"""A denoiser's constant before a layer without bias goes into the running mean of the BatchNorm that follows, exactly."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.certificate import certify
from drep_jax.core.denoisers import init_denoise, sample_noise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse, fuse_variables, fuse_variables_exact
from drep_jax.core.measured import measure
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import FusionError
from drep_jax.learners.losses import augmented_objective
from drep_jax.parallel import devices
from drep_jax.trees import get_in, set_in
from tests import trees
from tests.setups import make_setup

SCHEDULE = Schedule(beta_end=0.02)
X = trees.normal(0, (4, 6, 5, 3))


def norm(name, **options):
    return nn.BatchNorm(True, name=name, **options)


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(norm("norm")(nn.Dense(x.shape[-1], use_bias=False, name="layer")(x))), None


class Net(nn.Module):
    """Every kind of layer before a BatchNorm, two in a scan, and a head that tells channels apart."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(norm("norm1", epsilon=1e-3)(nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)))
        grouped = nn.Conv(6, (2, 2), strides=(2, 1), feature_group_count=2, use_bias=False, name="grouped")
        x = jnp.tanh(norm("norm2", use_bias=False, use_scale=False)(grouped(x)))
        x = jnp.tanh(norm("norm3")(nn.Conv(5, (1, 1), use_bias=False, name="single")(x)))
        x = jnp.tanh(norm("norm4")(nn.Dense(4, use_bias=False, name="dense")(x.mean(2))))
        axes = {"params": 0, "batch_stats": 0, "denoise": 0}
        x, _ = nn.scan(Repeated, variable_axes=axes, split_rngs={"params": True}, length=2)(name="scan")(x, None)
        return nn.Dense(3, name="head")(x.mean(1))


SITES = find_sites(Net(), X, pattern=".*", batchnorm_bias=True, time_scale=10)
NORMED = [site for site in SITES if site.name != "head"]


def variables_of(module, x, seed=0):
    """Random variables with variances that are not negative."""
    variables = trees.setup(module, x, (), seed)[0]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.2 + abs(leaf) if path[-1].key == "var" else leaf, dict(variables)
    )


VARIABLES = variables_of(Net(), X)
DENOISE = trees.randomize(init_denoise(SITES), 1, 0.3)


class Obstacles(nn.Module):
    """Layers without bias whose constant no running mean can take."""

    @nn.compact
    def __call__(self, x):
        x = norm("behind_relu")(nn.relu(nn.Dense(4, use_bias=False, name="relu")(x)))
        y = nn.Dense(4, use_bias=False, name="two_readers")(x)
        x = norm("of_two")(y) + y
        pairs = nn.DenseGeneral((2, 3), use_bias=False, name="two_axes")(x)
        x = norm("of_pairs")(pairs).reshape(*x.shape[:-1], -1)
        x = norm("in_bias")(nn.Dense(4, name="own_bias")(x))
        return nn.Dense(2, use_bias=False, name="last")(x)


def test_which_layers_have_a_place_for_a_constant():
    assert {site.name: site.layers[0].norm for site in NORMED} == {
        "conv": ("norm1",),
        "grouped": ("norm2",),
        "single": ("norm3",),
        "dense": ("norm4",),
        "scan/layer": ("scan", "norm"),
    }
    assert all(site.bias for site in SITES)
    without = find_sites(Net(), X, pattern=".*")
    assert [site.name for site in without if site.bias] == ["head"]
    sites = find_sites(Obstacles(), X, pattern=".*", batchnorm_bias=True)
    assert [site.name for site in sites if site.bias] == ["own_bias"]
    assert all(site.layers[0].norm is None for site in sites)
    # A pointwise denoiser acts before zeros are padded, so its constant would be missing there.
    pointwise = find_sites(Net(), X, pattern=".*", kind="pointwise", batchnorm_bias=True)
    assert [site.name for site in pointwise if not site.bias] == ["conv", "grouped"]


def test_the_running_mean_loses_what_the_kernel_makes_of_the_constant():
    ((path, constant),) = [(site.path, get_in(DENOISE, site.path)["bias"]) for site in SITES if site.name == "single"]
    only = set_in({}, path, {"kernel": np.zeros((6, 6), np.float32), "bias": np.asarray(constant)})
    (site,) = [site for site in SITES if site.name == "single"]
    fused = fuse_variables_exact(VARIABLES, only, (site,), SCHEDULE, rule="affine", steps=1, strength=0.5)
    kernel = np.asarray(VARIABLES["params"]["single"]["kernel"], np.float64)[0, 0]
    expected = VARIABLES["batch_stats"]["norm3"]["mean"] + 0.5 * kernel.T @ np.asarray(constant, np.float64)
    np.testing.assert_allclose(fused["batch_stats"]["norm3"]["mean"], expected, rtol=1e-6)  # x̂ = x − b_D
    changed = fused["batch_stats"]["norm3"].pop("mean")
    assert changed.dtype == np.float32
    fused["batch_stats"]["norm3"]["mean"] = VARIABLES["batch_stats"]["norm3"]["mean"]
    jax.tree.map(np.testing.assert_array_equal, fused, dict(VARIABLES))


def test_fused_is_explicit_and_the_certificate_sees_every_mean():
    noisy = jax.jit(lambda key: sample_noise(DENOISE, SITES, key))(jax.random.key(0))
    with jax.enable_x64(True):
        wide, noise, x = (trees.float64(tree) for tree in (VARIABLES, noisy, X))
        fused = jax.jit(lambda v, d: fuse_variables(v, d, SITES, SCHEDULE))(wide, noise)
        assert jax.tree.structure(fused) == jax.tree.structure(wide)
        explicit = jax.jit(lambda v, d: explicit_apply(Net(), v, d, SITES, SCHEDULE, x))(wide, noise)
        np.testing.assert_allclose(trees.outputs(Net(), fused, x), explicit, rtol=1e-11, atol=1e-11)
        assert np.abs(explicit - trees.outputs(Net(), {**fused, "batch_stats": wide["batch_stats"]}, x)).max() > 1e-3
    fused = fuse_variables_exact(VARIABLES, DENOISE, SITES, SCHEDULE)
    before, after = (tree["batch_stats"]["norm2"]["mean"] for tree in (VARIABLES, fused))
    moved = {**fused["batch_stats"]["norm2"], "mean": after + 0.01 * (after - before)}
    deployed = {"fused": fused["params"], "fused_statistics": {**fused["batch_stats"], "norm2": moved}}
    wrong = certify(Net(), VARIABLES, DENOISE, SITES, SCHEDULE, X, **deployed)
    assert max(row.figure.error for row in wrong.sites["float64"] if row.path != "grouped") < 1e-11
    assert [row.path for row in wrong.sites["float64"] if not row.figure.passed] == ["grouped"]
    assert not wrong.passed


def test_what_would_lose_a_constant_is_refused():
    params = {"backbone": VARIABLES["params"], "denoise": DENOISE}
    with pytest.raises(FusionError, match=r"changes the running mean of norm1, .* Call fuse_variables"):
        fuse(params, SITES, SCHEDULE)
    with pytest.raises(FusionError, match="no batch_stats/norm1/mean"):
        fuse_variables({"params": VARIABLES["params"]}, DENOISE, SITES, SCHEDULE)
    other = set_in(VARIABLES["batch_stats"], ("norm1", "mean"), np.zeros(7, np.float32))
    with pytest.raises(FusionError, match=r"batch_stats/norm1/mean has shape \(7,\), expected \(4,\)"):
        fuse_variables({**VARIABLES, "batch_stats": other}, DENOISE, SITES, SCHEDULE)
    with pytest.raises(FusionError, match=r"running means \(norm1\).*fused_statistics="):
        certify(Net(), VARIABLES, DENOISE, SITES, SCHEDULE, X, fused=VARIABLES["params"])
    without = find_sites(Net(), X, pattern=".*", time_scale=10)
    with pytest.raises(FusionError, match="batchnorm_bias=True"):
        fuse(params, without, SCHEDULE)


@pytest.mark.parametrize("pattern", [".*", "conv|single|scan.*"])
def test_measured_noise_gives_what_the_fused_network_computes(pattern):
    """The images go on to the next site with the constant, whether the layer has a bias or not."""
    streams = np.stack([X, X, X + 0.3 * trees.normal(5, X.shape)])
    sites = find_sites(Net(), X, pattern=pattern, batchnorm_bias=True)
    measured = measure(Net(), VARIABLES, sites, streams, [1, 1], ridge=1e-3)
    normed = [site for site in sites if site.layers[0].norm]
    assert all(np.abs(get_in(measured.denoise, site.path)["bias"]).max() > 1e-4 for site in normed)
    assert all(after <= before * (1 + 1e-9) < 1 for before, after in measured.errors.values())
    fused = fuse_variables_exact(VARIABLES, measured.denoise, sites, SCHEDULE, rule="affine", steps=1)
    for stream, variables in enumerate((VARIABLES, fused, fused)):
        np.testing.assert_allclose(
            measured.outputs[stream], trees.outputs(Net(), variables, streams[stream]), atol=2e-6
        )


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(2, (3, 3), use_bias=False, name="conv")(x)
        return nn.BatchNorm(not train, momentum=0.9, name="norm")(y).mean((1, 2))


def test_training_through_fusion_keeps_the_running_mean_of_the_unfused_backbone():
    images = np.asarray(np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3)), np.uint8)
    sites = find_sites(Trained(), images.astype(np.float32), batchnorm_bias=True, time_scale=50)
    setup = make_setup(Trained(), images, sites=sites, schedule=SCHEDULE)
    variables = variables_of(Trained(), images.astype(np.float32))
    denoise = trees.randomize(init_denoise(sites), 2, 0.3)
    others = {"batch_stats": variables["batch_stats"]}
    batch = {"image": images, "label": np.zeros(4, np.int32), "index": np.arange(4)}
    params = {"backbone": variables["params"], "denoise": denoise}
    options = {"rule": "ddpm", "steps": 1, "label_smoothing": 0.0, "compute": "float32", "remat": False}

    def step(batch):
        return augmented_objective(setup, options, params, others, batch, jax.random.key(0), weight=0.0, train=True)

    batches = jax.tree.map(lambda column: column[None], batch)
    _, (_, updated) = jax.jit(jax.vmap(step, axis_name=devices.AXIS))(batches)
    updated = jax.tree.map(lambda leaf: leaf[0], updated)
    inputs = setup.inputs(batch)
    _, explicit = explicit_train(variables, denoise, sites, inputs)
    np.testing.assert_allclose(updated["batch_stats"]["norm"]["mean"], explicit["norm"]["mean"], rtol=1e-4)
    np.testing.assert_allclose(updated["batch_stats"]["norm"]["var"], explicit["norm"]["var"], rtol=1e-4)
    drift = fuse_variables(variables, denoise, sites, SCHEDULE)["batch_stats"]["norm"]["mean"]
    assert np.abs(drift - variables["batch_stats"]["norm"]["mean"]).max() > 1e-2


def explicit_train(variables, denoise, sites, images):
    """What a step of explicit training makes of the statistics: those of the denoised layer's output."""
    fused = fuse_variables(variables, denoise, sites, SCHEDULE)
    constant = variables["batch_stats"]["norm"]["mean"] - fused["batch_stats"]["norm"]["mean"]
    y = nn.Conv(2, (3, 3), use_bias=False).apply({"params": fused["params"]["conv"]}, images) + constant.reshape(
        1, 1, 1, -1
    )
    old = variables["batch_stats"]["norm"]
    batch = {"mean": y.mean((0, 1, 2)), "var": y.var((0, 1, 2))}
    return y, {"norm": {name: 0.9 * old[name] + 0.1 * batch[name] for name in old}}
