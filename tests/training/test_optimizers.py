"""Learning rates over the steps against their formulas, and weight decay and rates by parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import ConfigError
from drep_jax.training.optimizers import make_optimizer, make_schedule

PARAMS = {
    "backbone": {
        "norm1": {"scale": jnp.ones(3)},
        "fc": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
        "head": {"kernel": jnp.ones((3, 2))},
    }
}


def poly(k, peak, floor, power, steps):
    """mmengine's own recursion, from step to step."""
    rate = peak
    for i in range(1, k + 1):
        rate = (rate - floor) * (1 - 1 / (steps - i)) ** power + floor
    return rate


def test_learning_rates_are_those_of_the_published_recipes():
    fcn = make_schedule("poly:0.9", 0.01, 20, floor=1e-4)
    np.testing.assert_allclose([fcn(k) for k in range(20)], [poly(k, 0.01, 1e-4, 0.9, 20) for k in range(20)], 1e-5)
    segformer = make_schedule("poly:1", 6e-5, 20, warmup=5)
    expected = [6e-5 * k / 5 for k in range(5)] + [poly(k, 6e-5, 0.0, 1.0, 15) for k in range(15)]
    np.testing.assert_allclose([segformer(k) for k in range(20)], expected, rtol=1e-5, atol=1e-12)
    cosine = make_schedule("cosine", 2.0, 10, warmup=2, floor=0.5)
    expected = [0.0, 1.0, *(0.5 + 1.5 * (1 + np.cos(np.pi * k / 8)) / 2 for k in range(9))]
    np.testing.assert_allclose([cosine(k) for k in range(11)], expected, rtol=1e-6)


def test_rates_of_public_schedules_of_steps_fall_by_ten():
    rate = make_schedule("steps:0.5,0.75", 0.02, 20, warmup=4, floor=1e-4)
    expected = [0.02 * k / 4 for k in range(4)] + [0.02] * 6 + [0.002] * 5 + [2e-4] * 5
    np.testing.assert_allclose([rate(k) for k in range(20)], expected, rtol=1e-5)
    assert float(make_schedule("steps:0.1,0.2,0.3", 0.02, 20, floor=1e-4)(19)) == pytest.approx(1e-4)


def change(name, grad=1.0, steps=1, **options):
    tx = make_optimizer(name, learning_rate=0.1, steps=10, **options)
    params, state = PARAMS, tx.init(PARAMS)
    grads = jax.tree_util.tree_map(lambda leaf: jnp.full_like(leaf, grad), params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = jax.tree_util.tree_map(jnp.add, params, updates)
    return jax.tree_util.tree_map(lambda new, old: float((new - old).mean()), params, PARAMS)["backbone"]


@pytest.mark.parametrize("sharded", [False, True])
def test_groups_of_parameters_as_segformer_has_them(sharded):
    groups = {"no_decay": (".*norm.*",), "rates": (("head/.*", 10.0),), "sharded": sharded}
    moved = change("adamw", weight_decay=0.5, **groups)
    assert np.isclose(moved["norm1"]["scale"], -0.1, rtol=1e-4)
    assert np.isclose(moved["fc"]["kernel"], -0.15, rtol=1e-4)
    assert np.isclose(moved["fc"]["bias"], -0.15, rtol=1e-4), "vectors decay where groups say what does not"
    assert np.isclose(moved["head"]["kernel"], -1.5, rtol=1e-4)


def test_momentum_has_no_nesterov_step_and_decays_everything():
    assert np.isclose(change("momentum")["fc"]["bias"], -0.1)
    assert np.isclose(change("sgd")["fc"]["bias"], -0.19)
    assert np.isclose(change("momentum", grad=0.0, weight_decay=0.5)["norm1"]["scale"], -0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": "polynomial"}, "neither cosine nor poly:POWER"),
        ({"decay": "steps:0.9,0.5"}, "rising fractions of the steps"),
        ({"decay": "steps:1"}, "rising fractions of the steps"),
        ({"decay": "poly:x"}, "neither cosine nor poly:POWER"),
        ({"decay": "cosine:2"}, "neither cosine nor poly:POWER"),
        ({"floor": 0.2}, "floor=0.2 must lie between 0 and the learning rate"),
        ({"no_decay": ("norm1",), "weight_decay": 0.1}, "'norm1' matches no parameter's whole path"),
        ({"no_decay": (".*",)}, "weight_decay is 0"),
        ({"rates": (("(", 2.0),)}, "no regular expression"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        make_optimizer("adamw", learning_rate=0.1, steps=10, **options).init(PARAMS)
