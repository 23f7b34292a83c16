"""Folds inference BatchNorm into the linear layer before it: (W, b, γ, β, μ, v) ↦ (W', b').

    BN(Wx + b) = γ·(Wx + b − μ)/√(v + ε) + β = W'x + b'
    with  W' = W·γ/√(v + ε),  b' = (b − μ)·γ/√(v + ε) + β

The BatchNorm stays in the tree with μ = 0, v = 1 − ε, γ = 1, so the same module reads the same
tree. A layer with a bias takes all of b' and leaves β = 0: the BatchNorm does nothing. Without a
bias, the constant stays in β, or in −μ if there is no β. The traced equations show which layer a
BatchNorm follows: it must read the layer's output unchanged, and nothing else may read it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from drep_jax.core.batchnorm import Fold, Folds, find_folds
from drep_jax.errors import ExportError
from drep_jax.trees import check_finite, get_in, set_in
from drep_jax.typing import Tree

__all__ = ["Fold", "Folds", "find_folds", "fold_batchnorm", "folded_leaves", "unit_variance"]


def fold_batchnorm(variables: Tree, folds: Folds, *, round_back: bool = True) -> Tree:
    """Folds in float64; returns variables of the same structure, as NumPy arrays.

    Args:
      variables: {"params": …, "batch_stats": …} of the module that `folds` was found in, fused or
        not.
      folds: from `find_folds`.
      round_back: whether to cast the result to the types of `variables`; False leaves the changed
        leaves in float64.

    Raises:
      ExportError: if there is nothing to fold, or the variables belong to another network.
      NonFiniteError: if a weight becomes too large for its type, as with a variance near 0.
    """
    if not folds.found:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in folds.left.items())
        raise ExportError(f"This network has no BatchNorm that can be folded into the layer before it.{reasons}")
    params, stats = variables["params"], variables.get("batch_stats", {})
    for fold in folds.found:
        nodes = [get_in(tree, path) for tree, path in ((params, fold.layer.path), (stats, fold.norm))]
        if any(not isinstance(node, Mapping) for node in nodes) or not {"mean", "var"} <= nodes[1].keys():
            raise ExportError(
                f"The variables have no {fold.layer.name} or no statistics of {'/'.join(fold.norm)}: they belong to "
                "another network than the one in which the BatchNorms were found."
            )
        layer, norm, moments = folded_leaves(fold, nodes[0], get_in(params, fold.norm) or {}, nodes[1], round_back)
        params = set_in(params, fold.layer.path, {**nodes[0], **layer})
        if norm:
            params = set_in(params, fold.norm, norm)
        stats = set_in(stats, fold.norm, moments)
    new = jax.tree_util.tree_map(np.asarray, {**variables, "params": params, "batch_stats": stats})
    check_finite(new, "Refusing to fold BatchNorm")
    # in the same kinds of mappings as `variables`
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(variables), jax.tree_util.tree_leaves(new))


def folded_leaves(
    fold: Fold, layer: Tree, norm: Tree, moments: Tree, round_back: bool = True
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the new leaves of a layer, of its BatchNorm, and of the BatchNorm's statistics."""
    epsilon = fold.module.epsilon
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in {**layer, **norm, **moments}.items() if name != "bias"}
    gain = wide.get("scale", 1.0) / np.sqrt(wide["var"] + epsilon)
    shift = (np.asarray(norm["bias"], np.float64) if "bias" in norm else 0.0) - wide["mean"] * gain

    def spread(vector: Any, leaf: Any) -> Any:
        """Reshapes a vector along the last axis, stacked or not, to broadcast against a leaf."""
        lead = vector.shape[:-1]
        return vector.reshape(*lead, *(1,) * (leaf.ndim - len(lead) - 1), vector.shape[-1])

    new_layer = {"kernel": wide["kernel"] * spread(gain, wide["kernel"])}
    new_norm = {name: np.full(leaf.shape, float(name == "scale")) for name, leaf in norm.items()}
    new_moments = {"mean": np.zeros_like(wide["mean"]), "var": np.full_like(wide["var"], 1.0 - epsilon)}
    if "bias" in layer:
        bias = np.asarray(layer["bias"], np.float64)
        new_layer["bias"] = bias * spread(gain, bias) + spread(shift, bias)
    elif "bias" in norm:
        new_norm["bias"] = shift
    else:
        new_moments["mean"] = -shift
    if round_back:
        with np.errstate(over="ignore"):  # the caller checks that all values are finite
            new_layer = {name: leaf.astype(layer[name].dtype) for name, leaf in new_layer.items()}
            new_norm = {name: leaf.astype(norm[name].dtype) for name, leaf in new_norm.items()}
            new_moments = {name: leaf.astype(moments[name].dtype) for name, leaf in new_moments.items()}
    new_moments["var"] = np.full_like(new_moments["var"], unit_variance(epsilon, new_moments["var"].dtype))
    return new_layer, new_norm, new_moments


def unit_variance(epsilon: float, dtype: Any) -> Any:
    """Returns the number v nearest to 1 − ε with v + ε = 1 in the arithmetic of `dtype`."""
    dtype = np.dtype(dtype)
    near = np.asarray(1.0 - epsilon, dtype)
    one = np.ones((), dtype)
    choices = (near, np.nextafter(near, one), np.nextafter(near, -one))
    return next((v for v in choices if np.add(v, np.asarray(epsilon, dtype)) == one), near)
