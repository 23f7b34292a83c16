"""Algorithm 1's loss, its minimum, and the DenoiseRep module."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core import closed_form
from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.certificate import certify
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse
from drep_jax.core.intercept import visit_sites
from drep_jax.core.matrix_form import features
from drep_jax.core.module import DenoiseRep
from drep_jax.core.moments import Moments, collect_moments
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import ConfigError, FusionError, SiteError
from drep_jax.models import create_model
from drep_jax.trees import get_in
from tests.trees import Block, Conv, Dense, Inner, Net, Scan, normal, randomize, setup

SCHEDULE = Schedule(beta_end=0.02)
NET = Net((Conv(2, groups=2),), (Scan(2, 5), Dense(6)))
X = normal(7, (8, 5, 5, 4))
INDEX = jnp.arange(8)
SITES = find_sites(NET, X, pattern=".*", steps=20)  # 20 steps a site, so that t is large enough to matter
VARIABLES, DENOISE = setup(NET, X, SITES)


def losses(denoise=DENOISE, key=0, x=X, index=INDEX, variables=VARIABLES, **options):
    key = jax.random.key(key) if isinstance(key, int) else key
    return _losses(variables, denoise, key, index, x, **options)


@functools.partial(jax.jit, static_argnames=("loss", "tokens"))
def _losses(variables, denoise, key, index, x, **options):
    return algorithm1_losses(NET, variables, denoise, SITES, SCHEDULE, key, index, x, **options)


def total(table):
    return sum(jnp.sum(value) for value in table.values())


def means(denoise, count=256, **options):
    """Averages the losses over keys, in one compiled program for each set of options."""
    return _over_keys(functools.partial(_sampled_losses, denoise, **options), count)


def slopes(denoise, count=128):
    """Averages the gradients of the losses' sum over keys."""
    return _over_keys(functools.partial(_sampled_slopes, denoise), count)


def _over_keys(program, count):
    keys = jax.random.split(jax.random.key(5), count)
    return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf).mean(0), program(keys))


@functools.partial(jax.jit, static_argnames=("loss", "tokens"))
def _sampled_losses(denoise, keys, **options):
    return jax.vmap(lambda key: losses(denoise, key, **options))(keys)


@jax.jit
def _sampled_slopes(denoise, keys):
    return jax.vmap(lambda key: jax.grad(lambda d: total(losses(d, key)))(denoise))(keys)


def gathered():
    """Features of every site from the plain backbone, float64 (n, [groups], d) a copy."""
    by_site = {}

    def visit(site, layer, module, extra, x, call):
        vectors = features(layer, site.kind, x)
        shape = vectors.shape[-1:] if site.groups == 1 else vectors.shape[-2:]
        module.sow(
            "denoise", "features", vectors.reshape(-1, *shape), init_fn=lambda: jnp.zeros(()), reduce_fn=lambda a, b: b
        )
        return call(x)

    extras = {site.path: jnp.zeros((site.stack,)) if site.stack else jnp.zeros(()) for site in SITES}
    _, tree = visit_sites(NET, VARIABLES, SITES, extras, visit, X, collect=True)
    for site in SITES:
        by_site[site.path] = np.asarray(get_in(tree, site.path)["features"], np.float64)
    return by_site


@pytest.fixture(scope="module")
def moments():
    half = [
        (X[:4], np.ones(4, np.float32)),
        (jnp.concatenate([X[4:], X[:4] * 0]), np.float32([1, 1, 1, 1, 0, 0, 0, 0])),
    ]
    eight = [(jnp.concatenate([half[0][0], X[:4] * 0]), np.float32([1, 1, 1, 1, 0, 0, 0, 0])), half[1]]
    return collect_moments(NET, VARIABLES, SITES, eight)


def test_predicting_nothing_costs_one():
    table = means(init_denoise(SITES))  # three and a half standard deviations of the smallest site
    for value in jax.tree_util.tree_leaves(table):
        np.testing.assert_allclose(value, 1.0, atol=0.05)
    one = means(init_denoise(SITES), loss="l1")
    np.testing.assert_allclose(one["head"], np.sqrt(2 / np.pi), atol=0.05)
    both = means(init_denoise(SITES), loss="l1+l2")
    np.testing.assert_allclose(both["head"], 1 + np.sqrt(2 / np.pi), atol=0.08)


def test_moments_equal_numpy(moments):
    for path, vectors in gathered().items():
        site = next(site for site in SITES if site.path == path)
        site_moments = moments[path]
        stacked = vectors if site.stack else vectors[None]
        mean, covariance = (v if site.stack else v[None] for v in (site_moments.mean, site_moments.covariance))
        for copy in range(stacked.shape[0]):
            grouped = stacked[copy].reshape(-1, site.groups, site.width)
            assert site_moments.count == grouped.shape[0]
            for g in range(site.groups):
                data = grouped[:, g]
                np.testing.assert_allclose(mean[copy].reshape(site.groups, -1)[g], data.mean(0), rtol=1e-5, atol=1e-6)
                expected = np.cov(data.T, bias=True).reshape(site.width, site.width)
                shape = (site.groups, site.width, site.width)
                np.testing.assert_allclose(covariance[copy].reshape(shape)[g], expected, rtol=1e-4, atol=2e-6)


def test_closed_form_minimizes_the_sampled_loss(moments):
    """The exact expected loss equals the mean of sampled ones; the optimum beats any perturbation; its gradient is zero."""
    best = closed_form.closed_form(moments, SITES, SCHEDULE)
    optimum = closed_form.expected_losses(moments, SITES, SCHEDULE)
    for denoise in (best, DENOISE):
        exact = closed_form.expected_losses(moments, SITES, SCHEDULE, denoise)
        sampled = means(denoise)
        flat = [value for site in SITES for value in np.ravel(sampled[site.name])]
        np.testing.assert_allclose(list(exact.values()), flat, rtol=0.05, atol=0.02)
    for seed in range(3):
        worse = closed_form.expected_losses(moments, SITES, SCHEDULE, randomize(best, seed, 0.05))
        assert all(worse[name] > optimum[name] for name in optimum)
    assert min(optimum.values()) < 0.9
    slope = slopes(best)
    start = slopes(init_denoise(SITES))
    for site in SITES:
        at_best, at_zero = (np.linalg.norm(get_in(tree, site.path)["kernel"]) for tree in (slope, start))
        assert at_best < 0.25 * at_zero, site.name


def test_formula_of_the_least_loss():
    """1 − (1−ᾱ)/d · tr C⁻¹, against the quadratic form evaluated at the minimizer."""
    (site,) = find_sites(NET, X, pattern="head", steps=30)
    data = np.random.default_rng(0).normal(size=(50, 6)) @ np.diag([3, 2, 1, 0.1, 0, 0]) + 1
    site_moments = Moments(50, data.mean(0), np.cov(data.T, bias=True))
    bar = SCHEDULE.alpha_bar(30)
    inverse = np.linalg.inv(bar * site_moments.covariance + (1 - bar) * np.eye(6))
    best = closed_form.minimizer(site, site_moments, SCHEDULE)
    np.testing.assert_allclose(best["kernel"], np.sqrt(1 - bar) * inverse, rtol=1e-9)
    np.testing.assert_allclose(best["bias"], -np.sqrt(bar) * best["kernel"] @ site_moments.mean, rtol=1e-9)
    expected = 1 - (1 - bar) / 6 * np.trace(inverse)
    np.testing.assert_allclose(closed_form.expected_loss(site, site_moments, SCHEDULE, best), expected, rtol=1e-9)


def test_through_the_origin_without_a_bias():
    module = Net(tail=(Dense(6, bias=False), Dense(3)))
    sites = find_sites(module, X, pattern="dense0", steps=20)
    variables = randomize(module.init(jax.random.key(0), X))
    moments = collect_moments(module, variables, sites, [(X + 1.0, np.ones(8, np.float32))])
    best = closed_form.closed_form(moments, sites, SCHEDULE)
    assert set(best["dense0"]) == {"kernel"}
    optimum = closed_form.expected_losses(moments, sites, SCHEDULE)["dense0"]
    for seed in range(3):
        assert closed_form.expected_losses(moments, sites, SCHEDULE, randomize(best, seed, 0.05))["dense0"] > optimum


def test_no_gradient_reaches_the_backbone():
    """Not even as a part of the module's own parameters."""
    module = DenoiseRep(NET, SITES, SCHEDULE)

    @jax.jit
    @jax.grad
    def gradient(params):
        return total(module.apply({"params": params}, jax.random.key(0), INDEX, X, method="denoising_losses"))

    slope = gradient({"backbone": VARIABLES["params"], "denoise": DENOISE})
    assert all(not leaf.any() for leaf in jax.tree_util.tree_leaves(slope["backbone"]))
    assert all(leaf.any() for leaf in jax.tree_util.tree_leaves(slope["denoise"]))


def test_output_has_gradients_to_backbone_and_denoisers():
    net = Net(tail=(Dense(4),))
    sites = find_sites(net, X)
    variables, denoise = setup(net, X, sites)
    module = DenoiseRep(net, sites, SCHEDULE)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, X)))))(
        {"backbone": variables["params"], "denoise": denoise}
    )
    assert all(leaf.any() for leaf in jax.tree_util.tree_leaves(slope))


def test_stacked_losses_are_those_of_the_unrolled_blocks():
    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x, _ = Block(5, name=f"block{i}")(x)
            return x

    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "denoise": 0}
            return nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)(5, name="all")(x, None)[0]

    def unroll(tree):
        return {f"block{i}": jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], tree["all"]) for i in range(2)}

    sites = {net: find_sites(net, X, pattern=".*", steps=20) for net in (Stacked(), Unrolled())}
    variables, denoise = setup(Stacked(), X, sites[Stacked()])
    denoise = randomize(denoise, 3, 0.5)
    parts = {Stacked(): (variables["params"], denoise), Unrolled(): (unroll(variables["params"]), unroll(denoise))}
    losses_of = []
    for net, (params, denoisers) in parts.items():

        def run(key, net=net, params=params, denoisers=denoisers):
            return algorithm1_losses(net, {"params": params}, denoisers, sites[net], SCHEDULE, key, INDEX, X)

        losses_of.append(_over_keys(jax.jit(jax.vmap(run)), 16))
    stacked, unrolled = losses_of
    for name in ("fc1", "fc2"):
        expected = [unrolled[f"block{i}/{name}"] for i in range(2)]
        np.testing.assert_allclose(stacked[f"all/{name}"], expected, rtol=0.02)
        assert abs(expected[0] / expected[1] - 1) > 0.04  # so that swapped copies would be seen


def test_layer_that_a_scan_repeats_is_one_site_with_one_loss():
    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_broadcast": "params", "variable_axes": {"denoise": 0}, "split_rngs": {"params": False}}
            return nn.scan(Inner, length=4, **options)(name="again")(x, None)[0]

    sites = find_sites(Repeated(), X, pattern=".*")
    assert [(site.name, site.stack, site.times) for site in sites] == [("again/d", None, (1,))]
    variables, denoise = setup(Repeated(), X, sites)
    key = jax.random.key(0)
    zero = algorithm1_losses(Repeated(), variables, init_denoise(sites), sites, SCHEDULE, key, INDEX, X)
    assert zero["again/d"].shape == ()
    np.testing.assert_allclose(zero["again/d"], 1.0, atol=0.25)
    assert certify(Repeated(), variables, denoise, sites, SCHEDULE, X).passed


def test_noise_belongs_to_the_example():
    whole = losses()
    order = jnp.array([3, 1, 7, 0, 2, 6, 5, 4])
    moved = losses(x=X[order], index=INDEX[order])
    halves = [losses(x=X[part], index=INDEX[part]) for part in (slice(0, 4), slice(4, 8))]
    for name, value in whole.items():
        np.testing.assert_allclose(moved[name], value, rtol=1e-5)
        np.testing.assert_allclose((halves[0][name] + halves[1][name]) / 2, value, rtol=1e-5)
    other = losses(index=INDEX + 8)
    assert not np.allclose(other["head"], whole["head"])
    assert not np.allclose(losses(key=1)["head"], whole["head"])
    slices = whole["scan0/fc1"]
    assert slices.shape == (2,)


def test_sites_draw_different_noise():
    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="a")(x * 1.0) + nn.Dense(3, name="b")(x * 1.0)

    sites = find_sites(Twin(), X, pattern=".*")
    variables = Twin().init(jax.random.key(0), X)
    table = algorithm1_losses(Twin(), variables, init_denoise(sites), sites, SCHEDULE, jax.random.key(0), INDEX, X)
    assert not np.allclose(table["a"], table["b"])


@pytest.mark.slow
def test_token_sample_is_unbiased_and_smaller():
    full = means(DENOISE)
    part = means(DENOISE, 192, tokens=0.3)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=0.02), part, full)

    def flops(tokens):  # the smaller sample must also be less work
        program = jax.jit(lambda d: total(losses(d, tokens=tokens))).lower(DENOISE)
        return program.cost_analysis()["flops"]

    assert flops(0.2) < 0.7 * flops(1.0)


def test_bad_options():
    with pytest.raises(ConfigError, match='Did you mean "l2"'):
        losses(loss="L2")
    for tokens in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="tokens"):
            losses(tokens=tokens)


def test_scan_without_the_collection_names_the_line_to_add():
    class Hidden(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return scan(name="blocks")(x, None)[0]

    sites = find_sites(Hidden(), X, pattern=".*")
    variables, denoise = setup(Hidden(), X, sites)
    explicit = explicit_apply(Hidden(), variables, denoise, sites, SCHEDULE, X)
    fused = fuse({"backbone": variables["params"], "denoise": denoise}, sites, SCHEDULE)
    np.testing.assert_allclose(Hidden().apply({"params": fused}, X), explicit, rtol=1e-3, atol=1e-4)  # still exact
    with pytest.raises(SiteError, match=r"variable_axes=\{'params': 0, 'denoise': 0\}"):
        algorithm1_losses(Hidden(), variables, denoise, sites, SCHEDULE, jax.random.key(0), INDEX, X)


def test_layer_called_twice_averages_its_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(x.shape[-1], name="shared")
            return layer(jnp.tanh(layer(x)))

    sites = find_sites(Twice(), X, pattern=".*")
    variables, denoise = setup(Twice(), X, sites)
    table = algorithm1_losses(Twice(), variables, init_denoise(sites), sites, SCHEDULE, jax.random.key(0), INDEX, X)
    np.testing.assert_allclose(table["shared"], 1.0, atol=0.2)
    fused = fuse({"backbone": variables["params"], "denoise": denoise}, sites, SCHEDULE)
    explicit = explicit_apply(Twice(), variables, denoise, sites, SCHEDULE, X)
    np.testing.assert_allclose(Twice().apply({"params": fused}, X), explicit, rtol=1e-4, atol=1e-5)


def test_module_holds_both_subtrees_and_other_collections():
    net = create_model(
        "resnet", num_classes=3, image_size=(8, 8), stage_sizes=(1,), width=4, block="basic", stem="cifar"
    )
    x = normal(1, (2, 8, 8, 3))
    sites = find_sites(net, x)
    module = DenoiseRep(net, sites, SCHEDULE)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    assert set(variables) == {"params", "batch_stats"}
    assert set(variables["params"]) == {"backbone", "denoise"}
    plain = jax.eval_shape(net.init, jax.random.key(3), x)
    for collection in ("params", "batch_stats"):
        shapes = [jax.tree_util.tree_map(jnp.shape, t) for t in (variables[collection]["backbone"], plain[collection])]
        assert shapes[0] == shapes[1]
    params = {**variables["params"], "denoise": randomize(variables["params"]["denoise"], 0, 0.1)}
    variables = {**variables, "params": params}
    statistics = randomize(variables["batch_stats"], 2, 0.1)  # which the layer must read: not zero and one
    variables = {**variables, "batch_stats": jax.tree_util.tree_map(jnp.abs, statistics)}
    out = jax.jit(module.apply)(variables, x)
    own = {"params": params["backbone"], "batch_stats": variables["batch_stats"]["backbone"]}
    np.testing.assert_allclose(
        out,
        jax.jit(lambda v, d: explicit_apply(net, v, d, sites, SCHEDULE, x))(own, params["denoise"]),
        rtol=1e-5,
        atol=1e-6,
    )
    fused = fuse(params, sites, SCHEDULE)
    np.testing.assert_allclose(jax.jit(net.apply)({**own, "params": fused}, x), out, rtol=2e-3, atol=2e-4)
    assert not np.allclose(jax.jit(net.apply)(own, x), out, atol=1e-3)
    table = module.apply(variables, jax.random.key(0), jnp.arange(2), x, loss="l1", method="denoising_losses")
    assert set(table) == {site.name for site in sites}
    with pytest.raises(FusionError, match="denoise"):
        module.apply({"params": {"backbone": params["backbone"]}}, x)


def test_sampled_moments_are_unbiased_and_decided_by_the_seed(moments):
    mask = np.ones(8, np.float32)

    def sampled(seed, images=X):
        return collect_moments(NET, VARIABLES, SITES, [(images, mask)], tokens=0.5, seed=seed)

    again = [sampled(seed) for seed in range(12)]
    first, repeated = again[0], sampled(0)
    picked = 0
    for site in SITES:
        exact = moments[site.path]
        site_moments = first[site.path]
        np.testing.assert_array_equal(site_moments.covariance, repeated[site.path].covariance)
        vectors = exact.count // 8
        assert site_moments.count == 8 * max(1, round(0.5 * vectors)), site.name
        if vectors < 4:
            continue
        picked += 1
        assert not np.array_equal(site_moments.mean, again[1][site.path].mean)
        spread = np.sqrt(np.diagonal(exact.covariance, axis1=-2, axis2=-1))
        averages = np.mean([table[site.path].mean for table in again], axis=0)
        assert np.abs(averages - exact.mean).max() < 0.45 * spread.max()
    assert picked
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        collect_moments(NET, VARIABLES, SITES, [(X, mask)], tokens=0.0)


def test_millions_of_vectors_far_from_the_origin_lose_nothing():
    """A mean a thousand times the spread, in float32, over many batches: against two passes in float64."""
    rng = np.random.default_rng(0)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="d")(x)

    plain = Plain()
    x = (1000 + rng.normal(size=(40, 8, 6_000, 4)) * [1, 2, 0.5, 1]).astype(np.float32)
    variables = plain.init(jax.random.key(0), x[0])
    (site,) = find_sites(plain, x[0], pattern="d")
    site_moments = collect_moments(plain, variables, [site], ((batch, np.ones(8, np.float32)) for batch in x))[
        site.path
    ]
    data = x.reshape(-1, 4).astype(np.float64)
    assert site_moments.count == len(data) == 1_920_000
    np.testing.assert_allclose(site_moments.mean, data.mean(0), rtol=1e-7)
    np.testing.assert_allclose(site_moments.covariance, np.cov(data.T, bias=True), rtol=2e-6, atol=2e-6)
