"""Low-rank denoisers: the closed form against every other choice of directions, and fused against explicit."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax import certify, find_sites, fuse
from drep_jax.core import closed_form
from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.denoisers import check_params, init_denoise
from drep_jax.core.fusion import composed_maps
from drep_jax.core.linear_denoiser import dense, predict
from drep_jax.core.moments import Moments
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import with_rank
from drep_jax.errors import FusionError

SCHEDULE = Schedule(beta_end=0.02)
WIDTH = 6


class Network(nn.Module):
    """A dense layer, a grouped convolution, two scanned copies: every form of a site."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=2, name="conv")(x)).mean((1, 2))
        x = nn.Dense(WIDTH, name="first")(x)
        block = nn.scan(Block, variable_axes={"params": 0, "denoise": 0}, split_rngs={"params": True}, length=2)
        return block(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(WIDTH, name="inner")(x)), None


@pytest.fixture(scope="module")
def network():
    model, images = Network(), jax.random.normal(jax.random.key(0), (5, 8, 8, 4))
    variables = dict(jax.jit(model.init)(jax.random.key(1), images))
    sites = with_rank(find_sites(model, images, steps=2, time_scale=40.0), 2)
    assert [site.rank for site in sites] == [2, 2, 2]
    return model, variables, sites, images


def moments_of(site, seed=0):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=site.denoiser_shape) * np.logspace(0.7, -2, site.width)
    return Moments(100, rng.normal(size=site.denoiser_shape[:-1]), factor @ np.swapaxes(factor, -1, -2))


def dense_site(rank, times=(300,)):
    (site,) = find_sites(nn.Sequential([nn.Dense(3)]), jnp.zeros((1, WIDTH)), pattern=".*")
    return dataclasses.replace(site, rank=rank, times=times)


def test_no_other_directions_and_no_other_multiple_of_the_identity_are_better():
    site = dense_site(2)
    moments = moments_of(site)
    best = closed_form.minimizer(site, moments, SCHEDULE)
    reached = float(closed_form.expected_loss(site, moments, SCHEDULE, best))
    bar = SCHEDULE.alpha_bar(site.times[0])
    noisy = bar * moments.covariance + (1 - bar) * np.eye(WIDTH)
    values, axes = np.linalg.eigh(noisy)
    full_rank = np.sqrt(1 - bar) / values
    losses = []
    for chosen in itertools.combinations(range(WIDTH), 2):
        rest = [i for i in range(WIDTH) if i not in chosen]
        for scale in np.sqrt(1 - bar) * len(rest) / values[rest].sum() * np.linspace(0.7, 1.3, 13):
            weights = np.where(np.isin(range(WIDTH), chosen), full_rank, scale)
            matrix = (axes * weights) @ axes.T
            denoiser = {"kernel": matrix, "bias": -np.sqrt(bar) * matrix @ moments.mean}
            losses.append(float(closed_form.expected_loss(site, moments, SCHEDULE, denoiser)))
    assert abs(reached - min(losses)) < 1e-12 and sorted(losses)[1] > reached


def test_the_gradient_vanishes_at_the_best_factors():
    site = dense_site(2)
    moments = moments_of(site, 3)
    best = closed_form.minimizer(site, moments, SCHEDULE)
    bar = SCHEDULE.alpha_bar(site.times[0])

    def loss(denoiser):
        kernel = dense(denoiser)
        noisy = bar * moments.covariance + (1 - bar) * np.eye(WIDTH)
        offset = np.sqrt(bar) * kernel.T @ moments.mean + denoiser["bias"]
        return jnp.sum(kernel * (noisy @ kernel)) - 2 * np.sqrt(1 - bar) * jnp.trace(kernel) + offset @ offset

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss))({name: jnp.asarray(leaf) for name, leaf in best.items()})
    assert all(np.abs(np.asarray(leaf)).max() < 1e-10 for leaf in jax.tree_util.tree_leaves(gradient))


def test_more_rank_is_never_worse_and_all_but_one_direction_is_everything():
    losses = []
    for rank in (1, 2, 3, 4, 5):
        site = dense_site(rank)
        moments = moments_of(site, 1)
        losses.append(
            float(closed_form.expected_loss(site, moments, SCHEDULE, closed_form.minimizer(site, moments, SCHEDULE)))
        )
    full = dense_site(None)
    least = float(closed_form.expected_loss(full, moments, SCHEDULE, closed_form.minimizer(full, moments, SCHEDULE)))
    assert all(a > b for a, b in itertools.pairwise(losses))
    np.testing.assert_allclose(losses[-1], least, rtol=1e-12)  # the multiple of the identity is the direction left


def test_fused_equals_explicit_and_the_dense_matrix(network):
    model, variables, sites, images = network
    denoise = closed_form.closed_form({site.path: moments_of(site) for site in sites}, sites, SCHEDULE)
    assert certify(model, variables, denoise, sites, SCHEDULE, images).passed
    params = {"backbone": variables["params"], "denoise": denoise}
    full = with_rank(sites, 0)
    as_dense = {
        "backbone": variables["params"],
        "denoise": jax.tree_util.tree_map(
            lambda leaves: {"kernel": dense(leaves), "bias": leaves["bias"]},
            denoise,
            is_leaf=lambda node: "down" in node,
        ),
    }
    one, other = (jax.jit(lambda p, s=s: fuse(p, s, SCHEDULE))(p) for p, s in ((params, sites), (as_dense, full)))
    leaves = (jax.tree_util.tree_leaves(tree) for tree in (one, other, params["backbone"]))
    for factored, whole, before in zip(*leaves, strict=True):
        assert np.abs(factored - whole).max() <= 1e-5 < 1e-3 < np.abs(factored - before).max()
    pairs = ((params, sites), (as_dense, full))
    maps = [
        jax.jit(lambda p, s=s: {"/".join(path): tree for path, tree in composed_maps(p, s, SCHEDULE).items()})(p)
        for p, s in pairs
    ]
    for site in sites:
        np.testing.assert_allclose(maps[0][site.name]["matrix"], maps[1][site.name]["matrix"], atol=1e-5)


def test_algorithm_1_trains_the_factors(network):
    """The loss starts at that of no denoiser and falls; every factor gets a gradient once the others are not zero."""
    model, variables, sites, images = network
    start = init_denoise(sites)

    @jax.jit
    def loss(denoise, key):
        losses = algorithm1_losses(model, variables, denoise, sites, SCHEDULE, key, jnp.arange(5), images)
        return sum(jnp.sum(value) for value in losses.values())

    first = loss(start, jax.random.key(0))
    nothing = loss(jax.tree_util.tree_map(jnp.zeros_like, start), jax.random.key(0))
    np.testing.assert_allclose(first, nothing, rtol=1e-6)
    denoise = start
    step = jax.jit(lambda d, k: jax.tree_util.tree_map(lambda a, g: a - 0.05 * g, d, jax.grad(loss)(d, k)))
    for number in range(100):
        denoise = step(denoise, jax.random.key(number))
    assert loss(denoise, jax.random.key(0)) < 0.9 * first
    moved = jax.tree_util.tree_map(lambda a, b: float(np.abs(a - b).max()), denoise, start)
    assert min(jax.tree_util.tree_leaves(moved)) > 0


def test_predictions_are_those_of_the_dense_matrix():
    rng = np.random.default_rng(0)
    denoiser = {
        "scale": rng.normal(size=3),
        "down": rng.normal(size=(3, 5, 2)),
        "up": rng.normal(size=(3, 2, 5)),
        "bias": rng.normal(size=(3, 5)),
    }
    x = rng.normal(size=(7, 3, 5))
    expected = np.einsum("ngd,gde->nge", x, dense(denoiser)) + denoiser["bias"]
    narrow = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in denoiser.items()}
    np.testing.assert_allclose(predict(narrow, jnp.float32(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "both", "shape"])
def test_half_a_denoiser_is_refused(network, damage):
    _, variables, sites, _ = network
    denoise = init_denoise(sites)
    leaves = dict(denoise["first"])
    if damage == "missing":
        del leaves["up"]
    elif damage == "both":
        leaves["kernel"] = jnp.zeros((12, 12))
    else:
        leaves["up"] = leaves["up"][:, :-1]
    with pytest.raises(FusionError, match=r"first: (there is no denoiser|the denoiser's up has shape)"):
        check_params({"backbone": variables["params"], "denoise": {**denoise, "first": leaves}}, sites)


def test_narrow_sites_stay_full():
    (site,) = find_sites(nn.Sequential([nn.Dense(3)]), jnp.zeros((1, WIDTH)), pattern=".*")
    assert with_rank([site], 3)[0].rank is None and with_rank([site], 2)[0].rank == 2
