"""Masks: only the trainable subtree gets gradients and updates; optimizers against their first steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.parallel import devices
from drep_jax.training.optimizers import OPTIMIZERS, make_optimizer
from drep_jax.training.state import create_state, make_step, partitioned, split

PARAMS = {
    "backbone": {"kernel": jnp.arange(12.0).reshape(3, 4) / 7, "bias": jnp.ones(4)},
    "denoise": {"kernel": jnp.full((3, 3), 0.1), "bias": jnp.zeros(3)},
}
BATCH = {"x": np.linspace(-1, 1, 16 * 3, dtype=np.float32).reshape(16, 3)}


def loss_fn(params, others, batch, key):
    out = batch["x"] @ params["denoise"]["kernel"] + params["denoise"]["bias"][None]
    out = out @ params["backbone"]["kernel"] + params["backbone"]["bias"][None]
    return jnp.mean(jnp.square(out - jax.random.normal(key, (1, 4)))), ({}, others)


def started(name="adam", trainable=("denoise",), **options):
    tx = partitioned(make_optimizer(name, learning_rate=0.1, steps=10, **options), trainable)
    chosen, frozen = split(PARAMS, trainable)
    return create_state(chosen, {}, tx, frozen, jax.random.key(3)), frozen, tx


def stepped(state, frozen, tx, loss=loss_fn, steps=1, batch=BATCH):
    step = make_step(loss, tx)
    many, kept = devices.replicate(state), devices.replicate(frozen)
    for _ in range(steps):
        many, metrics = step(many, kept, devices.shard(batch))
    return devices.unreplicate(many), devices.unreplicate(metrics)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("trainable", [("denoise",), ("backbone",), ("backbone", "denoise")])
def test_exactly_the_trainable_parameters_change(name, trainable):
    state, frozen, tx = started(name, trainable)
    after, _ = stepped(state, frozen, tx, steps=2)
    assert set(after.params) == set(trainable) and int(after.step) == 2
    for part in trainable:
        for leaf in PARAMS[part]:
            assert np.abs(after.params[part][leaf] - PARAMS[part][leaf]).min() > 1e-4


def test_no_backward_pass_runs_through_frozen_parameters():
    @jax.custom_vjp
    def frozen_layer(kernel, x):
        return x @ kernel

    def backward(kept, g):
        raise RuntimeError("the gradient of a frozen layer was computed")

    frozen_layer.defvjp(lambda kernel, x: (x @ kernel, ()), backward)

    def first_the_backbone(params, others, batch, key):
        clean = frozen_layer(params["backbone"]["kernel"], batch["x"])[:, :3]
        out = clean @ params["denoise"]["kernel"]
        return jnp.mean(jnp.square(out - 1.0)), ({}, others)

    stepped(*started(trainable=("denoise",)), loss=first_the_backbone)
    with pytest.raises(RuntimeError, match="was computed"):
        stepped(*started(trainable=("backbone",)), loss=first_the_backbone)


def test_every_step_has_a_key_of_its_own_and_the_run_can_be_repeated():
    state, frozen, tx = started()

    def key_only(params, others, batch, key):
        return jnp.sum(params["denoise"]["bias"]), ({"drawn": jax.random.normal(key)}, others)

    drawn = [float(stepped(state, frozen, tx, key_only, steps)[1]["drawn"]) for steps in (1, 2, 3, 3)]
    assert len(set(drawn)) == 3 and drawn[2] == drawn[3]


def gradient_step(name, gradient, **options):
    """The first update of leaves {"kernel", "bias"} by an optimizer, for gradients that are the same everywhere."""
    tx = make_optimizer(name, **{"learning_rate": 0.1, "steps": 10, **options})
    params = PARAMS["denoise"]
    grads = jax.tree_util.tree_map(lambda leaf: jnp.full_like(leaf, gradient), params)
    return tx.update(grads, tx.init(params), params)[0]


def test_first_steps_of_the_optimizers():
    np.testing.assert_allclose(gradient_step("adam", 5.0)["kernel"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(gradient_step("sgd", 5.0)["kernel"], -0.1 * 1.9 * 5.0, rtol=1e-5)  # Nesterov
    decayed = gradient_step("adamw", 5.0, weight_decay=0.5)
    np.testing.assert_allclose(decayed["kernel"], -0.1 - 0.1 * 0.5 * 0.1, rtol=1e-5)
    np.testing.assert_allclose(decayed["bias"], -0.1, rtol=1e-5)  # vectors do not decay
    clipped = gradient_step("sgd", 5.0, clip=1.0)
    assert np.isclose(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in clipped.values())), 0.1 * 1.9, rtol=1e-5)
    assert not np.any(gradient_step("adam", 5.0, warmup=4)["kernel"])  # warm-up starts at a rate of zero


def test_learning_rate_ends_at_zero():
    tx = make_optimizer("sgd", learning_rate=1.0, steps=3)
    grads, state = {"w": jnp.ones(())}, tx.init({"w": jnp.zeros(())})
    sizes = []
    for _ in range(4):
        update, state = tx.update(grads, state, {"w": jnp.zeros(())})
        sizes.append(abs(float(update["w"])))
    assert sizes[0] > 1 and sizes[-1] == 0
