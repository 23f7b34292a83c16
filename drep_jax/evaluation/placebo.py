"""The placebo arm: random maps of the learned denoisers' norms, fused at the same sites."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from drep_jax.core.fusion import composed_maps
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.trees import set_in
from drep_jax.typing import Tree


def placebo_denoisers(
    params: Tree,
    sites: Sequence[Site],
    schedule: Schedule,
    key: jax.Array,
    *,
    rule: str | None = None,
    steps: int | None = None,
) -> Tree:
    """Returns random denoisers for rule "affine" with the norms of the learned ones.

    The learned map of a site is x̂ = x + x·M + c. Its placebo is x̂ = x + x·R + r with Gaussian R
    and r, scaled to ‖R‖_F = ‖M‖_F and ‖r‖ = ‖c‖ in each group and stacked copy. The gain of
    learning is the gain over the placebo.

    Args:
      params: {"backbone": parameters, "denoise": the learned denoisers, a subtree or `Denoisers`}.
      sites: of the denoisers.
      schedule: noise schedule.
      key: of the random maps.
      rule, steps: of a plain subtree, see `drep_jax.core.fusion.fuse`.

    Returns:
      A `denoise` subtree.
    """
    tree: Tree = {}
    for number, (site, learned) in enumerate(
        (site, composed_maps(params, [site], schedule, rule=rule, steps=steps)[site.path]) for site in sites
    ):
        keys = jax.random.split(jax.random.fold_in(key, number), 2)
        leaves = {"kernel": -_same_norm(keys[0], learned["matrix"], 2)}  # "affine" subtracts the output
        if "constant" in learned:
            leaves["bias"] = -_same_norm(keys[1], learned["constant"], 1)
        tree = set_in(tree, site.path, leaves)
    return tree


def _same_norm(key: jax.Array, like: jax.Array, rank: int) -> jax.Array:
    axes = tuple(range(-rank, 0))
    noise = jax.random.normal(key, like.shape, like.dtype)
    norm, target = (jnp.sqrt(jnp.sum(jnp.square(v), axis=axes, keepdims=True)) for v in (noise, like))
    return noise * (target / norm)
