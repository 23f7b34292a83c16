"""The optimiser's state divided among the devices (ZeRO, stage 1, Rajbhandari et al. 2020): each updates its own slice.

A leaf of n numbers is padded and cut into as many slices as there are devices. A step adds up each slice's gradients on its own
device only (reduce-scatter), updates that slice of the parameters, and gathers the slices on all devices: the bytes of one
all-reduce, and of Adam's two averages each device keeps its share. Scalars are kept whole. Checkpoints hold the state in one
piece, so a run goes on with another number of devices, divided or not.
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
    """Gives a slice two axes where its leaf had several: optimisers tell matrices from vectors by that."""
    return flat[:, None] if rank > 1 else flat


def own(tree: Tree) -> Tree:
    """Returns this device's slice of every leaf of a tree that all devices have; inside `on_devices`."""

    def one(leaf: Any) -> Any:
        if leaf.ndim == 0:
            return leaf
        flat = _flat(leaf).reshape(devices.axis_size(), -1)
        return _formed(jax.lax.dynamic_index_in_dim(flat, devices.device_index(), keepdims=False), leaf.ndim)

    return jax.tree_util.tree_map(one, tree)


def mean_own(tree: Tree) -> Tree:
    """Returns this device's slice of the devices' mean of a tree; inside `on_devices`."""

    def one(leaf: Any) -> Any:
        if leaf.ndim == 0:
            return devices.mean(leaf)
        return _formed(devices.scattered_total(_flat(leaf)) / devices.axis_size(), leaf.ndim)

    return jax.tree_util.tree_map(one, tree)


def whole(slices: Tree, like: Tree) -> Tree:
    """Puts all devices' slices together, in the shapes of `like`; inside `on_devices`."""

    def one(mine: Any, like: Any) -> Any:
        shape = np.shape(like)
        if not shape:
            return mine
        return devices.gathered(mine.reshape(-1))[: int(np.prod(shape))].reshape(shape)

    return jax.tree_util.tree_map(one, slices, like)


def divide(opt_state: Tree) -> Tree:
    """Returns an optimiser's state, given in one piece on the host, with its slices on the devices."""
    cut = devices.on_devices(lambda _, same: own(same), in_axes=(0, None))
    return cut(np.arange(devices.local_device_count()), opt_state)


def collect(opt_state: Tree, like: Tree) -> Tree:
    """Inverse of `divide`, in the shapes of `like`, as NumPy arrays; with several hosts each has to call it."""
    shapes = jax.tree_util.tree_map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), like)
    return devices.unreplicate(devices.on_devices(lambda slices: whole(slices, shapes))(opt_state))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Returns `optax.clip_by_global_norm` for gradients of which every device has a slice; scalars are on all of them."""

    def update(grads: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        del params
        leaves = jax.tree_util.tree_leaves(grads)
        sliced = sum((jnp.sum(jnp.square(leaf)) for leaf in leaves if leaf.ndim), start=jnp.float32(0))
        scalars = sum((jnp.square(leaf) for leaf in leaves if not leaf.ndim), start=jnp.float32(0))
        norm = jnp.sqrt(devices.total(sliced) + scalars)
        scale = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree_util.tree_map(lambda leaf: leaf * scale.astype(leaf.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
