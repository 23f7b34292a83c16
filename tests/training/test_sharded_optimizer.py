"""The optimizer's state sharded among eight devices: the numbers of the replicated one, an eighth of its memory on each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drep_jax.parallel import devices
from drep_jax.training.optimizers import OPTIMIZERS, make_optimizer
from drep_jax.training.state import collected, create_state, frozen_state, make_step, partitioned, placed
from tests.command import same_bits

PARAMS = {
    "denoise": {
        "kernel": jnp.linspace(-1, 1, 35).reshape(5, 7),
        "bias": jnp.linspace(0, 1, 7),
        "scale": jnp.float32(0.5),
    },
    "backbone": {"kernel": jnp.ones((7, 3))},
}
BATCH = {"x": np.linspace(-1, 1, 16 * 5, dtype=np.float32).reshape(16, 5)}


def loss_fn(params, others, batch, key):
    denoise = params["denoise"]
    y = jnp.tanh(batch["x"] @ denoise["kernel"] + denoise["bias"][None]) * denoise["scale"]
    loss = jnp.mean(jnp.square(y @ params["backbone"]["kernel"] - 1.0))
    return 30.0 * loss, ({}, others)


def trained(name, sharded, steps=3, start=None, **options):
    own = make_optimizer(name, learning_rate=0.05, steps=10, sharded=sharded, **options)
    tx = partitioned(own, ("denoise",))
    frozen = {"backbone": PARAMS["backbone"]}
    state = create_state({"denoise": PARAMS["denoise"]}, {}, tx, frozen, jax.random.key(0), averaged=("denoise",))
    many, kept = placed(start or state, sharded=sharded), devices.replicate(frozen)
    step = make_step(loss_fn, tx, ema=0.5, sharded=sharded)
    for _ in range(steps):
        many, _ = step(many, kept, devices.shard(BATCH))
    return many, collected(many, state, sharded=sharded)


def close(one, other):
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_sharded_steps_are_the_replicated_ones(name, clip):
    options = {"clip": clip, "weight_decay": 0.0 if name == "adam" else 0.3}
    (_, plain), (_, sharded) = (trained(name, sharded, **options) for sharded in (False, True))
    assert jax.tree_util.tree_structure(plain) == jax.tree_util.tree_structure(sharded)
    close(plain, sharded)
    assert np.abs(plain.params["denoise"]["kernel"] - PARAMS["denoise"]["kernel"]).max() > 0.01


def test_each_device_keeps_its_share():
    many, _ = trained("adam", True, steps=1)
    sizes = [leaf.shape for leaf in jax.tree_util.tree_leaves(many.opt_state) if leaf.ndim > 1]
    assert sorted(sizes) == sorted([(8, 5, 1), (8, 1)] * 2)  # 35 numbers in eighths of 5, 7 in eighths of 1


def test_what_is_saved_goes_on_divided_or_not():
    _, halfway = trained("adam", True, steps=2)
    finals = [trained("adam", sharded, steps=2, start=halfway)[1] for sharded in (False, True)]
    close(*finals)
    close(finals[0], trained("adam", False, steps=4)[1])
    many = placed(halfway, sharded=True)
    assert same_bits(collected(many, halfway, sharded=True), jax.tree_util.tree_map(np.asarray, halfway))


def test_the_subtree_that_is_held_stays():
    each = {n: make_optimizer("adam", learning_rate=0.05, steps=10, sharded=True) for n in PARAMS}
    tx = partitioned({"denoise": each["denoise"], "backbone": frozen_state(each["backbone"])}, tuple(PARAMS))
    state = create_state(PARAMS, {}, tx, {}, jax.random.key(0))
    step = make_step(loss_fn, tx, active=("denoise",), sharded=True)
    many, _ = step(placed(state, sharded=True), {}, devices.shard(BATCH))
    after = collected(many, state, sharded=True)
    assert same_bits(after.params["backbone"], jax.tree_util.tree_map(np.asarray, PARAMS["backbone"]))
    assert not np.any(optax.tree_utils.tree_get(after.opt_state.inner_states["backbone"], "mu")["backbone"]["kernel"])
    assert np.any(after.params["denoise"]["kernel"] != PARAMS["denoise"]["kernel"])
