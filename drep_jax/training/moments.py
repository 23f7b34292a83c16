"""One pass over unlabelled images that gives the moments of every site, on all local devices."""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.closed_form import Moments, batch_sums, moments_from_sums
from drep_jax.errors import DataError
from drep_jax.sites import Path, Site
from drep_jax.training import parallel

Tree = Any


def collect_moments(
    backbone: nn.Module, variables: Tree, sites: Sequence[Site], batches: Iterable[tuple[Any, Any]]
) -> dict[Path, Moments]:
    """Accumulates the moments of every site; memory does not depend on the number of images.

    Each device sums in float32 around the first batch's mean, and carries what rounding drops from one batch to the next
    (compensated summation). The devices' sums are added once, at the end, in float64 on the host.

    Args:
      backbone, variables: the frozen backbone.
      sites: where to look.
      batches: (images, mask), normalised, (batch, …) and (batch,) with 0 for padding.

    Raises:
      DataError: if there is no image.
      NonFiniteError: for NaN or Inf in the features, naming the site.
    """
    origin = {site.name: jnp.zeros(site.denoiser_shape[:-1], jnp.float32) for site in sites}

    def centre(variables: Tree, images: Any, mask: Any) -> Any:
        sums = parallel.mean(batch_sums(backbone, variables, sites, origin, mask, images))
        return {name: s["first"] / _like(jnp.maximum(s["count"], 1.0 / 2), s["first"]) for name, s in sums.items()}

    def start(variables: Tree, shifts: Any, images: Any, mask: Any) -> Any:
        sums = batch_sums(backbone, variables, sites, shifts, mask, images)
        return sums, jax.tree_util.tree_map(jnp.zeros_like, sums)

    def add(state: Any, variables: Tree, shifts: Any, images: Any, mask: Any) -> Any:
        total, lost = state
        new = jax.tree_util.tree_map(jnp.subtract, batch_sums(backbone, variables, sites, shifts, mask, images), lost)
        after = jax.tree_util.tree_map(jnp.add, total, new)
        return after, jax.tree_util.tree_map(lambda a, t, n: (a - t) - n, after, total, new)

    centre, start, add = parallel.on_devices(centre), parallel.on_devices(start), parallel.on_devices(add)
    everywhere = parallel.replicate(variables)
    state: Any = None
    shifts: Any = None
    for images, mask in batches:
        images, mask = parallel.shard(images), parallel.shard(mask)
        if state is None:
            shifts = centre(everywhere, images, mask)
            state = start(everywhere, shifts, images, mask)
        else:
            state = add(state, everywhere, shifts, images, mask)
    if state is None:
        raise DataError("There are no images to take moments of.")
    total, lost = (jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in state)
    sums = jax.tree_util.tree_map(lambda t, c: np.sum(t - c, axis=0), total, lost)
    centres = {name: np.asarray(value, np.float64)[0] for name, value in shifts.items()}
    return {site.path: moments_from_sums(site, sums[site.name], centres[site.name]) for site in sites}


def _like(count: Any, array: Any) -> Any:
    return count.reshape(count.shape + (1,) * (array.ndim - count.ndim))
