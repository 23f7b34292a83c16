"""Recipes: their grid, and that what is solved from moments is the composition of the reverse steps, each t solved once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core import recipes
from drep_jax.core.closed_form import wiener_maps
from drep_jax.core.denoisers import as_affine
from drep_jax.core.moments import Moments
from drep_jax.core.recipes import Recipe, check_rule, make_grid, solve
from drep_jax.core.schedule import Schedule, reverse_step
from drep_jax.core.sites import assign_times, find_sites
from drep_jax.errors import ConfigError
from drep_jax.trees import get_in
from tests.trees import Conv, Dense, Net, Scan, setup

SCHEDULE = Schedule(timesteps=200, beta_end=0.02)
NET = Net((Conv(2, groups=0),), (Scan(2, 3), Dense(4, bias=False)))
IMAGES = jax.ShapeDtypeStruct((2, 6, 5, 3), jnp.float32)
SITES = find_sites(NET, IMAGES, pattern=".*")
OPTIONS = {"rules": ("ddpm", "ddim:0", "wiener:0.1"), "steps": (1, 3), "scales": (1.0, 10.0), "strengths": (0.0, 1.0)}


def moments_of(site, seed):
    """Random moments in the site's form; the last direction has no variance."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=site.denoiser_shape)
    factor[..., -1, :] = 0.0
    return Moments(100, rng.normal(size=site.denoiser_shape[:-1]), factor @ np.swapaxes(factor, -1, -2))


MOMENTS = {site.path: moments_of(site, number) for number, site in enumerate(SITES)}


def flat(site, leaf, rank):
    """The leaf as (copies, groups, …)."""
    return np.asarray(leaf).reshape(site.stack or 1, site.groups, *leaf.shape[leaf.ndim - rank :])


@pytest.mark.parametrize("recipe", [Recipe("ddpm", 3, 9.0), Recipe("paper", 2, 2.5), Recipe("ddim:0", 1, 4.0)])
def test_a_recipe_is_its_reverse_steps_one_after_another(recipe):
    (tree,) = solve([recipe], MOMENTS, SITES, SCHEDULE)
    placed = assign_times(SITES, timesteps=200, steps=recipe.steps, time_scale=recipe.scale)
    for site in placed:
        leaves, site_moments = get_in(tree, site.path), MOMENTS[site.path]
        assert ("bias" in leaves) == site.bias and leaves["kernel"].dtype == np.float32
        kernels = flat(site, leaves["kernel"], 2)
        means = flat(site, site_moments.mean, 1)
        spreads = flat(site, site_moments.covariance if site.bias else site_moments.second, 2)
        for copy, t in enumerate(site.times):
            bar = SCHEDULE.alpha_bar(t)
            for group in range(site.groups):
                eye = np.eye(site.width)
                w = np.sqrt(1 - bar) * np.linalg.inv(bar * spreads[copy, group] + (1 - bar) * eye)
                b = -np.sqrt(bar) * w @ means[copy, group] if site.bias else np.zeros(site.width)
                matrix, constant = eye, np.zeros(site.width)
                for j in range(recipe.steps):
                    scale, gain, _ = reverse_step(SCHEDULE, t - j, recipe.rule)
                    step = scale * eye - gain * w
                    matrix, constant = step @ matrix, step @ constant - gain * b
                np.testing.assert_allclose(kernels[copy, group], (eye - matrix).T, rtol=1e-5, atol=1e-6)
                if site.bias:
                    bias = flat(site, leaves["bias"], 1)[copy, group]
                    np.testing.assert_allclose(bias, -constant, rtol=1e-5, atol=1e-6)


def test_equal_time_steps_are_solved_once_and_the_order_is_kept(monkeypatch):
    calls = []
    real = recipes.closed_form
    monkeypatch.setattr(recipes, "closed_form", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    requested = [
        Recipe("ddpm", 1, 6.0),
        Recipe("wiener:0.1"),
        Recipe("ddim", 3, 2.0),
        Recipe("ddpm"),
        Recipe("paper", 2, 3.0),
    ]
    together = solve(requested, MOMENTS, SITES, SCHEDULE)
    assert len(calls) == 2  # t = 6·(N − i + 1) three times, and t = N − i + 1
    for recipe, tree in zip(requested, together, strict=True):
        (alone,) = solve([recipe], MOMENTS, SITES, SCHEDULE)
        jax.tree_util.tree_map(np.testing.assert_array_equal, tree, alone)
    assert len({np.asarray(tree["head"]["kernel"]).tobytes() for tree in together}) == len(requested)
    jax.tree_util.tree_map(np.testing.assert_array_equal, together[1], wiener_maps(MOMENTS, SITES, 0.1))


def test_maps_of_rule_affine_are_themselves():
    _, denoise = setup(NET, jnp.zeros(IMAGES.shape), SITES)
    again = as_affine(denoise, SITES, SCHEDULE, rule="affine", steps=1)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, denoise)


def test_grid_has_every_recipe_once_and_says_what_does_not_fit():
    grid = make_grid(SITES, SCHEDULE, **{**OPTIONS, "scales": (1.0, 10.0, 1)})
    slots = sum(site.stack or 1 for site in SITES)
    assert 30 * slots > 200 >= 10 * slots  # k 3 at ×10 is beyond the schedule, the others are not
    labels = [recipe.label for recipe in grid.recipes]
    assert labels == [
        "ddpm, k 1, t ×1",
        "ddpm, k 1, t ×10",
        "ddpm, k 3, t ×1",
        "ddim:0, t ×1",
        "ddim:0, t ×10",
        "wiener:0.1",
    ]
    assert list(grid.dropped) == ["ddpm, k 3, t ×10"]
    assert f"{30 * slots} time steps at time scale 10" in grid.dropped["ddpm, k 3, t ×10"]
    jumps = make_grid(SITES, SCHEDULE, **{**OPTIONS, "rules": ("ddim:5",)})
    assert [recipe.label for recipe in jumps.recipes] == ["ddim:5, t ×10"] and list(jumps.dropped) == ["ddim:5, t ×1"]
    with pytest.raises(ConfigError, match="Nothing of the grid fits"):
        make_grid(SITES, SCHEDULE, **{**OPTIONS, "rules": ("ddpm",), "scales": (1000.0,)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": ()}, r"sweep\.rules is empty"),
        ({"rules": ("dppm",)}, 'Did you mean "ddpm"'),
        ({"rules": ("affine",)}, "given directly"),
        ({"rules": ("wiener:0",)}, "wiener:0.01"),
        ({"rules": ("wiener",)}, "wiener:0.01"),
        ({"rules": ("weiner:0.1",)}, 'Did you mean "wiener"'),
        ({"rules": ("wiener:much",)}, "wiener:much"),
        ({"steps": (1, 0)}, r"sweep\.steps"),
        ({"scales": (0.0,)}, r"sweep\.scales"),
        ({"strengths": (-0.5,)}, r"sweep\.strengths"),
    ],
)
def test_settings_that_make_no_grid_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make_grid(SITES, SCHEDULE, **{**OPTIONS, **change})


def test_gain_along_each_principal_axis():
    """λ/(λ + r·p) for wiener:r; √ᾱ·λ/(ᾱ·λ + 1 − ᾱ) for ddim:0, which takes features for √ᾱ·F, so that strong axes grow."""
    net = nn.Sequential([nn.Dense(4)])
    sites = find_sites(net, jnp.zeros((2, 5)), pattern=".*")
    site_moments = moments_of(sites[0], 0)
    value, axes = np.linalg.eigh(site_moments.covariance)
    power = np.trace(site_moments.covariance + np.outer(site_moments.mean, site_moments.mean)) / 5
    bar = SCHEDULE.alpha_bar(50)
    expected = {
        Recipe("wiener:0.3"): value / (value + 0.3 * power),
        Recipe("ddim:0", 1, 50.0): np.sqrt(bar) * value / (bar * value + 1 - bar),
    }
    trees = solve(list(expected), {sites[0].path: site_moments}, sites, SCHEDULE)
    for gain, tree in zip(expected.values(), trees, strict=True):
        matrix = np.eye(5) - np.asarray(get_in(tree, sites[0].path)["kernel"], np.float64).T
        np.testing.assert_allclose(axes.T @ matrix @ axes, np.diag(gain), atol=1e-6)
    check_rule("wiener:0.5", SCHEDULE)
