"""One pass over unlabelled images that gives the moments of every site, on all devices of all hosts.

The devices say nothing to each other until the last image has been seen; then their sums are added up in one all-reduce.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.closed_form import Moments, batch_sums, moments_from_sums, no_sums
from drep_jax.errors import ConfigError, DataError
from drep_jax.sites import Path, Site
from drep_jax.training import parallel

Tree = Any

NEAR = 8
"""Images whose mean feature is near enough to that of all."""


def collect_moments(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    batches: Iterable[tuple[Any, Any]],
    *,
    near: Any = None,
    tokens: float = 1.0,
    seed: int = 0,
    first_slot: int = 0,
) -> dict[Path, Moments]:
    """Accumulates the moments of every site; memory does not depend on the number of images.

    Each device sums in float32 around the mean of some images, which every host computes for itself, and carries what
    rounding drops from one batch to the next (compensated summation). The sums of all devices and hosts are added once,
    at the end, with what was dropped.

    Args:
      backbone, variables: the frozen backbone.
      sites: where to look.
      batches: (images, mask), normalised, (batch, …) and (batch,) with 0 for padding; with several hosts, each one's equal
        part of every batch.
      near: some of the images, normalised, and the same on every host: their mean feature is where sums are taken from.
        Needed with several hosts; by default the first images of the first batch.
      tokens: share of each image's feature vectors to use, in (0, 1]; which ones depends on the seed, the site and the
        image's place in the stream only. Neighbouring tokens are so alike that a quarter tells almost as much as all.
      seed: of that sample.
      first_slot: number of sites and stacked copies before these, where all sites are taken in several passes.

    Raises:
      ConfigError: for a share outside (0, 1].
      DataError: if there is no image.
      NonFiniteError: for NaN or Inf in the features, naming the site.
    """
    if not 0.0 < tokens <= 1.0:
        raise ConfigError(f"tokens is the share of feature vectors to use and lies in (0, 1], got {tokens!r}.")
    centre, add, everyone = programs(backbone, tuple(sites), tokens, first_slot)
    # Other generators, mapped over keys, draw for the batch and not for each key.
    key, seen = jax.random.key(seed, impl="threefry2x32"), 0
    which, hosts = parallel.host()
    shifts: Any = (
        None if near is None else centre(variables, near, np.ones(len(near), np.float32), _first_keys(key, near))
    )
    everywhere = parallel.replicate(variables)
    state: Any = None
    shifted: Any = None
    for images, mask in batches:
        place = seen + which * len(mask) + np.arange(len(mask), dtype=np.int32)
        seen += hosts * len(mask)
        if state is None:
            if shifts is None:
                if hosts > 1:
                    raise ConfigError("With several hosts, moments need images that all of them have: give `near`.")
                few = images[:NEAR]
                shifts = centre(variables, few, np.asarray(mask[:NEAR]), _first_keys(key, few))
            state, shifted = nothing_yet(sites), parallel.replicate(shifts)
        batch = tuple(parallel.shard(part) for part in (images, mask, image_keys(key, place)))
        state = add(state, everywhere, shifted, *batch)
    if state is None:
        raise DataError("There are no images to take moments of.")
    high, low = everyone(*state)
    moments = {}
    for site in sites:  # one by one: in float64 all of them would take far more memory than the pass
        exact = {part: parallel.unreplicate(leaf).astype(np.float64) for part, leaf in high[site.name].items()}
        for part, leaf in low[site.name].items():
            exact[part] += parallel.unreplicate(leaf)
        shift = np.asarray(shifts[site.name], np.float64)
        moments[site.path] = moments_from_sums(site, exact, shift)
    return moments


def programs(
    backbone: nn.Module, sites: tuple[Site, ...], tokens: float, first_slot: int = 0
) -> tuple[Callable[..., Any], ...]:
    """Returns the compiled functions of a pass, the same ones for the same arguments.

    Returns:
      centre: (variables, images, mask, keys) ↦ each site's mean over some images, on one device.
      add: (state, variables, shifts, images, mask, keys) ↦ state on every device; the old state is used up.
      everyone: (total, lost) ↦ (high, low), the sums of all devices and hosts in two float32 numbers; likewise.
    """
    try:
        return _programs(backbone, sites, tokens, first_slot)
    except TypeError:  # the attributes of a backbone need not be hashable
        return _programs.__wrapped__(backbone, sites, tokens, first_slot)


@functools.lru_cache(maxsize=8)
def _programs(
    backbone: nn.Module, sites: tuple[Site, ...], tokens: float, first_slot: int
) -> tuple[Callable[..., Any], ...]:
    origin = {site.name: jnp.zeros(site.denoiser_shape[:-1], jnp.float32) for site in sites}

    def sums_of(variables: Tree, shifts: Any, images: Any, mask: Any, key_data: Any) -> Any:
        keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        sampling = {"tokens": tokens, "keys": keys, "first_slot": first_slot}
        return batch_sums(backbone, variables, sites, shifts, mask, images, **sampling)

    def centre(variables: Tree, *batch: Any) -> Any:
        sums = sums_of(variables, origin, *batch)
        return {name: s["first"] / _like(jnp.maximum(s["count"], 1.0), s["first"]) for name, s in sums.items()}

    def add(state: Any, variables: Tree, shifts: Any, *batch: Any) -> Any:
        total, lost = state
        new = jax.tree_util.tree_map(jnp.subtract, sums_of(variables, shifts, *batch), lost)
        after = jax.tree_util.tree_map(jnp.add, total, new)
        return after, jax.tree_util.tree_map(lambda a, t, n: (a - t) - n, after, total, new)

    def everyone(total: Any, lost: Any) -> Any:
        return parallel.exact_total(total, jax.tree_util.tree_map(jnp.negative, lost))

    on_devices = parallel.on_devices
    return jax.jit(centre), on_devices(add, donate_argnums=(0,)), on_devices(everyone, donate_argnums=(0, 1))


def nothing_yet(sites: Sequence[Site]) -> Any:
    """Returns the state before the first batch: the sums, and what rounding has dropped from them, on every device."""
    zeros = {site.name: no_sums(site) for site in sites}
    return parallel.replicate((zeros, zeros))


@jax.jit
def image_keys(key: Any, places: Any) -> Any:
    """Returns the raw random key of each image, (batch, 2)."""
    return jax.random.key_data(jax.vmap(lambda place: jax.random.fold_in(key, place))(places))


def _first_keys(key: Any, images: Any) -> Any:
    return image_keys(key, np.arange(len(images), dtype=np.int32))


def _like(count: Any, array: Any) -> Any:
    return count.reshape(count.shape + (1,) * (array.ndim - count.ndim))
