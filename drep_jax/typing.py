"""Types that many modules share, each defined once."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array of JAX or NumPy."""

Tree = Any
"""A nested dict of arrays: parameters, variables, a `denoise` subtree."""

Config = Mapping[str, Any]
"""A configuration, or a section of it, as nested mappings."""

Path = tuple[str, ...]
"""The keys that lead to a node of a tree: `("block_0", "mlp", "fc1")`."""

Scores = dict[str, np.ndarray]
"""Metric ↦ one number per item, (n,)."""

Batch = dict[str, np.ndarray]
"""Column ↦ values, first axis (batch,)."""
