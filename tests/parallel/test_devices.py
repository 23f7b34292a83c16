"""Eight devices compute what one does: same losses, gradients, batch statistics and updates for the same batch."""

import ast
import copy
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import drep_jax
from drep_jax.core.denoisers import init_denoise
from drep_jax.data.augment import Augmentation
from drep_jax.data.loader import normalize, training_batches
from drep_jax.jobs import train
from drep_jax.learners.losses import denoising_objective
from drep_jax.parallel import devices
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.tasks.losses import cross_entropy
from drep_jax.training.logging import MetricWriter
from drep_jax.training.optimizers import make_optimizer
from drep_jax.training.state import create_state, make_step, partitioned
from tests.command import largest_difference
from tests.tiny_config import RESNET, get_config

STEPS = 3


@pytest.mark.parametrize("tokens", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_label_free_steps_on_eight_devices_are_those_on_one(tokens):
    config = get_config().to_dict()
    setup = build(config)
    variables = setup.backbone.init(jax.random.key(0), jnp.zeros(setup.images.shape))
    options = {"loss": "l2", "tokens": tokens, "compute": "float32", "remat": False}
    key = jax.random.key(5)
    denoise = init_denoise(setup.sites)
    batches = [b for b, _ in zip(training_batches(setup.train, 32, seed=0), range(STEPS), strict=False)]

    tx = partitioned(make_optimizer("adam", learning_rate=0.1, steps=10), ("denoise",))
    frozen = {"backbone": variables["params"]}
    step = make_step(lambda *a: denoising_objective(setup, options, *a), tx)
    many = devices.replicate(create_state({"denoise": denoise}, {}, tx, frozen, key))
    losses = []
    for batch in batches:
        many, metrics = step(many, devices.replicate(frozen), devices.shard(batch))
        losses.append(float(devices.unreplicate(metrics)["loss"]))

    plain = optax.adam(optax.cosine_decay_schedule(0.1, 10))

    @jax.jit
    def reference(denoise, state, batch, number):
        def objective(denoise):
            params = {"backbone": variables["params"], "denoise": denoise}
            return denoising_objective(setup, options, params, {}, batch, jax.random.fold_in(key, number))[0]

        loss, grads = jax.value_and_grad(objective)(denoise)
        updates, state = plain.update(grads, state, denoise)
        return optax.apply_updates(denoise, updates), state, loss

    expected, state, wanted = denoise, plain.init(denoise), []
    for number, batch in enumerate(batches):
        expected, state, loss = reference(expected, state, batch, number)
        wanted.append(float(loss))

    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert losses[0] != losses[-1]
    found = devices.unreplicate(many).params["denoise"]
    assert largest_difference(found, denoise) > 0.1  # Adam has moved by its rate a step
    assert largest_difference(found, expected) < 2e-3


def test_labelled_steps_share_batch_statistics_among_the_devices(tmp_path):
    config = copy.deepcopy(get_config().to_dict())
    config["model"] = dict(RESNET)
    config["denoise"]["steps"] = 1
    config["backbone"].update(steps=STEPS, batch_size=32, optimizer="sgd", learning_rate=0.1, warmup=0)
    setup = build(config)
    fresh = setup.backbone.init(jax.random.key(0), jnp.zeros(setup.images.shape))
    writer = MetricWriter(os.fspath(tmp_path))
    trained = train.train_labeled(Run(config, setup, os.fspath(tmp_path), writer), "backbone", fresh)[0]
    writer.close()

    plain = make_optimizer("sgd", learning_rate=0.1, steps=STEPS)

    @jax.jit
    def reference(variables, state, batch):
        def objective(params):
            images = normalize(batch["image"], setup.mean, setup.std)
            logits, updated = setup.backbone.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return cross_entropy(logits, batch), updated

        grads, updated = jax.grad(objective, has_aux=True)(variables["params"])
        updates, state = plain.update(grads, state, variables["params"])
        return {**updated, "params": optax.apply_updates(variables["params"], updates)}, state

    expected, state = dict(fresh), plain.init(fresh["params"])
    batches = training_batches(setup.train, 32, seed=0, augmentation=Augmentation(shift=1))
    for batch, _ in zip(batches, range(STEPS), strict=False):
        expected, state = reference(expected, state, batch)
    for part in ("params", "batch_stats"):
        assert largest_difference(expected[part], fresh[part]) > 1e-2
        assert largest_difference(trained[part], expected[part]) < 1e-4


def test_no_other_module_names_pmap():
    package = pathlib.Path(drep_jax.__file__).parent
    users = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            attribute = isinstance(node, ast.Attribute) and node.attr == "pmap"
            name = isinstance(node, ast.Name) and node.id == "pmap"
            imported = isinstance(node, ast.ImportFrom) and any(alias.name == "pmap" for alias in node.names)
            if attribute or name or imported:
                users.add(str(path.relative_to(package)))
    assert users == {os.path.join("parallel", "devices.py")}
