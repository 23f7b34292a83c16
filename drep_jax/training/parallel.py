"""Data parallelism over the local devices: the only module that names `jax.pmap`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from drep_jax.errors import ConfigError

Tree = Any
AXIS = "devices"


def device_count() -> int:
    """Returns the number of local devices that a batch is divided among."""
    return jax.local_device_count()


def check_batch(size: int, what: str) -> None:
    """Raises `ConfigError` unless a batch divides evenly; `pmap` would silently leave devices idle."""
    if size < 1 or size % device_count():
        raise ConfigError(f"{what}={size} must be a positive multiple of the {device_count()} local devices.")


def replicate(tree: Tree) -> Tree:
    """Returns `tree` on every local device, laid out as what `on_devices` returns, so that a second step compiles nothing."""
    return _copies()(np.arange(device_count()), tree)


@functools.cache
def _copies() -> Callable[..., Any]:
    return jax.pmap(lambda _, same: same, axis_name=AXIS, in_axes=(0, None))


def unreplicate(tree: Tree) -> Tree:
    """Returns the first device's copy, as NumPy arrays of their own (on a CPU a view would share the donated buffer)."""
    return jax.tree_util.tree_map(lambda leaf: np.array(leaf.addressable_shards[0].data)[0], tree)


def host_sum(leaf: Any) -> np.ndarray:
    """Adds up an array's copies on all devices of all hosts, in float64, and returns the sum on every host."""
    local = np.sum([np.asarray(piece.data, np.float64)[0] for piece in leaf.addressable_shards], axis=0)
    if jax.process_count() == 1:
        return local
    # Hosts exchange float32 only; what the first number leaves out of a float64, a second one holds.
    high = local.astype(np.float32)
    both = np.stack([high, (local - high).astype(np.float32)])
    return np.sum(np.asarray(multihost_utils.process_allgather(both), np.float64), axis=(0, 1))


def shard(batch: Tree) -> Tree:
    """Splits the first axis of every array among the local devices: (B, …) to (devices, B / devices, …)."""
    return jax.tree_util.tree_map(lambda leaf: leaf.reshape(device_count(), -1, *leaf.shape[1:]), batch)


def unshard(tree: Tree) -> Tree:
    """Inverse of `shard`, as NumPy arrays."""
    return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)


def device_index() -> Any:
    """Returns the number of this device, to be called inside a function given to `on_devices`."""
    return jax.lax.axis_index(AXIS)


def mean(tree: Tree) -> Tree:
    """Averages over the devices; to be called inside a function given to `on_devices`."""
    return jax.lax.pmean(tree, AXIS)


def on_devices(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles `function` to run on every local device, each on its own slice of the arguments' first axis."""
    return jax.pmap(function, axis_name=AXIS, **options)
