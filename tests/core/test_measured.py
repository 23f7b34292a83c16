"""Measured noise: against a direct NumPy solution layer by layer, with junctions, loops, groups, and bad input."""

import pathlib
import re
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core import interpreter, jaxpr, shrinkage
from drep_jax.core.chunks import InMemory, Waiting
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.measured import _Solver, measure, measuring
from drep_jax.core.regression import Form, Sums, chunk_sums, joined, regress
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import DataError, NonFiniteError, SiteError
from drep_jax.models import create_model
from drep_jax.trees import get_in, set_in
from tests import trees

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
        variables = trees.zeros(jax.eval_shape(model.init, KEY, x))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"scan": True}, {"remat": True}],
    ids=str,
)
def test_scanned_and_rematerialized_blocks_give_the_same_network(options):
    small = {"patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12}
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
        return trees.outputs(module, {"params": new}, images[2]), measured.errors

    expected, errors = logits(model, params)
    got, others = logits(other, stack_blocks(params) if options.get("scan") else params)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert sorted(np.round(list(errors.values()), 4).tolist()) == sorted(np.round(list(others.values()), 4).tolist())
    assert float(jnp.abs(expected - trees.outputs(model, {"params": params}, images[2])).max()) > 0.01


@pytest.mark.slow
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
        return float(
            np.mean(
                (trees.outputs(model, {"params": params}, images[1]) - trees.outputs(model, variables, images[0])) ** 2
            )
        )

    assert error(new) < {"auto": 0.6, "pointwise": 0.9}[kind] * error(variables["params"])
    # What was measured on the way is what the fused network does.
    np.testing.assert_allclose(result.outputs[1], trees.outputs(model, {"params": new}, images[1]), atol=1e-4)
    np.testing.assert_allclose(result.outputs[0], trees.outputs(model, variables, images[0]), atol=1e-4)
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
    assert len(calls) == 2  # once more for the shapes of another batch


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
            return nn.Dense(3, name="a")(jnp.moveaxis(x.reshape(-1, 3, 2), 0, 1)).sum(axis=0)

    moved = Moved()  # whatever the chunk: three rows are no multiple of any batch's images
    with pytest.raises(SiteError, match="first axis of its input"):
        measure(moved, moved.init(KEY, images[0]), find_sites(moved, images[0]), images, [1, 1], chunk=1)


# ---- one by one, and as it was -----------------------------------------------------------------------------------------


class EndsInOneByOne(nn.Module):
    """A residual block whose last layer is the same map as Dense, 1×1 or 3×3 convolution."""

    last: str

    @nn.compact
    def __call__(self, x):
        q = nn.Conv(3, (1, 1), use_bias=False, name="stem")(x)
        y = nn.tanh(nn.Conv(5, (1, 1), use_bias=False, name="a")(nn.tanh(q)))
        size = {"one": (1, 1), "three": (3, 3)}.get(self.last)
        layer = nn.Dense(3, use_bias=False, name="b") if size is None else nn.Conv(3, size, use_bias=False, name="b")
        return q + layer(y)


def test_the_same_map_as_dense_1x1_and_3x3_gets_the_same_denoiser():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(30, 1, 1, 3)).astype(np.float32)
    images = np.stack([clean, clean + 0.5 * rng.normal(size=clean.shape).astype(np.float32)])
    one = EndsInOneByOne("one").init(KEY, clean)["params"]
    weights = np.asarray(one["b"]["kernel"])
    kernels = {"one": weights, "dense": weights[0, 0], "three": np.pad(weights, [(1, 1), (1, 1), (0, 0), (0, 0)])}
    centers = {}
    for last, kernel in kernels.items():
        model = EndsInOneByOne(last)
        params = {**one, "b": {"kernel": kernel}}
        sites = find_sites(model, clean, pattern="b")
        # a window is nine times as wide, and the ridge is over the mean power
        measured = measure(model, {"params": params}, sites, images, [1.0], ridge=0.09 if last == "three" else 0.01)
        found = measured.denoise["b"]["kernel"]
        centers[last] = found.reshape(5, 9, 5, 9)[:, 4, :, 4] if last == "three" else found
        error = np.abs(measured.outputs[1] - measured.outputs[0]).mean()
        assert error < 0.9 * np.abs(images[1] - images[0]).mean() and measured.errors["b"][1] < measured.errors["b"][0]
    np.testing.assert_allclose(centers["one"], centers["dense"], atol=1e-5)
    np.testing.assert_allclose(centers["three"], centers["dense"], atol=1e-4)
    assert np.abs(centers["dense"]).max() > 0.01


GOLDEN = pathlib.Path(__file__).parent / "fixtures" / "measured.npz"
"""Outputs and errors of the design that solved all sites in one program (revision 8c7117c), by network."""


@pytest.mark.parametrize(
    "name, model, options",
    [
        ("basic", "resnet", {"stage_sizes": (1, 1), "width": 4, "block": "basic", "stem": "cifar", "shortcut": "pad"}),
        pytest.param(
            *("scan", "vit", {"patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12, "scan": True}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["resnet", "vit"],
)
def test_the_result_is_that_of_one_program_for_all_sites(name, model, options):
    model = create_model(model, num_classes=3, image_size=(8, 8), **options)
    with np.load(GOLDEN) as file:
        golden = {key: file[f"{name}:{key}"] for key in ("images", "outputs", "errors")}
        variables = {}
        for key in file.files:
            if key.startswith(f"{name}/"):
                variables = set_in(variables, tuple(key.split("/")[1:]), file[key])
    images = golden["images"]
    sites = find_sites(model, images[0], pattern=".*")
    result = measure(model, variables, sites, images, [0.6, 0.4], ridge=1e-2, vectors=10**6, chunk=4)
    np.testing.assert_allclose(result.outputs, golden["outputs"], atol=1e-5)
    np.testing.assert_allclose(list(result.errors.values()), golden["errors"], rtol=1e-4, atol=1e-5)
    assert np.abs(result.outputs[2] - result.outputs[0]).max() > 0.01


# ---- from site to site -------------------------------------------------------------------------------------------------


def blocks(depth, images):
    """A ViT of so many blocks, its parameters and its sites."""
    small = {"patch_size": 4, "width": 8, "num_heads": 2, "mlp_dim": 12}
    model = create_model("vit", num_classes=3, image_size=(8, 8), depth=depth, **small)
    variables = trees.setup(model, images[0, :1], ())[0]
    return model, variables, find_sites(model, images[0, :1], pattern=".*(fc1|fc2)")


def test_features_wait_within_the_bound_or_are_computed_again(monkeypatch):
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(23, 8, 8, 3)).astype(np.float32)
    images = np.stack([clean, clean, clean + rng.normal(size=clean.shape).astype(np.float32)])
    model, variables, sites = blocks(2, images)
    most = []
    put = Waiting.put

    def watched(self, *arguments):
        put(self, *arguments)
        most.append(self.used)

    monkeypatch.setattr(Waiting, "put", watched)
    solver = _Solver(model, variables, sites, InMemory(images), 1e-2, 400, True, 1, 2.0**32, True, {})
    results = {}
    for limit in (2.0**32, 20_000, 0):
        most.clear()
        solver.limit = limit
        results[limit] = solver.solve(np.array([0.5, 0.5]), None).outputs
        assert max(most) <= limit and (max(most) > 0) == (limit > 0)
        line = solver.about_memory()
        assert (line == "") == (limit == 2.0**32)
    assert re.search(r"up to 0.0 GiB \(at .*measured.memory_gib.*about 2.5 forward passes", line)
    np.testing.assert_allclose(results[20_000], results[2.0**32], atol=1e-6)
    np.testing.assert_allclose(results[0], results[2.0**32], atol=1e-6)
    assert np.abs(results[0][2] - trees.outputs(model, variables, images[2])).max() > 1e-3


def test_alike_stretches_share_a_program():
    images = np.zeros((2, 9, 8, 8, 3), np.float32)

    def programs(depth):
        solver = _Solver(*blocks(depth, images), InMemory(images), 1.0, 9, True, 9, 1e9, False, {})
        cuts = solver.network.cuts
        stretches = {stretch.key for stretch in solver.network.stretches}
        return (
            len(cuts),
            len(stretches),
            {
                (form, call.chain and call.chain.key)
                for cut in cuts
                for part in solver.parts[cut.place[0]]
                for call, form, _ in solver._calls(cut, *part)
            },
        )

    (few, stretches, forms), (many, again, same) = programs(3), programs(7)
    assert (few, many) == (6, 14) and stretches == again == 4 and forms == same and len(forms) == 2


def test_any_number_of_images_and_any_chunk_give_the_same():
    images = streams((53, 6))
    model = Mlp(residual=True)
    variables = model.init(KEY, images[0])
    sites = find_sites(model, images[0], pattern="[abc]")
    results = [measure(model, variables, sites, images, [1, 1], ridge=1e-2, chunk=chunk) for chunk in (64, 3)]
    for one, other in zip(*(jax.tree_util.tree_leaves(result.denoise) for result in results), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


class Separable(nn.Module):
    """Depthwise convolutions of many channels, whose groups are solved one by one."""

    @nn.compact
    def __call__(self, x):
        for index in range(4):
            x = nn.relu(nn.Conv(24, (3, 3), feature_group_count=24, name=f"depthwise{index}")(x))
        return x.mean((1, 2))


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_many_rounds_of_depthwise_layers_end(rounds):
    clean = np.random.default_rng(0).normal(size=(10, 6, 6, 24)).astype(np.float32)
    images = np.stack([clean, clean + 0.3])
    model = Separable()
    variables = model.init(KEY, clean[:1])
    solve = measuring(model, variables, find_sites(model, clean[:1], pattern=".*"), images)
    ended = []

    def work():
        for _ in range(rounds):
            ended.append(solve([1.0]).errors)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=120 + 5 * rounds)
    assert len(ended) == rounds, f"round {len(ended)} of {rounds} does not end"


def test_no_program_of_a_device_factors_a_matrix():
    """Decompositions side by side in one program wait for each other's threads for ever (jaxlib 0.10.2 on CPUs)."""
    layer = find_sites(Separable(), jnp.zeros((1, 6, 6, 24)), pattern="depthwise0")[0].layers[0]
    form = Form(layer, "patch", 24, 9, 9, 36, 1, True)
    text = str(
        jax.make_jaxpr(lambda *a: chunk_sums(form, *a))(
            jnp.ones((20, 6, 6, 24)), jnp.ones((24, 9, 9)), None, jnp.ones(1), jnp.arange(10), jnp.ones(10)
        )
    )
    assert "dot_general" in text and not re.search("svd|eigh|cholesky|qr|lu|triangular_solve|while|f64", text)


# ---- the ridge ---------------------------------------------------------------------------------------------------------


def sums_of(w, r, centered=True):
    """The sums over images (images, vectors, d) and (images, vectors, columns), for one group."""
    images, vectors = w.shape[:2]
    w, r = w.reshape(-1, w.shape[-1]), r.reshape(-1, r.shape[-1])
    mean_w, mean_r = (w.mean(0), r.mean(0)) if centered else (np.zeros(w.shape[1]), np.zeros(r.shape[1]))
    w, r = w - mean_w, r - mean_r
    power = np.array([(r**2).sum() / vectors])
    return Sums(
        np.float64(images), mean_w[None], mean_r[None], mean_r[None], (w.T @ w / vectors)[None],
        (w.T @ r / vectors)[None], power, power,
    )  # fmt: skip


@pytest.mark.parametrize("centered", [True, False])
def test_the_held_out_error_is_that_of_fits_without_each_fold(centered):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(20, 3, 6)) + 1.0
    r = 0.3 * w[..., :4] + rng.normal(size=(20, 3, 4)) + 0.5
    parts = [(w[fold::5], r[fold::5]) for fold in range(5)]
    folds = [sums_of(*part, centered) for part in parts]
    whole = None
    for fold in folds:
        whole = joined(whole, fold)
    expected = sums_of(w, r, centered)
    for ours, theirs in zip(whole, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)

    def error(ridge):
        total = 0.0
        for number, (test_w, test_r) in enumerate(parts):
            others = [part for other, part in enumerate(parts) if other != number]
            fit_w, fit_r = (
                np.concatenate(column).reshape(-1, column[0].shape[-1]) for column in zip(*others, strict=True)
            )
            mean_w, mean_r = (fit_w.mean(0), fit_r.mean(0)) if centered else (0.0, 0.0)
            square = (fit_w - mean_w).T @ (fit_w - mean_w) / len(fit_w)
            pull = ridge * np.trace(square) / 6 * np.eye(6)
            change = np.linalg.solve(square + pull, (fit_w - mean_w).T @ (fit_r - mean_r) / len(fit_w))
            total += (((test_r - mean_r) - (test_w - mean_w) @ change) ** 2).sum()
        return total / 60

    chosen = shrinkage.choose_ridge(whole, folds, None)
    errors = [error(ridge) for ridge in shrinkage.RIDGES]
    assert shrinkage.RIDGES[int(np.argmin(errors))] == chosen.ridge
    scale = expected.power_t.sum() / 20
    assert chosen.held_out == pytest.approx(min(errors) / scale, rel=1e-9)
    assert regress(whole, None, chosen.ridge, centered).after < chosen.held_out


def test_a_site_without_evidence_is_left_alone():
    rng = np.random.default_rng(0)
    w, r = rng.normal(size=(10, 1, 40)), rng.normal(size=(10, 1, 40))
    folds = [sums_of(w[fold::5], r[fold::5]) for fold in range(5)]
    whole = sums_of(w, r)
    chosen = shrinkage.choose_ridge(whole, folds, None)
    assert np.isinf(chosen.ridge) and chosen.held_out > 0.5
    solution = regress(whole, None, chosen.ridge, True)
    assert not solution.kernel.any() and not solution.constant.any() and solution.before == solution.after
    assert regress(whole, None, 1e-3, True).after < 0.01, "which a fit to all images does not show"


def test_more_images_never_hurt_where_few_say_nothing():
    """Images not measured on: the chosen ridge loses nothing with few, and a fixed one does."""
    model = Mlp(hidden=40)
    test = streams((500, 6), seed=9, count=2)
    variables = model.init(KEY, test[0])
    sites = find_sites(model, test[0], pattern="[abc]")

    def error(count, ridge):
        images = streams((count, 6), seed=9, count=2)[:, :count]
        images = np.concatenate([images[:1], images[2:]])
        denoise = measure(model, variables, sites, images, [1.0], ridge=ridge, outputs=False).denoise
        outputs = trees.outputs(model, {"params": fused_params(variables["params"], denoise, sites)}, test[2])
        return float(np.mean((outputs - trees.outputs(model, variables, test[0])) ** 2))

    nothing = float(np.mean((trees.outputs(model, variables, test[2]) - trees.outputs(model, variables, test[0])) ** 2))
    few, many = error(5, None), error(200, None)
    assert few < 1.1 * nothing and many < 0.95 * nothing
    assert error(5, 1e-3) > 1.2 * nothing
