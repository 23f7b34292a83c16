"""One pass over unlabelled images that gives the moments of every site, on all local devices."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.closed_form import Moments, batch_sums, moments_from_sums
from drep_jax.errors import ConfigError, DataError
from drep_jax.sites import Path, Site
from drep_jax.training import parallel

Tree = Any


def collect_moments(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    batches: Iterable[tuple[Any, Any]],
    *,
    tokens: float = 1.0,
    seed: int = 0,
) -> dict[Path, Moments]:
    """Accumulates the moments of every site; memory does not depend on the number of images.

    Each device sums in float32 around the first batch's mean, and carries what rounding drops from one batch to the next
    (compensated summation). The devices' sums are added once, at the end, in float64 on the host.

    Args:
      backbone, variables: the frozen backbone.
      sites: where to look.
      batches: (images, mask), normalised, (batch, …) and (batch,) with 0 for padding.
      tokens: share of each image's feature vectors to use, in (0, 1]; which ones depends on the seed and on the image's
        place in the stream only.
      seed: of that sample.

    Raises:
      ConfigError: for a share outside (0, 1].
      DataError: if there is no image.
      NonFiniteError: for NaN or Inf in the features, naming the site.
    """
    if not 0.0 < tokens <= 1.0:
        raise ConfigError(f"tokens is the share of feature vectors to use and lies in (0, 1], got {tokens!r}.")
    centre, start, add = _programs(backbone, tuple(sites), tokens)
    everywhere = parallel.replicate(variables)
    state: Any = None
    shifts: Any = None
    # Other generators, mapped over keys, draw for the batch and not for each key.
    key, seen = jax.random.key(seed, impl="threefry2x32"), 0
    for images, mask in batches:
        keys = _image_keys(key, np.arange(seen, seen + len(mask), dtype=np.int32))
        seen += len(mask)
        batch = tuple(parallel.shard(part) for part in (images, mask, keys))
        if state is None:
            shifts = centre(everywhere, *batch)
            state = start(everywhere, shifts, *batch)
        else:
            state = add(state, everywhere, shifts, *batch)
    if state is None:
        raise DataError("There are no images to take moments of.")
    total, lost = (jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in state)
    sums = jax.tree_util.tree_map(lambda t, c: np.sum(t - c, axis=0), total, lost)
    centres = {name: np.asarray(value, np.float64)[0] for name, value in shifts.items()}
    return {site.path: moments_from_sums(site, sums[site.name], centres[site.name]) for site in sites}


@functools.lru_cache(maxsize=8)
def _programs(backbone: nn.Module, sites: tuple[Site, ...], tokens: float) -> tuple[Any, Any, Any]:
    """Returns the compiled functions of a pass: the first batch's means, the first sums, and the sums with one batch more."""
    origin = {site.name: jnp.zeros(site.denoiser_shape[:-1], jnp.float32) for site in sites}

    def sums_of(variables: Tree, shifts: Any, images: Any, mask: Any, key_data: Any) -> Any:
        keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        return batch_sums(backbone, variables, sites, shifts, mask, images, tokens=tokens, keys=keys)

    def centre(variables: Tree, images: Any, mask: Any, key_data: Any) -> Any:
        sums = parallel.mean(sums_of(variables, origin, images, mask, key_data))
        return {name: s["first"] / _like(jnp.maximum(s["count"], 1.0 / 2), s["first"]) for name, s in sums.items()}

    def start(variables: Tree, shifts: Any, images: Any, mask: Any, key_data: Any) -> Any:
        sums = sums_of(variables, shifts, images, mask, key_data)
        return sums, jax.tree_util.tree_map(jnp.zeros_like, sums)

    def add(state: Any, variables: Tree, shifts: Any, images: Any, mask: Any, key_data: Any) -> Any:
        total, lost = state
        new = jax.tree_util.tree_map(jnp.subtract, sums_of(variables, shifts, images, mask, key_data), lost)
        after = jax.tree_util.tree_map(jnp.add, total, new)
        return after, jax.tree_util.tree_map(lambda a, t, n: (a - t) - n, after, total, new)

    return parallel.on_devices(centre), parallel.on_devices(start), parallel.on_devices(add)


@jax.jit
def _image_keys(key: Any, index: Any) -> Any:
    """Returns the raw random key of each image, (batch, 2)."""
    return jax.random.key_data(jax.vmap(lambda number: jax.random.fold_in(key, number))(index))


def _like(count: Any, array: Any) -> Any:
    return count.reshape(count.shape + (1,) * (array.ndim - count.ndim))
