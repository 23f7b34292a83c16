"""The method works for callers who are strict about types of numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import drep_jax


class Net(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))


def test_strict_promotion_of_the_caller_is_no_obstacle():
    module, images, schedule = Net(), jnp.ones((6, 2, 5)), drep_jax.Schedule()
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(jax.dtypes.TypePromotionError):
            jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)
        variables = module.init(jax.random.key(0), images)
        sites = drep_jax.find_sites(module, images)
        denoise = jax.tree_util.tree_map(lambda leaf: leaf + 0.01, drep_jax.init_denoise(sites))
        fused = drep_jax.fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, schedule)
        assert jax.tree_util.tree_structure(fused) == jax.tree_util.tree_structure(variables["params"])
        explicit = functools.partial(drep_jax.explicit_apply, module, variables, denoise, sites, schedule)
        assert jax.eval_shape(explicit, images).shape == (6, 2, 3)
        losses = functools.partial(drep_jax.algorithm1_losses, module, variables, denoise, sites, schedule)
        assert len(jax.eval_shape(losses, jax.random.key(1), jnp.arange(6), images)) == len(sites)
        assert jax.config.jax_numpy_dtype_promotion == "strict"
