"""Every network that finds objects goes through the task: losses, objects, statistics, distillation; by tracing."""

import jax
import jax.numpy as jnp
import pytest

from drep_jax.models import create_model
from drep_jax.tasks.detection import Detection
from tests.models.detectors.networks import TINY, abstract

SMALL = {"depths": (1, 1, 1, 1), "width": 4, "pyramid_width": 8, "head_width": 8, "per_level": 20, "proposals": 16}
CASES = {**TINY, "faster_rcnn_r50": {**SMALL, "candidates": 50, "keep": 10}}

SHAPES = {
    "boxes": (jnp.float32, 4, 4),
    "classes": (jnp.int32, 4),
    "crowd": (jnp.bool_, 4),
    "ignore": (jnp.bool_, 4),
    "area": (jnp.float32, 4),
    "objects_valid": (jnp.bool_, 4),
    "transform": (jnp.int32, 42),
    "original_size": (jnp.int32, 2),
    "size": (jnp.int32, 2),
}


@pytest.mark.slow  # tests/tasks/test_tasks.py does the same for a network of darknet
@pytest.mark.parametrize("name", CASES)
def test_the_task_calls_what_networks_offer(name):
    task, count = Detection(padding=32), 2
    network = create_model(name, num_classes=5, image_size=(64, 64), **CASES[name])
    batch = {name: jax.ShapeDtypeStruct((count, *shape), dtype) for name, (dtype, *shape) in SHAPES.items()}
    images = jax.ShapeDtypeStruct((count, 64, 96, 3), jnp.float32)

    def run(variables, images, batch):
        key = {"dropout": jax.random.key(0)}
        clean = task.predict(network, variables, images, batch)
        loss, parts = task.loss(task.apply(network, variables, images, batch, train=False), batch, 0.0, {})
        trained, changed = task.apply(
            network, variables, images, batch, train=True, rngs=key, mutable=[*(variables.keys() - {"params"})]
        )

        def distance(params):
            return task.distillation_loss(task.predict(network, {**variables, "params": params}, images, batch), clean)

        return task.statistics(clean, batch), loss, parts, trained, changed, jax.grad(distance)(variables["params"])

    statistics, loss, parts, trained, _, gradient = jax.eval_shape(run, abstract(network), images, batch)
    assert statistics["truths"].shape == (count, 5, 4) and statistics["left_out"].shape == (count,)
    assert loss.shape == () and {f"{name}_loss" for name in trained} == parts.keys()
    assert jax.tree_util.tree_structure(gradient) == jax.tree_util.tree_structure(abstract(network)["params"])
