"""The placebo arm: as large as what was learned, in norm or in effect on the features, and random."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.denoisers import Denoisers, check_params
from drep_jax.core.fusion import composed_maps, fuse_exact
from drep_jax.core.moments import collect_moments
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import find_sites
from drep_jax.evaluation.placebo import placebo_denoisers, placebo_of_effect
from drep_jax.trees import get_in, set_in
from tests.command import largest_difference, same_bits
from tests.trees import Conv, Dense, Net, Scan, normal, setup

SCHEDULE = Schedule(timesteps=100, beta_end=0.02)
NETS = {
    "dense without bias": Net((), (Dense(5), Dense(4, bias=False))),
    "stacked by scan": Net((), (Scan(3, 6),)),
    "depthwise": Net((Conv(2, groups=0),), ()),
    "convolution": Net((Conv(3),), ()),
}
DEEPER = ("stacked by scan", "depthwise")


def norms(values, rank):
    return np.sqrt(np.sum(np.square(np.asarray(values, np.float64)), axis=tuple(range(-rank, 0))))


@pytest.mark.parametrize(
    "name, rule, steps",
    [*((name, "ddpm", 2) for name in NETS), ("convolution", "paper", 1), ("convolution", "ddim:0", 1)],
)
def test_maps_have_the_learned_norms_in_every_group_and_copy(name, rule, steps):
    net, x = NETS[name], normal(0, (2, 6, 6, 3))
    sites = find_sites(net, x, pattern=".*", timesteps=100, steps=2)
    variables, denoise = setup(net, x, sites)
    params = {"backbone": variables["params"], "denoise": denoise}
    how = {"rule": rule, "steps": steps}
    learned = jax.jit(lambda p: composed_maps(p, sites, SCHEDULE, **how))(params)
    tree = jax.jit(lambda p: placebo_denoisers(p, sites, SCHEDULE, jax.random.key(1), **how))(params)
    check_params({**params, "denoise": tree}, sites)
    as_maps = jax.jit(lambda p: composed_maps(p, sites, SCHEDULE, rule="affine", steps=1))
    random = as_maps({**params, "denoise": tree})
    for site in sites:
        ours, theirs = random[site.path], learned[site.path]
        assert ours.keys() == theirs.keys() and ("constant" in ours) == site.bias
        for leaf, rank in (("matrix", 2), ("constant", 1)):
            if leaf in ours:
                wanted = norms(theirs[leaf], rank)
                assert np.min(wanted) > 1e-4
                np.testing.assert_allclose(norms(ours[leaf], rank), wanted, rtol=2e-3)
        # Random: no more alike than two random matrices of that size are.
        one, two = (np.asarray(m["matrix"], np.float64).ravel() for m in (ours, theirs))
        assert abs(one @ two) / np.linalg.norm(one) / np.linalg.norm(two) < 5 / np.sqrt(one.size)
    fused = fuse_exact({**params, "denoise": tree}, sites, SCHEDULE, rule="affine", steps=1)
    assert largest_difference(fused, variables["params"]) > 1e-3


def test_the_key_decides_and_sites_of_one_shape_differ():
    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="two")(jnp.tanh(nn.Dense(4, name="one")(x)))

    x = normal(0, (2, 4))
    sites = find_sites(Twins(), x, timesteps=100)
    variables, denoise = setup(Twins(), x, sites)
    params = {"backbone": variables["params"], "denoise": denoise}
    program = jax.jit(lambda key: placebo_denoisers(params, sites, SCHEDULE, key))
    first, same, other = (program(jax.random.key(seed)) for seed in (1, 1, 2))
    assert same_bits(first, same) and not same_bits(first, other)
    one, two = (np.asarray(get_in(first, (name,))["kernel"]) for name in ("one", "two"))
    assert not np.allclose(one / np.linalg.norm(one), two / np.linalg.norm(two), atol=0.05)


def test_no_change_gives_no_placebo():
    net, x = Net((), (Dense(5),)), normal(0, (2, 4, 4, 3))
    sites = find_sites(net, x, timesteps=100)
    variables, denoise = setup(net, x, sites)
    zero = jax.tree_util.tree_map(jnp.zeros_like, denoise)
    tree = jax.jit(lambda p: placebo_denoisers(p, sites, SCHEDULE, jax.random.key(1), rule="paper"))(
        {"backbone": variables["params"], "denoise": zero}
    )
    assert not any(np.any(leaf) for leaf in jax.tree_util.tree_leaves(tree))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in DEEPER else []) for n in NETS])
def test_features_change_as_much_in_their_mean_and_about_it(name):
    """Against the moments of the same images."""
    net, batches = NETS[name], [np.asarray(normal(seed, (8, 6, 6, 3))) + 0.5 for seed in (0, 1)]
    sites = find_sites(net, batches[0], pattern=".*", timesteps=100)
    variables, denoise = setup(net, batches[0], sites)
    moments = collect_moments(net, variables, sites, [(x, np.ones(8)) for x in batches])
    learned = Denoisers(denoise, "affine", 1)
    tree = placebo_of_effect(net, variables, learned, sites, SCHEDULE, jax.random.key(1), batches)
    check_params({"backbone": variables["params"], "denoise": tree}, sites)

    def effect(site, denoise):
        """(E‖change − its mean‖², ‖its mean‖²); without a constant only their sum is the learned one's."""
        at, leaves = moments[site.path], get_in(denoise, site.path)
        matrix = -np.asarray(leaves["kernel"], np.float64)
        varies = np.einsum("...de,...df,...fe->...", matrix, at.covariance, matrix)
        mean = np.einsum("...d,...de->...e", at.mean, matrix) - np.asarray(leaves.get("bias", 0.0), np.float64)
        same = (mean**2).sum(-1)
        return (varies, same) if site.bias else (varies + same,)

    for site in sites:
        for ours, theirs in zip(effect(site, tree), effect(site, denoise), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3)
        ours, theirs = (np.asarray(get_in(t, site.path)["kernel"], np.float64).ravel() for t in (tree, denoise))
        assert abs(ours @ theirs) / np.linalg.norm(ours) / np.linalg.norm(theirs) < 5 / np.sqrt(ours.size)


def test_maps_of_what_hardly_varies_get_a_gentle_placebo():
    """Equal norm would change features hundreds of times as much, and any gain over it is no news."""
    net, scale = Net((), (Dense(5),)), np.array([1.0, 1.0, 0.001], np.float32)
    x = np.asarray(normal(0, (8, 1, 1, 3))) * scale
    sites = find_sites(net, x, timesteps=100)
    variables, denoise = setup(net, x, sites)
    kernel, bias = np.diag([0.0, 0.0, 1.0]).astype(np.float32), np.zeros(3, np.float32)
    learned = Denoisers(set_in(denoise, sites[0].path, {"kernel": kernel, "bias": bias}), "affine", 1)
    key = jax.random.key(1)
    trees = (
        placebo_of_effect(net, variables, learned, sites, SCHEDULE, key, [x]),
        placebo_denoisers({"denoise": learned}, sites, SCHEDULE, key),
    )
    fair, alike = (np.std(x.reshape(-1, 3) @ get_in(tree, sites[0].path)["kernel"], axis=0) for tree in trees)
    assert np.linalg.norm(fair) == pytest.approx(np.std(x[..., 2]), rel=1e-3)
    assert np.linalg.norm(alike) > 300 * np.linalg.norm(fair)
