"""Trees of arrays that benchmarks keep in files, so that a script goes on where it was ended."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from drep_jax.trees import set_in


def kept(path: str, make: Callable[[], Any]) -> Any:
    """Returns the tree of arrays, numbers and texts in a file, which is made if it is not there.

    Numbers and texts come back as arrays of no dimension. An ended script leaves no part of a file.

    Args:
      path: of the file, ".npz"; its folder is made. Without a path nothing is kept.
      make: gives the tree of nested dicts, whose keys have no "/".
    """
    if not path:
        return make()
    if not os.path.exists(path):
        began = time.perf_counter()
        leaves = jax.tree_util.tree_leaves_with_path(make())
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".part", "wb") as file:
            np.savez(file, **{"/".join(key.key for key in where): np.asarray(leaf) for where, leaf in leaves})
        os.replace(path + ".part", path)
        print(f"{os.path.basename(path)}: {time.perf_counter() - began:.0f} s", flush=True)
    tree: Any = {}
    with np.load(path) as arrays:
        for where in arrays.files:
            tree = set_in(tree, tuple(where.split("/")), arrays[where])
    return tree
