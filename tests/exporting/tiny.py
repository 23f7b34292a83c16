"""Tiny networks of every family for the tests of exports."""

import jax
import jax.numpy as jnp

from drep_jax.models import create_model
from tests.trees import randomize, zeros

SIZE = (8, 12)
TINY_VIT = {"patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12}
TINY_RESNET = {"stage_sizes": (1, 1), "width": 4}
FAMILIES = {
    "vit": ("vit", TINY_VIT),
    "vit, scan and remat, mean pool": ("vit", {**TINY_VIT, "scan": True, "remat": True, "pool": "mean"}),
    "vit, bfloat16": ("vit", {**TINY_VIT, "depth": 1, "dtype": "bfloat16"}),
    "swinv2": ("swinv2", {"width": 4, "depths": (2, 1), "num_heads": (2, 4), "window_size": (2, 3), "patch_size": 2}),
    "vmamba": ("vmamba", {"depths": (1, 1), "width": 8, "ssm_ratio": 1.0}),
    "resnet, bottleneck": ("resnet", {**TINY_RESNET, "block": "bottleneck"}),
    "resnet, basic, cifar": ("resnet", {**TINY_RESNET, "block": "basic", "stem": "cifar", "shortcut": "pad"}),
}


def network(name, overrides):
    """A tiny network with nothing at zero or one, batch statistics included."""
    module = create_model(name, num_classes=5, image_size=SIZE, **overrides)
    variables = zeros(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3))))
    variables = randomize(variables)
    if "batch_stats" in variables:
        stats = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.abs(leaf) + 0.5 if path[-1].key == "var" else leaf, variables["batch_stats"]
        )
        variables = {**variables, "batch_stats": stats}
    return module, variables
