"""Sharded optimizer state: each device keeps and updates one slice.

This is stage 1 of ZeRO (Rajbhandari et al. 2020). A leaf of n numbers is padded and cut into one
slice per device. A step sums the gradients of each slice on its device (reduce-scatter), updates
that slice of the parameters, and gathers the slices on all devices. This moves the bytes of one
all-reduce, and each device holds its slice of Adam's two averages instead of the whole. Scalars are
not cut. Checkpoints hold the state in one piece, so a run can resume on another number of devices,
sharded or not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from drep_jax.parallel import devices
from drep_jax.typing import Tree


def _flat(leaf: Any) -> Any:
    return jnp.pad(leaf.reshape(-1), (0, -leaf.size % devices.axis_size()))


def _formed(flat: Any, rank: int) -> Any:
    """Gives a slice of a matrix two axes: optimizers tell matrices from vectors by their rank."""
    return flat[:, None] if rank > 1 else flat


def local_slice(tree: Tree) -> Tree:
    """Returns this device's slice of every leaf of a replicated tree; inside `on_devices`."""

    def one(leaf: Any) -> Any:
        if leaf.ndim == 0:
            return leaf
        flat = _flat(leaf).reshape(devices.axis_size(), -1)
        return _formed(jax.lax.dynamic_index_in_dim(flat, devices.device_index(), keepdims=False), leaf.ndim)

    return jax.tree_util.tree_map(one, tree)


def mean_slice(tree: Tree) -> Tree:
    """Returns this device's slice of the mean of a tree over all devices; inside `on_devices`."""

    def one(leaf: Any) -> Any:
        if leaf.ndim == 0:
            return devices.mean(leaf)
        return _formed(devices.scattered_total(_flat(leaf)) / devices.axis_size(), leaf.ndim)

    return jax.tree_util.tree_map(one, tree)


def gathered(slices: Tree, like: Tree) -> Tree:
    """Joins the slices of all devices, in the shapes of `like`; inside `on_devices`."""

    def one(local: Any, like: Any) -> Any:
        shape = np.shape(like)
        if not shape:
            return local
        return devices.gathered(local.reshape(-1))[: int(np.prod(shape))].reshape(shape)

    return jax.tree_util.tree_map(one, slices, like)


def shard_state(opt_state: Tree) -> Tree:
    """Moves an optimizer's state from the host to the devices, one slice on each."""
    shard = devices.on_devices(lambda _, same: local_slice(same), in_axes=(0, None))
    return shard(np.arange(devices.local_device_count()), opt_state)


def gather_state(opt_state: Tree, like: Tree) -> Tree:
    """Inverse of `shard_state`: NumPy arrays in the shapes of `like`.

    Every host of a run must call it.
    """
    shapes = jax.tree_util.tree_map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), like)
    return devices.unreplicate(devices.on_devices(lambda slices: gathered(slices, shapes))(opt_state))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Returns `optax.clip_by_global_norm` for gradients in slices; scalars are on all devices.

    Args:
      limit: largest norm, in units of the gradient.
    """

    def update(grads: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        del params
        leaves = jax.tree_util.tree_leaves(grads)
        sliced = sum((jnp.sum(jnp.square(leaf)) for leaf in leaves if leaf.ndim), start=jnp.float32(0))
        scalars = sum((jnp.square(leaf) for leaf in leaves if not leaf.ndim), start=jnp.float32(0))
        norm = jnp.sqrt(devices.total(sliced) + scalars)
        scale = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree_util.tree_map(lambda leaf: leaf * scale.astype(leaf.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
