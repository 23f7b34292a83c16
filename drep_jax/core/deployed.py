"""The weights that are deployed, beside those that fusing gives: their rounding, and their structure."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.precision import SAFETY
from drep_jax.core.sites import Site
from drep_jax.errors import FusionError
from drep_jax.typing import Tree


def deployed_part(stored: Tree, fused: Tree | None, statistics: Tree | None, sites: Sequence[Site]) -> Tree:
    """Returns the collections to certify: those given, and `stored` for the others.

    Raises:
      FusionError: for parameters without the running means that were fused with them.
    """
    norms = [layer.norm for site in sites for layer in site.layers if layer.norm is not None]
    if norms and fused is not None and statistics is None:
        raise FusionError(
            f"These sites have constants in running means ({'/'.join(norms[0])}), which belong to the fused parameters: give "
            'certify their "batch_stats" with fused_statistics=.'
        )
    given = {"params": fused, "batch_stats": statistics}
    return {**stored, **{name: tree for name, tree in given.items() if tree is not None}}


def undo_rounding(exact: Tree, stored: Tree, deployed: Tree, base: Tree) -> Tree:
    """Returns `deployed` with `exact` in place of every leaf that differs from it by rounding only.

    Rounding is ‖deployed − exact‖ ≤ ‖stored − exact‖ + 32·ε·(‖base‖ + ‖exact‖), with ε of the
    arithmetic of `fuse`.

    Args:
      exact: fused weights in float64.
      stored: `exact`, rounded once to the types of `base`.
      deployed: the weights to look at.
      base: the backbone's weights.
    """
    if not (_same_tree(stored, deployed) and _forms(stored) == _forms(deployed)):
        return exact  # `structure_kept` refuses these

    def choose(exact: Any, stored: Any, deployed: Any, base: Any) -> Any:
        if not jnp.issubdtype(stored.dtype, jnp.floating):
            return deployed
        epsilon = float(jnp.finfo(jnp.promote_types(stored.dtype, jnp.float32)).eps)
        stored, wide, base = (np.asarray(leaf).astype(np.float64) for leaf in (stored, deployed, base))
        slack = SAFETY * epsilon * (np.linalg.norm(base) + np.linalg.norm(exact))
        return exact if np.linalg.norm(wide - exact) <= np.linalg.norm(stored - exact) + slack else wide

    return jax.tree_util.tree_map(choose, exact, stored, deployed, base)


def _same_tree(before: Tree, after: Tree) -> bool:
    trees: list[Any] = [jax.tree_util.tree_structure(tree) for tree in (before, after)]
    return trees[0] == trees[1]


def _forms(tree: Tree) -> list[Any]:
    return [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(tree)]


def structure_kept(backbone: nn.Module, before: Tree, after: Tree, args: Any, kwargs: Any) -> dict[str, bool]:
    """Compares the structure of two sets of variables of a backbone.

    Returns:
      "same_tree", "same_dtypes" (shapes included), and "same_program": whether they compile to the
      same optimized program, to the letter.
    """
    same_tree, same_dtypes = _same_tree(before, after), _forms(before) == _forms(after)
    same_program = False
    if same_tree and same_dtypes:
        apply = jax.jit(lambda variables, args: backbone.apply(variables, *args, **kwargs))

        def shapes(tree: Tree) -> Tree:  # without the device that an array is on
            return jax.tree_util.tree_map(
                lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree
            )

        # Both in one line: the text of a program names the source line that compiled it.
        one, two = (apply.lower(shapes(variables), shapes(args)).compile().as_text() for variables in (before, after))
        same_program = one is not None and one == two
    return {"same_tree": same_tree, "same_dtypes": same_dtypes, "same_program": same_program}
