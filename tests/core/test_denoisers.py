"""`Denoisers`: the value says what tree, rule and steps say apart, whoever takes it, and refuses to be contradicted."""

import dataclasses
import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.certificate import certify
from drep_jax.core.closed_form import expected_losses
from drep_jax.core.denoisers import Denoisers, as_affine, resolve
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import composed_maps, fuse, fuse_exact
from drep_jax.core.moments import Moments
from drep_jax.core.schedule import RULES, Schedule
from drep_jax.core.sites import find_sites
from drep_jax.errors import ConfigError, FusionError
from tests.trees import normal, setup

SCHEDULE = Schedule(beta_end=0.02)


class Net(nn.Module):
    """Two Dense layers, the second without bias."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, name="first")(x))
        return nn.Dense(3, use_bias=False, name="second")(x)


X = normal(0, (6, 5))
SITES = find_sites(Net(), X, pattern=".*", steps=2, time_scale=40.0)
VARIABLES, TREE = setup(Net(), X, SITES)
VALUE = Denoisers(TREE, "paper", 1)
KEYWORDS = {"rule": "paper", "steps": 1}


def equal(one, other):
    assert jax.tree_util.tree_structure(one) == jax.tree_util.tree_structure(other)
    jax.tree_util.tree_map(np.testing.assert_array_equal, one, other)


def params(denoise):
    return {"backbone": VARIABLES["params"], "denoise": denoise}


def by_name(maps):
    return {"/".join(path): leaves for path, leaves in maps.items()}


CALLS = {
    "fuse": lambda denoise, **options: fuse(params(denoise), SITES, SCHEDULE, **options),
    "fuse_exact": lambda denoise, **options: fuse_exact(params(denoise), SITES, SCHEDULE, **options),
    "composed_maps": lambda denoise, **options: by_name(composed_maps(params(denoise), SITES, SCHEDULE, **options)),
    "as_affine": lambda denoise, **options: as_affine(denoise, SITES, SCHEDULE, **options),
    "explicit_apply": lambda denoise, **options: explicit_apply(
        Net(), VARIABLES, denoise, SITES, SCHEDULE, X, **options
    ),
    "certify": lambda denoise, **options: certify(Net(), VARIABLES, denoise, SITES, SCHEDULE, X, **options).to_json(),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_value_is_the_tree_with_its_keywords(name):
    call = CALLS[name]
    expected = call(TREE, **KEYWORDS)
    equal(call(VALUE), expected)
    equal(call(VALUE, **KEYWORDS), expected)
    assert leaf_bytes(call(TREE)) != leaf_bytes(expected)  # so rule and steps of the value did arrive


def leaf_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree_util.tree_leaves(tree)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("option", "message"), [({"rule": "ddpm"}, "rule='paper'.*rule='ddpm'"), ({"steps": 2}, "steps=1.*steps=2")]
)
def test_a_keyword_that_contradicts_the_value_is_refused(name, option, message):
    with pytest.raises(ConfigError, match=message):
        CALLS[name](VALUE, **option)


def test_losses_take_the_value_too():
    key, index = jax.random.key(0), jnp.arange(6)
    losses = [algorithm1_losses(Net(), VARIABLES, d, SITES, SCHEDULE, key, index, X) for d in (VALUE, TREE)]
    equal(*losses)
    moments = {site.path: Moments(10, np.zeros(site.width), np.eye(site.width)) for site in SITES}
    exact = [expected_losses(moments, SITES, SCHEDULE, d) for d in (VALUE, TREE, None)]
    assert exact[0] == exact[1] != exact[2]


def test_rule_and_steps_are_static_and_the_tree_is_not():
    traced = []

    @jax.jit
    def run(denoisers):
        traced.append((denoisers.rule, denoisers.steps))
        return fuse(params(denoisers), SITES, SCHEDULE)

    doubled = jax.tree_util.tree_map(lambda leaf: 2 * leaf, VALUE)
    assert isinstance(doubled, Denoisers) and doubled.keywords == VALUE.keywords
    one, two = run(VALUE), run(doubled)
    assert not np.array_equal(one["first"]["kernel"], two["first"]["kernel"])
    run(Denoisers(TREE, "ddpm"))
    assert traced == [("paper", 1), ("ddpm", None)]
    slope = jax.grad(lambda denoisers: jnp.sum(fuse(params(denoisers), SITES, SCHEDULE)["first"]["kernel"]))(VALUE)
    assert slope.keywords == VALUE.keywords and np.abs(slope.tree["first"]["kernel"]).max() > 0


@pytest.mark.parametrize("rule", ["ddpm", "paper", "ddim", "ddim:0"])
def test_composed_maps_scale_as_the_strength_does(rule):
    """The whole fusion of scaled maps is the fusion with that strength, to the rounding of the maps in float32."""
    denoisers = Denoisers(TREE, rule)
    maps = denoisers.as_affine(SITES, SCHEDULE)
    assert maps.keywords == {"rule": "affine", "steps": 1}
    for strength in (0.0, 0.3, 1.7):
        expected = fuse_exact(params(denoisers), SITES, SCHEDULE, strength=strength, round_back=False)
        fused = fuse_exact(params(maps.scaled(strength)), SITES, SCHEDULE, round_back=False)
        jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), fused, expected)
    with pytest.raises(ConfigError, match=f'for rule "{rule}".*as_affine'):
        denoisers.scaled(0.5)


@hypothesis.given(
    st.sampled_from((None, *RULES, "ddim:0", "wiener")),
    st.sampled_from((None, 1, 2)),
    st.sampled_from((None, "ddpm", "affine")),
    st.sampled_from((None, 1, 2)),
)
def test_there_is_one_answer_or_an_error(own_rule, own_steps, rule, steps):
    """A tree takes the keywords; a value its own, which the keywords may repeat but not change."""
    if own_rule is None:
        assert resolve(TREE, rule, steps) == (TREE, rule or "ddpm", steps)
        return
    single = own_rule in ("affine", "ddim:0")
    if own_rule == "wiener" or (single and own_steps == 2):
        with pytest.raises(ConfigError):
            Denoisers(TREE, own_rule, own_steps)
        return
    value = Denoisers(TREE, own_rule, own_steps)
    assert value.steps == (1 if single else own_steps)
    if (rule or own_rule) != own_rule or (steps is not None and steps != value.steps):
        with pytest.raises(ConfigError, match="The denoisers are for"):
            resolve(value, rule, steps)
    else:
        assert resolve(value, rule, steps) == (TREE, own_rule, value.steps)


def test_checks_and_noise_reach_the_tree():
    VALUE.check(VARIABLES["params"], SITES)
    first = [site for site in SITES if site.bias]
    noisy = VALUE.with_noise(first, jax.random.key(1))
    assert noisy.keywords == VALUE.keywords and noisy.tree["first"]["z"].shape == (2, 5)
    assert "z" not in VALUE.tree["first"]
    broken = dataclasses.replace(VALUE, tree={**TREE, "first": {"kernel": jnp.zeros((2, 2))}})
    for call in (
        functools.partial(broken.check, VARIABLES["params"], SITES),
        functools.partial(fuse, params(broken), SITES, SCHEDULE),
    ):
        with pytest.raises(FusionError, match=r"first: the denoiser's kernel has shape \(2, 2\), expected \(5, 5\)"):
            call()
    with pytest.raises(FusionError, match="no `denoise` subtree"):
        fuse({"denoise": VALUE}, SITES, SCHEDULE)
