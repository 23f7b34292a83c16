"""The closed form is the least of Algorithm 1's loss, at every kind of site, and moments are kept and refused by file."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.closed_form import closed_form, expected_loss, expected_losses, minimizer
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.moments import Moments, collect_moments
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import CheckpointError
from drep_jax.run.moments import load_moments, save_moments
from tests import trees

SCHEDULE = Schedule(beta_end=0.02)
NET = trees.Net(
    (trees.Conv(), trees.Conv(groups=2), trees.Conv(bias=False)), (trees.Scan(length=2), trees.Dense(4, bias=False))
)


class One(nn.Module):
    """One Dense layer, whose features are the input itself."""

    bias: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=self.bias, name="head")(x)


def sites_and_moments(steps=20):
    """Every kind of site, with random moments."""
    sites = find_sites(NET, jnp.zeros((1, 6, 6, 2)), pattern=".*", steps=steps, kind="patch")
    rng = np.random.default_rng(0)
    moments = {}
    for site in sites:
        factor = rng.standard_normal(site.denoiser_shape) * np.logspace(0.5, -2, site.width)
        mean = rng.standard_normal(site.denoiser_shape[:-1])
        moments[site.path] = Moments(1000, mean, factor @ np.swapaxes(factor, -1, -2) / site.width)
    return sites, moments


def lone_site(width, bias=True, time=300):
    site = find_sites(One(bias), jnp.zeros((1, width)), pattern="head")[0]
    return dataclasses.replace(site, times=(time,))


# ---- the minimum -------------------------------------------------------------------------------------------------------


def test_the_loss_is_stationary_at_the_closed_form():
    """By central differences, which are exact for a quadratic, along random directions; away from it the slope is large."""
    sites, moments = sites_and_moments()
    forms = {(site.kind, site.groups > 1, site.stack is None, site.bias) for site in sites}
    assert len(forms) >= 5
    rng = np.random.default_rng(1)
    for site in sites:
        best = minimizer(site, moments[site.path], SCHEDULE)
        way = {name: rng.standard_normal(leaf.shape) for name, leaf in best.items()}

        def at(center, step, site=site, way=way):
            moved = {name: center[name] + step * way[name] for name in center}
            return np.asarray(expected_loss(site, moments[site.path], SCHEDULE, moved))

        zero = {name: np.zeros_like(leaf) for name, leaf in best.items()}
        slope, elsewhere = ((at(center, 1e-3) - at(center, -1e-3)) / 2e-3 for center in (best, zero))
        assert (np.abs(slope) < 1e-9 * np.abs(at(best, 1.0))).all(), site.name
        assert (np.abs(elsewhere) > 1e-4).all(), site.name


def test_no_perturbation_is_better():
    sites, moments = sites_and_moments()
    best = closed_form(moments, sites, SCHEDULE)
    least = expected_losses(moments, sites, SCHEDULE)
    assert all(0 < value < 1 for value in least.values())
    for seed, size in enumerate((1e-2, 0.1, 1.0)):
        worse = expected_losses(moments, sites, SCHEDULE, trees.randomize(best, seed, size))
        assert all(worse[name] > least[name] for name in least)


def test_sgd_comes_down_to_the_closed_form():
    """Algorithm 1 by SGD on one small site: above the minimum at every look, and near it in the end."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 8, 4)) @ rng.standard_normal((4, 4)) + 1.0).astype(np.float32)
    site = lone_site(4)
    variables = One().init(jax.random.key(0), x)
    moments = collect_moments(One(), variables, (site,), [(x, np.ones(64, np.float32))])
    best = closed_form(moments, (site,), SCHEDULE)
    (least,) = expected_losses(moments, (site,), SCHEDULE).values()
    tx = optax.sgd(optax.cosine_decay_schedule(0.5, 600), momentum=0.9)

    @jax.jit
    def step(denoise, state, number):
        def loss(d):
            key = jax.random.key(number)
            return algorithm1_losses(One(), variables, d, (site,), SCHEDULE, key, jnp.arange(64), x)["head"]

        updates, state = tx.update(jax.grad(loss)(denoise), state)
        return optax.apply_updates(denoise, updates), state

    denoise = init_denoise((site,))
    state, seen = tx.init(denoise), []
    for number in range(600):
        if number % 100 == 0:
            seen += expected_losses(moments, (site,), SCHEDULE, denoise).values()
        denoise, state = step(denoise, state, number)
    seen += expected_losses(moments, (site,), SCHEDULE, denoise).values()
    gaps = np.array(seen) - least
    assert gaps[0] == pytest.approx(1 - least) and gaps[0] > 0.05
    assert gaps.min() > 0
    assert gaps[-1] < 0.02 * gaps[0]
    np.testing.assert_allclose(denoise["head"]["kernel"], best["head"]["kernel"], atol=0.05)
    np.testing.assert_allclose(denoise["head"]["bias"], best["head"]["bias"], atol=0.05)


def test_the_noise_regularizes():
    """Fewer vectors than channels, and dead and constant channels, need no ridge: C has no eigenvalue below 1 − ᾱ.

    For a channel that never varies, X tells all of ε: W_D is 1/√(1−ᾱ) there, and what it costs is nothing.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 1, 24)).astype(np.float32)
    x[..., 5], x[..., 7] = 0.0, 1e3
    site = lone_site(24, time=1)
    variables = One().init(jax.random.key(0), x)
    moments = collect_moments(One(), variables, (site,), [(x, np.ones(8, np.float32))])
    site_moments = moments["head",]
    assert site_moments.count == 8 and np.linalg.matrix_rank(site_moments.covariance, tol=1e-5) == 7
    best = minimizer(site, site_moments, SCHEDULE)
    assert all(np.isfinite(leaf).all() for leaf in best.values())
    bar = SCHEDULE.alpha_bar(1)
    for channel in (5, 7):
        row = np.zeros(24)
        row[channel] = 1 / np.sqrt(1 - bar)
        np.testing.assert_allclose(best["kernel"][channel], row, atol=1e-9 * row.max())
        np.testing.assert_allclose(
            best["bias"][channel], -np.sqrt(bar) * row[channel] * site_moments.mean[channel], rtol=1e-9
        )
    assert np.linalg.norm(best["kernel"], 2) <= 1.01 / np.sqrt(1 - bar)
    # Directions that never vary cost nothing, 17 of 24; in the others, of variance 1, noise of 1 − ᾱ = 1e-4 is lost.
    assert expected_loss(site, site_moments, SCHEDULE, best) == pytest.approx(7 / 24, rel=1e-2)
    assert np.isfinite(closed_form(moments, (site,), SCHEDULE)["head"]["kernel"]).all()


def test_rounding_that_is_larger_than_the_noise_is_survived():
    """One direction 10⁹ times stronger than the noise: float32 moments then have eigenvalues below zero.

    What W_D amplifies is still bounded by 1/√(1−ᾱ), and its true loss, from moments in float64, is that of the true minimum.
    """
    rng = np.random.default_rng(0)
    strong = 300 * rng.standard_normal((64, 2, 1)) * rng.standard_normal(48) / np.sqrt(48)
    x = (strong + rng.standard_normal((64, 2, 5)) @ rng.standard_normal((5, 48))).astype(np.float32)
    site = lone_site(48, time=1)
    variables = One().init(jax.random.key(0), x)
    batches = [(x[i : i + 8], np.ones(8, np.float32)) for i in range(0, 64, 8)]
    site_moments = collect_moments(One(), variables, (site,), batches)["head",]
    bar = SCHEDULE.alpha_bar(1)
    assert np.linalg.eigvalsh(bar * site_moments.covariance + (1 - bar) * np.eye(48)).min() < 0
    flat = x.reshape(-1, 48).astype(np.float64)
    truth = Moments(128, flat.mean(0), np.cov(flat.T, bias=True))
    solution, best = minimizer(site, site_moments, SCHEDULE), minimizer(site, truth, SCHEDULE)
    assert np.linalg.norm(solution["kernel"], 2) <= (1 + 1e-9) / np.sqrt(1 - bar)
    reached, least = (float(expected_loss(site, truth, SCHEDULE, d)) for d in (solution, best))
    assert least < 0.15 and least <= reached < 1.5 * least


def test_a_wide_site_is_solved():
    """d = 768 from 300 vectors: W C = √(1−ᾱ)·I holds to rounding."""
    site = lone_site(768, time=5)
    factor = np.random.default_rng(0).standard_normal((768, 300))
    site_moments = Moments(300, np.zeros(768), factor @ factor.T / 300)
    bar = SCHEDULE.alpha_bar(5)
    best = minimizer(site, site_moments, SCHEDULE)
    product = best["kernel"] @ (bar * site_moments.covariance + (1 - bar) * np.eye(768))
    np.testing.assert_allclose(product, np.sqrt(1 - bar) * np.eye(768), atol=1e-9)


# ---- the file ----------------------------------------------------------------------------------------------------------


def test_moments_survive_their_file(tmp_path):
    sites, moments = sites_and_moments()
    path = str(tmp_path / "moments.npz")
    save_moments(path, moments, "mine 8x8", tokens=0.25)
    again = load_moments(path, sites, "mine 8x8", tokens=0.25)
    for site in sites:
        assert again[site.path].count == 1000
        np.testing.assert_array_equal(again[site.path].mean, moments[site.path].mean)
        np.testing.assert_array_equal(again[site.path].covariance, moments[site.path].covariance)
    assert [file.name for file in tmp_path.iterdir()] == ["moments.npz"]


def test_moments_of_something_else_are_refused(tmp_path):
    sites, moments = sites_and_moments()
    path = str(tmp_path / "moments.npz")
    with pytest.raises(CheckpointError, match=r"There is no .*moments\.npz"):
        load_moments(path, sites, "mine")
    save_moments(path, moments, "mine", tokens=0.25)
    with pytest.raises(CheckpointError, match="another backbone or image size"):
        load_moments(path, sites, "yours", tokens=0.25)
    with pytest.raises(CheckpointError, match=r"share of 0\.25 .*denoise\.moment_tokens is 1; delete it"):
        load_moments(path, sites, "mine")
    wider = (dataclasses.replace(sites[0], width=sites[0].width + 1), *sites[1:])
    with pytest.raises(CheckpointError, match=rf"moments of {sites[0].name} have shape .* expected"):
        load_moments(path, wider, "mine", tokens=0.25)
    moved = (dataclasses.replace(sites[0], path=("elsewhere",)), *sites[1:])
    with pytest.raises(CheckpointError, match="moments of elsewhere have shape None"):
        load_moments(path, moved, "mine", tokens=0.25)
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_moments(path, sites, "mine", tokens=0.25)
