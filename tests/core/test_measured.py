"""Measured noise: against a direct NumPy solution layer by layer, with junctions, loops, groups, and bad input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core import interpreter, jaxpr
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.measured import measure
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import DataError, NonFiniteError, SiteError
from drep_jax.models import create_model
from drep_jax.trees import get_in

KEY = jax.random.key(0)


def fused_params(params, denoise, sites):
    return fuse_exact({"backbone": params, "denoise": denoise}, sites, Schedule(), rule="affine", steps=1)


def streams(shape=(48, 6), noise=0.6, count=2, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(shape[-1], shape[-1])) / np.sqrt(shape[-1])
    clean = (rng.normal(size=shape) @ mix + 0.5).astype(np.float32)
    noisy = [clean + noise * rng.normal(size=shape).astype(np.float32) for _ in range(count - 1)]
    return np.stack([clean, clean, *noisy])


class Mlp(nn.Module):
    """Two Dense layers, the second optionally added to a shortcut."""

    bias: bool = True
    residual: bool = False
    hidden: int = 8

    @nn.compact
    def __call__(self, x):
        y = nn.tanh(nn.Dense(self.hidden, use_bias=self.bias, name="a")(x))
        y = nn.Dense(x.shape[-1], use_bias=self.bias, name="b")(y)
        if self.residual:
            scale = self.param("scale", lambda key: jnp.linspace(1.0, -2.0, x.shape[-1]))
            y = x - y * scale[None]
        return nn.Dense(3, name="c")(nn.relu(y))


def ridge_regression(w, t, old, weights, ridge, bias):
    """Weighted least squares of t on w, drawn to `old`, in float64 and without any of the project's code."""
    w, t = w.astype(np.float64), t.astype(np.float64)
    each = np.repeat(weights, w.shape[1]) / w.shape[1]
    w, t = w.reshape(-1, w.shape[-1]), t.reshape(-1, t.shape[-1])
    mw, mt = (each @ w, each @ t) if bias else (np.zeros(w.shape[1]), np.zeros(t.shape[1]))
    w, t = w - mw, t - mt
    square = (w * each[:, None]).T @ w
    pull = ridge * np.trace(square) / len(square) * np.eye(len(square))
    kernel = np.linalg.solve(square + pull, (w * each[:, None]).T @ t + pull @ old)
    return kernel, mt - mw @ kernel


@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_layer_are_the_regressions_they_claim_to_be(bias):
    model, images, weights, ridge = Mlp(bias=bias), streams(), np.array([0.3, 0.7]), 1e-2
    variables = model.init(KEY, images[0])
    params = jax.tree_util.tree_map(np.asarray, variables["params"])
    sites = find_sites(model, images[0], pattern="[ab]")
    measured = measure(model, variables, sites, images, weights * 5, ridge=ridge, shortcut=False)
    new = fused_params(params, measured.denoise, sites)

    x = images
    for name in ("a", "b"):
        old = params[name]["kernel"].astype(np.float64)
        shift = params[name].get("bias", 0.0)
        kernel, constant = ridge_regression(x[1:], np.stack([x[0] @ old] * 2), old, weights, ridge, bias)
        np.testing.assert_allclose(new[name]["kernel"], kernel, atol=2e-5)
        if bias:
            np.testing.assert_allclose(new[name]["bias"], shift + constant, atol=2e-5)
        clean, rest = x[:1] @ old + shift, x[1:] @ kernel + shift + constant
        x = np.tanh(np.concatenate([clean, rest]))


def test_a_layer_answers_for_the_noise_of_the_shortcut_it_is_subtracted_from():
    model, images, weights, ridge = Mlp(residual=True), streams(count=3), np.array([0.2, 0.4, 0.4]), 1e-3
    variables = model.init(KEY, images[0])
    params = jax.tree_util.tree_map(np.asarray, variables["params"])
    sites = find_sites(model, images[0], pattern="b")
    measured = measure(model, variables, sites, images, weights, ridge=ridge)
    new = fused_params(params, measured.denoise, sites)

    hidden = np.tanh(images @ params["a"]["kernel"] + params["a"]["bias"]).astype(np.float64)
    old = params["b"]["kernel"].astype(np.float64)
    # x − scale·y is to be clean: y must become the clean y − (x_clean − x)/scale
    target = hidden[0] @ old - (images[0] - images[1:]) / params["scale"]
    kernel, constant = ridge_regression(hidden[1:], target, old, weights, ridge, bias=True)
    np.testing.assert_allclose(new["b"]["kernel"], kernel, atol=5e-5)
    np.testing.assert_allclose(new["b"]["bias"], params["b"]["bias"] + constant, atol=5e-5)

    def sum_error(p):
        y = hidden[1:] @ p["b"]["kernel"] + p["b"]["bias"]
        clean = images[0] - params["scale"] * (hidden[0] @ old + params["b"]["bias"])
        return np.mean(((images[1:] - params["scale"] * y) - clean) ** 2)

    plain = measure(model, variables, sites, images, weights, ridge=ridge, shortcut=False)
    assert sum_error(new) < 0.9 * sum_error(fused_params(params, plain.denoise, sites))
    assert measured.errors["b"][1] < measured.errors["b"][0]


def test_muted_channels_get_no_correction():
    class Muted(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(x.shape[-1], name="b")(nn.tanh(x))
            return x + y * jnp.where(jnp.arange(x.shape[-1]) == 2, 0.0, 1.0)[None]

    images = streams()
    model = Muted()
    variables = model.init(KEY, images[0])
    sites = find_sites(model, images[0])
    measured = measure(model, variables, sites, images, [1, 1])
    new = fused_params(variables["params"], measured.denoise, sites)
    assert np.isfinite(new["b"]["kernel"]).all() and np.abs(new["b"]["kernel"]).max() < 100


def test_junctions_are_found_in_a_resnet_and_in_both_kinds_of_vit():
    def junctions(name, size, **overrides):
        model = create_model(name, num_classes=3, image_size=size, **overrides)
        x = jnp.zeros((2, *size, 3))
        variables = model.init(KEY, x)
        sites = find_sites(model, x, pattern=".*")
        closed = interpreter.trace(model, variables, sites, x)
        count = len(jax.tree_util.tree_leaves(variables))
        moving = jaxpr.varying_vars(closed.jaxpr, [False] * count + [True])
        eqns = closed.jaxpr.eqns
        return {eqns[n].params["name"].split(":")[1] for n in interpreter.find_junctions(closed.jaxpr, moving)}

    small = {"patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12}
    blocks = {f"encoderblock_{i}/{layer}" for i in (0, 1) for layer in ("attn/out", "mlp/fc2")}
    assert junctions("vit", (8, 8), **small) == blocks
    assert junctions("vit", (8, 8), post_norm=True, **small) == blocks
    net = {"stage_sizes": (1, 1), "width": 4, "stem": "cifar"}
    assert junctions("resnet", (8, 8), block="basic", shortcut="pad", **net) == {"layer1_0/conv2", "layer2_0/conv2"}
    names = junctions("resnet", (8, 8), block="bottleneck", **net)
    assert names == {f"layer{s}_0/{layer}" for s in (1, 2) for layer in ("conv3", "downsample_conv")} or names >= {
        "layer1_0/conv3",
        "layer2_0/conv3",
    }


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"scan": True}, {"remat": True}], ids=str
)
def test_scanned_and_rematerialized_blocks_give_the_same_network(options):
    small = {"patch_size": 4, "width": 8, "depth": 3, "num_heads": 2, "mlp_dim": 12}
    images = np.random.default_rng(0).normal(size=(3, 16, 8, 8, 3)).astype(np.float32)
    images[1] = images[0]
    model = create_model("vit", num_classes=3, image_size=(8, 8), **small)
    other = create_model("vit", num_classes=3, image_size=(8, 8), **small, **options)
    params = model.init(KEY, images[0])["params"]
    from drep_jax.models.vit import stack_blocks

    def logits(module, params):
        sites = find_sites(module, images[0], pattern=".*(query|key|value|out|fc1|fc2)")
        measured = measure(module, {"params": params}, sites, images, [1, 1], ridge=1e-2)
        new = fused_params(params, measured.denoise, sites)
        return module.apply({"params": new}, images[2]), measured.errors

    expected, errors = logits(model, params)
    got, others = logits(other, stack_blocks(params) if options.get("scan") else params)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert sorted(np.round(list(errors.values()), 4).tolist()) == sorted(np.round(list(others.values()), 4).tolist())
    assert float(jnp.abs(expected - model.apply({"params": params}, images[2])).max()) > 0.01


@pytest.mark.parametrize("kind", ["auto", "pointwise"])
def test_convolutions_with_groups_strides_and_borders(kind):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2), use_bias=False, name="a")(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="b")(x))
            return nn.Conv(6, (1, 1), name="c")(x).mean(axis=(1, 2))

    rng = np.random.default_rng(1)
    clean = rng.normal(size=(70, 8, 8, 4)).astype(np.float32).cumsum(axis=1).cumsum(axis=2) / 4
    images = np.stack([clean, clean + 0.8 * rng.normal(size=clean.shape).astype(np.float32)])
    model = Net()
    variables = model.init(KEY, images[0])
    sites = find_sites(model, images[0], pattern=".*", kind=kind)
    result = measure(model, variables, sites, images, [1.0])
    new = fused_params(variables["params"], result.denoise, sites)

    def error(params):
        return float(np.mean((model.apply({"params": params}, images[1]) - model.apply(variables, images[0])) ** 2))

    assert error(new) < {"auto": 0.6, "pointwise": 0.9}[kind] * error(variables["params"])
    # What was measured on the way is what the fused network does.
    np.testing.assert_allclose(result.outputs[1], model.apply({"params": new}, images[1]), atol=1e-4)
    np.testing.assert_allclose(result.outputs[0], model.apply(variables, images[0]), atol=1e-4)
    assert all(after <= before * (1 + 1e-9) for before, after in result.errors.values())


def test_without_corruption_nothing_changes():
    images = streams(count=1)
    model = Mlp(residual=True)
    variables = model.init(KEY, images[0])
    sites = find_sites(model, images[0], pattern="[abc]")
    measured = measure(model, variables, sites, np.stack([images[0]] * 3), [1, 1])
    assert max(np.abs(leaf).max() for leaf in jax.tree_util.tree_leaves(measured.denoise)) < 1e-5


def test_a_strong_ridge_holds_everything_at_the_identity():
    images = streams()
    model = Mlp()
    variables = model.init(KEY, images[0])
    sites = find_sites(model, images[0], pattern="[abc]")
    measured = measure(model, variables, sites, images, [0, 1], ridge=1e9)
    assert max(np.abs(get_in(measured.denoise, site.path)["kernel"]).max() for site in sites) < 1e-6


def test_fewer_images_than_a_sites_width_and_dead_channels_have_a_solution():
    images = streams((4, 6))
    images[..., 3] = 0.0
    model = Mlp()
    variables = model.init(KEY, images[0])
    sites = find_sites(model, images[0], pattern="[abc]")
    measured = measure(model, variables, sites, images, [1, 1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree_util.tree_leaves(measured.denoise))
    kernel = get_in(measured.denoise, ("a",))["kernel"]
    np.testing.assert_allclose(kernel[3], 0, atol=1e-6)  # a dead channel says nothing, so nothing is read from it


def test_one_trace_serves_all_sites():
    class Counting(Mlp):
        @nn.compact
        def __call__(self, x):
            calls.append(1)
            return Mlp.__call__(self, x)

    calls = []
    images = streams()
    model = Counting()
    variables = model.init(KEY, images[0])
    sites = find_sites(model, images[0], pattern="[abc]")
    calls.clear()
    measure(model, variables, sites, images, [1, 1])
    assert len(calls) == 1


def test_bad_input_is_named():
    images = streams()
    model = Mlp()
    variables = model.init(KEY, images[0])
    sites = find_sites(model, images[0], pattern="[abc]")
    with pytest.raises(DataError, match="one weight for each corrupted one"):
        measure(model, variables, sites, images, [1, 1, 1])
    with pytest.raises(DataError, match="at least 0 and not all 0"):
        measure(model, variables, sites, images, [-1, 1])
    broken = images.copy()
    broken[2, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="a: the features"):
        measure(model, variables, sites, broken, [1, 1])

    class Moved(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="a")(x.T)

    moved = Moved()
    square = streams((6, 6))
    with pytest.raises(SiteError, match="first axis of its input"):
        measure(moved, moved.init(KEY, jnp.zeros((18, 6))), find_sites(moved, jnp.zeros((18, 6))), square, [1, 1])
