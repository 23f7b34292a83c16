"""Layers that are called several times: one denoiser, exact on every call, learned from all calls with the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.calls import call_weight, vector_weight
from drep_jax.core.certificate import certify
from drep_jax.core.closed_form import closed_form, expected_losses
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.measured import measuring
from drep_jax.core.moments import collect_moments
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import CALL_WEIGHTS, find_sites
from drep_jax.trees import get_in, set_in
from tests import trees

SCHEDULE = Schedule(beta_start=0.05, beta_end=0.05)  # much noise, so that there is much to learn
X = trees.normal(0, (8, 6, 6, 3))  # one image for each device


class Pyramid(nn.Module):
    """A head that three maps of different sizes share, level by level; the second map is made after the first is read."""

    @nn.compact
    def __call__(self, x):
        conv, last = nn.Conv(4, (3, 3), name="conv"), nn.Dense(2, name="last")

        def head(level):
            return last(jnp.tanh(conv(level))).reshape(len(x), -1)

        return [head(x), head(nn.Dense(3, name="lateral")(2 * x[:, ::2, ::2] + 1)), head(x[:, ::4, ::4] - 2)]


class Sequences(nn.Module):
    """A layer on two sequences, and one that reads only the first of them."""

    @nn.compact
    def __call__(self, x):
        tokens = x.reshape(len(x), -1, 3)
        long, short = jnp.tanh(tokens), tokens[:, :5] ** 2
        both = nn.Dense(4, use_bias=False, name="both")
        return [y.reshape(len(x), -1) for y in (both(long), both(short), nn.Dense(2, name="one")(long))]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(x.shape[-1], name="fc2")(jnp.tanh(nn.Dense(5, name="fc1")(x)))


class Reused(nn.Module):
    """One block twice: what its layers read the second time depends on their own outputs."""

    @nn.compact
    def __call__(self, x):
        block = Block(name="block")
        first = block(x[:, :2, :3])
        return [first.reshape(len(x), -1), block(first).reshape(len(x), -1)]


NETS = {"pyramid": Pyramid, "sequences": Sequences, "reused": Reused}


class Together(nn.Module):
    """Several of them side by side, so that each operation is compiled once."""

    names: tuple = tuple(NETS)

    @nn.compact
    def __call__(self, x):
        return [y for name in self.names for y in NETS[name](name=name)(x)]


def parts(net, call_weights="positions", **options):
    """Returns the sites of a network, its variables, and denoisers."""
    sites = find_sites(net, X, call_weights=call_weights, **{"pattern": ".*", **options})
    return sites, *trees.setup(net, X, sites)


weightings = pytest.mark.parametrize(
    ("net", "call_weights"),
    [
        (Sequences(), "calls"),
        (Sequences(), "positions"),
        pytest.param(Together(), "calls", marks=pytest.mark.slow),
        pytest.param(Together(), "positions", marks=pytest.mark.slow),
    ],
    ids=["some, calls", "some, positions", "all, calls", "all, positions"],
)


def inputs_of(net, variables, x):
    """Returns {layer path: the inputs of its calls}."""
    seen = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense | nn.Conv | Block) and context.method_name == "__call__":
            seen.setdefault(context.module.path, []).append(np.asarray(args[0], np.float64))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        net.apply(variables, x)
    return seen


def vectors_of(site, x):
    """Returns the feature vectors of a call, (images, positions, width), by loops over windows."""
    if site.kind != "patch":
        return x.reshape(len(x), -1, x.shape[-1])
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = [
        padded[:, i : i + 3, j : j + 3].transpose(0, 3, 1, 2).reshape(len(x), -1)
        for i in range(x.shape[1])
        for j in range(x.shape[2])
    ]
    return np.stack(windows, 1)


def pooled(site, calls):
    """Returns the feature vectors of all calls, (images, n, width), and the weight of each, which sum to 1 an image."""
    vectors = [vectors_of(site, x) for x in calls]
    counts = np.array([v.shape[1] for v in vectors])
    share = counts / counts.sum() if site.call_weights == "positions" else np.full(len(counts), 1 / len(counts))
    return np.concatenate(vectors, 1), np.repeat(share / counts, counts)


def test_fused_equals_explicit_on_every_call():
    net = Together()
    sites, variables, denoise = parts(net)
    assert [(site.name.partition("/")[2], site.layers[0].calls) for site in sites] == [
        *(("conv", 3), ("last", 3), ("lateral", 1)),
        *(("both", 2), ("one", 1)),
        *(("block/fc1", 2), ("block/fc2", 2)),
    ]
    with jax.enable_x64(True):
        variables, denoise, x = trees.float64(variables), trees.float64(denoise), np.asarray(X, np.float64)
        explicit = jax.jit(lambda v, d, x: explicit_apply(net, v, d, sites, SCHEDULE, x))(variables, denoise, x)
        fused = fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, SCHEDULE)
        base, after = jax.jit(lambda p, q, x: (net.apply(p, x), net.apply(q, x)))(variables, {"params": fused}, x)
    for number, (one, other, before) in enumerate(zip(explicit, after, base, strict=True)):
        assert np.abs(one - before).max() > 1e-3, number
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11, err_msg=str(number))


@pytest.mark.slow
def test_the_certificate_of_layers_called_several_times():
    net = Together()
    sites, variables, denoise = parts(net)
    certificate = certify(net, variables, denoise, sites, SCHEDULE, X[:1])
    assert certificate.passed, str(certificate)


# ---- learned from all calls ------------------------------------------------------------------------------------------


def objective(site, vectors, weights, kernel, bias):
    """Algorithm 1's l2 loss over all ε in closed form, and its gradients, written down without the project's code."""
    bar = SCHEDULE.alpha_bar(site.times[0])
    f, each = vectors.reshape(-1, site.width), np.tile(weights, len(vectors)) / len(vectors)
    kernel, error = kernel.astype(np.float64), np.sqrt(bar) * f @ kernel + bias
    noise = np.eye(site.width) - np.sqrt(1 - bar) * kernel
    loss = (each @ (error**2).sum(1) + (noise**2).sum()) / site.width
    slope = np.sqrt(bar) * f.T @ (each[:, None] * error) - np.sqrt(1 - bar) * noise
    return loss, 2 * slope / site.width, 2 * each @ error / site.width


@weightings
def test_the_closed_form_is_the_minimum_over_all_calls(net, call_weights):
    sites, variables, _ = parts(net, call_weights)
    inputs = inputs_of(net, variables, X)
    batches = [(np.asarray(X), np.ones(len(X), np.float32))]
    moments = collect_moments(net, variables, sites, batches)
    best = closed_form(moments, sites, SCHEDULE, dtype=np.float64)
    least = expected_losses(moments, sites, SCHEDULE)
    random = np.random.default_rng(0)
    for site in sites:
        vectors, weights = pooled(site, inputs[site.path])
        leaves = {"bias": np.zeros(site.width), **get_in(best, site.path)}
        loss, *slopes = objective(site, vectors, weights, **leaves)
        _, *away = objective(site, vectors, weights, leaves["kernel"] + 0.1, leaves["bias"] + 0.1)
        np.testing.assert_allclose(loss, least[site.name], rtol=1e-5)
        for slope, other in zip(slopes if site.bias else slopes[:1], away, strict=False):
            assert np.abs(slope).max() < 1e-5 * np.abs(other).max(), site.name
        for _ in range(10):
            moved = {name: leaf + 1e-2 * random.normal(size=leaf.shape) for name, leaf in leaves.items()}
            moved["bias"] = moved["bias"] if site.bias else leaves["bias"]
            assert objective(site, vectors, weights, **moved)[0] > loss, site.name


def test_a_sample_weighs_as_much_as_all():
    """Of five vectors a tenth is one, of 36 it is four."""
    weights = [
        [used * vector_weight(site, total, used) for total, used in ((5, 1), (5, 5), (36, 4))]
        for site in (parts(Sequences(), call_weights, pattern="both")[0][0] for call_weights in CALL_WEIGHTS)
    ]
    assert weights == [[5, 5, 36], [1, 1, 1]]
    (once,), *_ = parts(Sequences(), pattern="one")
    assert vector_weight(once, 36, 4) == call_weight(once, 36) == 1


@pytest.mark.slow
def test_a_sample_of_the_vectors_keeps_the_weights_of_the_calls():
    """The short sequence has five vectors and the long one 36: a sample of a tenth takes one of five, and four of 36."""
    net = Sequences()
    (site,), variables, _ = parts(net, pattern="both")
    wide = jnp.broadcast_to(
        X[:, :1, :1], X.shape
    )  # all vectors of an image are equal, so that any sample says the same
    batches = [(np.asarray(wide), np.ones(len(X), np.float32))]
    some, every = (collect_moments(net, variables, [site], batches, tokens=share)[site.path] for share in (0.1, 1.0))
    np.testing.assert_allclose(some.mean, every.mean, rtol=1e-5)
    np.testing.assert_allclose(some.covariance, every.covariance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("net", "call_weights"),
    [
        (Sequences(), "calls"),
        pytest.param(Together(), "calls", marks=pytest.mark.slow),
        pytest.param(Together(), "positions", marks=pytest.mark.slow),
    ],
    ids=["some, calls", "all, calls", "all, positions"],
)
def test_algorithm1_descends_on_the_same_objective(net, call_weights):
    """Its mean over many ε is the objective of the closed form, in value and gradient; the gap is never below 0, and ends."""
    sites, variables, denoise = parts(net, call_weights)
    inputs, index = inputs_of(net, variables, X), jnp.arange(len(X))

    def loss(denoise, key):
        losses = algorithm1_losses(net, variables, denoise, sites, SCHEDULE, key, index, X)
        return sum(losses.values()), losses

    slope = jax.value_and_grad(loss, has_aux=True)

    def average(denoise, keys):
        (_, losses), slopes = jax.lax.map(lambda key: slope(denoise, key), keys)
        return jax.tree_util.tree_map(lambda leaf: leaf.mean(0), (losses, slopes))

    losses, slopes = jax.jit(average)(denoise, jax.random.split(jax.random.key(1), 300))
    for site in sites:
        leaves = get_in(denoise, site.path)
        terms = {"bias": np.zeros(site.width), **trees.float64(leaves)}
        expected, by_kernel, _ = objective(site, *pooled(site, inputs[site.path]), **terms)
        np.testing.assert_allclose(losses[site.name], expected, rtol=0.01, err_msg=site.name)
        error = np.abs(get_in(slopes, site.path)["kernel"] - by_kernel).max()
        assert error < 0.05 * np.abs(by_kernel).max(), site.name

    moments = collect_moments(net, variables, sites, [(np.asarray(X), np.ones(len(X), np.float32))])
    least = sum(expected_losses(moments, sites, SCHEDULE).values())

    def gap(denoise):
        return sum(expected_losses(moments, sites, SCHEDULE, denoise).values()) - least

    def descend(denoise, keys):
        def step(state, key):
            moved, velocity = state
            velocity = jax.tree_util.tree_map(lambda v, g: 0.9 * v + g, velocity, slope(moved, key)[1])
            return (jax.tree_util.tree_map(lambda d, v: d - 0.05 * v, moved, velocity), velocity), None

        return jax.lax.scan(step, (denoise, jax.tree_util.tree_map(jnp.zeros_like, denoise)), keys)[0][0]

    learned = jax.jit(descend)(denoise, jax.random.split(jax.random.key(2), 400))
    assert gap(denoise) > 0.3 and 0.0 <= gap(learned) < 0.05 * gap(denoise)


def test_every_call_draws_noise_of_its_own():
    class Again(nn.Module):
        times: int

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="layer")
            return [layer(x) for _ in range(self.times)]

    def loss(times):
        net = Again(times)
        sites, variables, denoise = parts(net)
        fixed = jax.random.key(0), jnp.arange(len(X))
        return float(algorithm1_losses(net, variables, denoise, sites, SCHEDULE, *fixed, X)["layer"])

    once, twice = map(loss, (1, 2))
    assert 1e-4 < abs(twice / once - 1) < 0.1


# ---- measured from all calls -----------------------------------------------------------------------------------------


def regression(w, r, each, old, ridge, bias):
    """Weighted least squares of r on w, drawn to 0: the kernel with it added, and the constant; in float64, by NumPy alone."""
    mean_w, mean_r = (each @ w, each @ r) if bias else (np.zeros(w.shape[1]), np.zeros(r.shape[1]))
    w, r = w - mean_w, r - mean_r
    square = (w * each[:, None]).T @ w
    change = np.linalg.solve(
        square + ridge * np.trace(square) / len(square) * np.eye(len(square)), (w * each[:, None]).T @ r
    )
    return old + change, mean_r - mean_w @ change


def matrix_of(kernel):
    return kernel if kernel.ndim == 2 else kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])


def fused_params(variables, denoise, sites):
    """Returns the parameters with some of the sites fused."""
    if not sites:
        return variables["params"]
    tree = {}
    for site in sites:
        tree = set_in(tree, site.path, get_in(denoise, site.path))
    denoise = tree
    return fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, SCHEDULE, rule="affine", steps=1)


@pytest.mark.parametrize(
    ("net", "call_weights"),
    [
        (Sequences(), "calls"),
        (Together(("pyramid", "reused")), "positions"),
        pytest.param(Together(), "calls", marks=pytest.mark.slow),
    ],
    ids=["some, calls", "others, positions", "all, calls"],
)
def test_measured_noise_is_the_pooled_regression(net, call_weights):
    """At every site from the inputs of all calls, in the network in which the sites before it are fused and no others."""
    (sites, variables, _), order = parts(net, call_weights), []
    mixture, ridge = np.array([0.3, 0.7]), 1e-2
    streams = np.stack([X, X, X + 0.4 * trees.normal(5, X.shape)])
    by_name = {site.name: site for site in sites}
    solve = measuring(net, variables, sites, streams, ridge=ridge, chunk=1, vectors=10**6)
    measured = solve(mixture, lambda progress: order.append(by_name[progress.name]))
    names = [site.name for site in order]
    assert sorted(names) == sorted(by_name)
    if "pyramid/lateral" in names:  # what the head reads is ready before the head
        assert names.index("pyramid/lateral") < names.index("pyramid/conv")
    clean = inputs_of(net, variables, X)
    for number, site in enumerate(order):
        before = fused_params(variables, measured.denoise, order[:number])
        after = get_in(fused_params(variables, measured.denoise, order[: number + 1]), site.path)
        leaves = get_in(jax.tree_util.tree_map(np.asarray, variables["params"]), site.path)
        old = matrix_of(leaves["kernel"]).astype(np.float64)
        rows = []
        for weight, images in zip(mixture, streams[1:], strict=True):
            inputs = inputs_of(net, {"params": before}, images)
            (u, each), (w, _) = pooled(site, clean[site.path]), pooled(site, inputs[site.path])
            r = (u - w) @ old
            if site.path[-1] == "fc2":  # it is added to the input of its block, and answers for the noise there
                r = r + pooled(site, clean[site.path[:-1]])[0] - pooled(site, inputs[site.path[:-1]])[0]
            rows.append((w, r, np.tile(weight * each / len(images), (len(images), 1))))
        w, r, each = (np.concatenate([a.reshape(-1, *a.shape[2:]) for a in parts]) for parts in zip(*rows, strict=True))
        kernel, constant = regression(w, r, each, old, ridge, site.bias)
        scale = np.abs(kernel - old).max()
        np.testing.assert_allclose(matrix_of(after["kernel"]), kernel, atol=1e-3 * scale, err_msg=site.name)
        if site.bias:
            np.testing.assert_allclose(after["bias"], leaves["bias"] + constant, atol=1e-3 * scale)

    fused = fused_params(variables, measured.denoise, sites)
    np.testing.assert_allclose(measured.outputs[2], net.apply({"params": fused}, streams[2])[0], atol=2e-4)


class Step(nn.Module):
    @nn.compact
    def __call__(self, state, x):
        return jnp.tanh(nn.Dense(3, name="layer")(state) + x), None


class Rounds(nn.Module):
    """Three rounds with the same weights, from zeros: as a loop, or one after another."""

    loop: bool

    @nn.compact
    def __call__(self, x):
        x, state = x[:, 0, 0], jnp.zeros((len(x), 3))
        if self.loop:
            options = {"variable_broadcast": "params", "variable_axes": {"denoise": 0}, "split_rngs": {"params": False}}
            return nn.scan(Step, **options, length=3)(name="step")(state, jnp.stack([x, 2 * x, x**2]))[0]
        step = Step(name="step")
        for part in (x, 2 * x, x**2):
            state, _ = step(state, part)
        return state


def test_rounds_of_a_loop_are_calls():
    streams = np.stack([X, X, X + 0.4 * trees.normal(5, X.shape)])
    results = []
    for net in (Rounds(True), Rounds(False)):
        (site,), variables, _ = parts(net)
        assert site.layers[0].calls == 3
        moments = collect_moments(net, variables, [site], [(np.asarray(X), np.ones(len(X), np.float32))])[site.path]
        measured = measuring(net, variables, [site], streams, ridge=1e-2, chunk=1)([0.3, 0.7])
        fused = fused_params(variables, measured.denoise, [site])
        np.testing.assert_allclose(measured.outputs[2], net.apply({"params": fused}, streams[2]), atol=1e-5)
        results.append((moments.mean, moments.covariance, *measured.denoise["step"]["layer"].values()))
    for loop, unrolled in zip(*results, strict=True):
        np.testing.assert_allclose(loop, unrolled, atol=1e-5)
    assert np.abs(results[0][-1]).max() > 1e-3
