"""Corruptions: right statistics, and noise that belongs to an image, not to a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.data.corruptions import CORRUPTIONS, corrupt, parse_corruption
from drep_jax.errors import ConfigError

GREY = jnp.full((8, 32, 32, 3), 127.0)
INDEX = jnp.arange(8, dtype=jnp.int32) + 100


@pytest.mark.parametrize("std", [2.0, 20.0])
def test_gaussian_noise_has_the_stated_deviation_in_grey_levels(std):
    noise = np.asarray(corrupt(GREY, INDEX, f"gaussian:{std}", seed=0)) - 127
    assert abs(noise.std() / std - 1) < 0.02 and abs(noise.mean()) < 0.02 * std
    per_image = noise.reshape(8, -1)
    assert np.abs(np.corrcoef(per_image) - np.eye(8)).max() < 0.08, "images must not share noise"
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.05, "nor channels"


def test_values_stay_grey_levels():
    for level in (0.0, 255.0):
        out = np.asarray(corrupt(jnp.full((2, 8, 8, 3), level), INDEX[:2], "gaussian:50", seed=0))
        assert out.min() >= 0 and out.max() <= 255 and out.std() > 5


def test_strength_zero_and_clean_change_nothing():
    for spec in ("clean", "gaussian:0"):
        np.testing.assert_array_equal(corrupt(GREY, INDEX, spec, seed=0), GREY)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_noise_depends_on_seed_and_example_only(name):
    run = jax.jit(functools.partial(corrupt, name_and_strength=f"{name}:10", seed=3))
    whole = np.asarray(run(GREY, INDEX))
    assert (whole != np.asarray(GREY)).any()
    order = np.array([5, 2, 7])
    np.testing.assert_array_equal(run(GREY[order], INDEX[order]), whole[order])
    np.testing.assert_array_equal(run(GREY[:1], INDEX[:1]), whole[:1])
    split = jax.vmap(run)(GREY[:, None], INDEX[:, None])
    np.testing.assert_array_equal(split[:, 0], whole)
    assert (np.asarray(corrupt(GREY, INDEX, f"{name}:10", seed=4)) != whole).any()
    again = np.asarray(run(GREY[:2], jnp.array([100, 100], jnp.int32)))
    np.testing.assert_array_equal(again[0], again[1])


def test_integers_become_float32_and_floats_keep_their_type():
    assert corrupt(jnp.zeros((1, 2, 2, 3), jnp.uint8), INDEX[:1], "gaussian:1", 0).dtype == jnp.float32
    assert corrupt(jnp.zeros((1, 2, 2, 3), jnp.uint8), INDEX[:1], "clean", 0).dtype == jnp.float32
    assert corrupt(jnp.zeros((1, 2, 2, 3), jnp.bfloat16), INDEX[:1], "gaussian:1", 0).dtype == jnp.bfloat16


def test_padding_has_noise_of_its_own():
    out = corrupt(GREY[:2], jnp.array([-1, 0], jnp.int32), "gaussian:10", 0)
    assert bool(jnp.isfinite(out).all()) and (np.asarray(out[0]) != np.asarray(out[1])).any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("guassian:3", 'Did you mean "gaussian"'),
        ("claen", 'Did you mean "clean"'),
        ("clean:3", "takes no strength"),
        ("gaussian", "finite strength"),
        ("gaussian:", "finite strength"),
        ("gaussian:-1", "finite strength"),
        ("gaussian:nan", "finite strength"),
        ("gaussian:inf", "finite strength"),
        ("gaussian:strong", "finite strength"),
        ("", "Unknown corruption"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        corrupt(GREY, INDEX, spec, seed=0)


def test_specs_are_parsed():
    assert parse_corruption("clean") == ("clean", 0.0)
    assert parse_corruption("gaussian:2.5") == ("gaussian", 2.5)
