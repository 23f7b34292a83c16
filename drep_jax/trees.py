"""Nested dicts of arrays: reading and replacing at a path, and whether all numbers are finite."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.errors import NonFiniteError
from drep_jax.typing import Path, Tree


def get_in(tree: Tree, path: Path) -> Tree:
    """Returns the node at `path`, or None.

    >>> get_in({"mlp": {"fc1": {"bias": 3}}}, ("mlp", "fc1")), get_in({}, ("mlp", "fc1"))
    ({'bias': 3}, None)
    """
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def set_in(tree: Tree, path: Path, value: Tree) -> dict[str, Any]:
    """Returns a copy of a nested mapping with `value` at `path`; all else is shared.

    >>> set_in({"mlp": {"fc1": 1}}, ("mlp", "fc2"), 2)
    {'mlp': {'fc1': 1, 'fc2': 2}}
    """
    head, *rest = path
    below = set_in(tree.get(head, {}), tuple(rest), value) if rest else value
    return {**tree, head: below}


def check_finite(tree: Tree, what: str) -> None:
    """Raises `NonFiniteError` naming the first leaf of `tree` that holds NaN or Inf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            continue
        if isinstance(leaf, jax.Array) and any(device.platform != "cpu" for device in leaf.devices()):
            with jax.ensure_compile_time_eval():  # so that concrete numbers can be read inside a trace
                finite = bool(jnp.isfinite(leaf).all())
        else:  # NumPy compiles nothing
            with np.errstate(over="ignore"):
                finite = bool(np.isfinite(np.asarray(leaf).astype(dtype, copy=False)).all())
        if not finite:
            name = "/".join(str(getattr(k, "key", k)) for k in path)
            raise NonFiniteError(f"{what}: {name or 'value'} contains NaN or Inf.")
