"""Denoisers from moments of clean and noisy features that were never paired."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.closed_form import wiener_maps
from drep_jax.core.moments import Moments
from drep_jax.core.sites import find_sites
from drep_jax.core.unpaired import noise_covariance, unpaired_maps
from drep_jax.errors import ConfigError
from drep_jax.trees import get_in
from tests import trees

NET = trees.Net(
    (trees.Conv(), trees.Conv(groups=2), trees.Conv(bias=False)), (trees.Scan(length=2), trees.Dense(4, bias=False))
)


def sites_and_moments():
    """Every kind of site, with random moments."""
    sites = find_sites(NET, jnp.zeros((1, 6, 6, 2)), pattern=".*", kind="patch")
    rng = np.random.default_rng(0)
    moments = {}
    for site in sites:
        factor = rng.standard_normal(site.denoiser_shape)
        mean = rng.standard_normal(site.denoiser_shape[:-1])
        moments[site.path] = Moments(1000, mean, factor @ np.swapaxes(factor, -1, -2) / site.width)
    return sites, moments


def test_known_isotropic_noise_gives_the_wiener_filter():
    sites, clean = sites_and_moments()
    assert {site.bias for site in sites} == {True, False} and any(site.groups > 1 for site in sites)
    ratio, noisy = 0.2, {}
    for site in sites:
        power = np.trace(clean[site.path].second, axis1=-2, axis2=-1)[..., None, None] / site.width
        covariance = clean[site.path].covariance + ratio * power * np.eye(site.width)
        noisy[site.path] = dataclasses.replace(clean[site.path], covariance=covariance)
    result, expected = unpaired_maps(clean, noisy, sites), wiener_maps(clean, sites, ratio)
    for site in sites:
        ours, known = get_in(result.denoise, site.path), get_in(expected, site.path)
        assert ours.keys() == known.keys() and np.abs(ours["kernel"]).max() > 0.05
        for name in ours:
            np.testing.assert_allclose(ours[name], known[name], atol=2e-5)
    assert all(0 < after < before for before, after in result.errors.values())
    assert len(result.errors) == sum(site.stack or 1 for site in sites)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_map_is_the_regression_on_the_mixture(share):
    """Noise of any covariance, added with both signs, is exactly uncorrelated; then least squares has the same solution."""
    site = find_sites(trees.Net((), (trees.Dense(3),)), jnp.zeros((1, 2, 2, 2)), pattern=".*")[0]
    rng = np.random.default_rng(1)
    width = site.width
    features = np.repeat(rng.standard_normal((400, width)) @ rng.standard_normal((width, width)) + 2, 2, axis=0)
    noise = (rng.standard_normal((400, width)) @ np.triu(np.ones((width, width))) * 0.3).repeat(2, axis=0)
    noise *= np.tile([1, -1], 400)[:, None]
    noisy = features + noise + np.linspace(-1, 1, width)
    taken = {
        name: {site.path: Moments(len(x), x.mean(0), np.cov(x.T, bias=True))}
        for name, x in (("clean", features), ("noisy", noisy))
    }
    result = unpaired_maps(taken["clean"], taken["noisy"], [site], share)
    inputs = np.concatenate([features, noisy])
    weight = np.sqrt(np.repeat([share, 1 - share], len(features)))[:, None]
    design = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    best = np.linalg.lstsq(weight * design, weight * np.concatenate([features, features]), rcond=None)[0]
    leaves = get_in(result.denoise, site.path)
    np.testing.assert_allclose(np.eye(width) - leaves["kernel"], best[:-1], atol=1e-5)
    np.testing.assert_allclose(-leaves["bias"], best[-1], atol=1e-5)
    power = np.square(features - features.mean(0)).sum(axis=1).mean()
    expected = [np.square(x - features).sum(axis=1).mean() / power for x in (noisy, noisy @ best[:-1] + best[-1])]
    np.testing.assert_allclose(result.errors[site.name], expected, rtol=1e-4)


def test_noise_is_a_covariance_even_where_the_noisy_images_show_less():
    rng = np.random.default_rng(2)
    factor, more = rng.standard_normal((2, 3, 6, 6))
    clean, noisy = (a @ np.swapaxes(a, -1, -2) for a in (factor, more))
    noise = noise_covariance(clean, noisy)
    assert np.linalg.eigvalsh(noisy - clean).min() < -0.1 and np.linalg.eigvalsh(noise).min() > -1e-9
    assert np.linalg.eigvalsh(noisy - noise).min() > -1e-9  # never more than there is
    turn = rng.standard_normal((6, 6))
    np.testing.assert_allclose(
        noise_covariance(turn @ clean @ turn.T, turn @ noisy @ turn.T), turn @ noise @ turn.T, atol=1e-6
    )
    np.testing.assert_allclose(noise_covariance(clean, clean + noisy), noisy, atol=1e-8)
    dead = np.zeros((6, 6))
    np.testing.assert_array_equal(noise_covariance(dead, dead), dead)


def test_without_noise_nothing_changes_and_impossible_shares_are_refused():
    sites, clean = sites_and_moments()
    result = unpaired_maps(clean, clean, sites, 0.5)
    assert max(np.abs(leaf).max() for site in sites for leaf in get_in(result.denoise, site.path).values()) < 1e-6
    with pytest.raises(ConfigError, match=r"lies in \[0, 1\)"):
        unpaired_maps(clean, clean, sites, 1.0)
