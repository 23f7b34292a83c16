"""One pass over unlabelled images that gives the moments of every site, on all local devices."""

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


def check_share(share: float) -> None:
    """Raises `ConfigError` unless `share` can be a share of the feature vectors."""
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"denoise.moment_tokens={share} is a share of the feature vectors and lies in (0, 1].")


def make_pass(
    backbone: nn.Module, sites: Sequence[Site], *, share: float = 1.0, seed: int = 0
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the two functions of a pass, each on all local devices.

    Returns:
      centre: (variables, images, index) ↦ the mean of each site's features over one batch of all devices and hosts.
      add: (state, variables, shifts, images, index) ↦ state, the sums so far and what rounding has dropped from them; the
        old state is used up.
    """

    def centre(variables: Tree, images: Any, index: Any) -> Any:
        origin = {site.name: jnp.zeros(site.denoiser_shape[:-1], jnp.float32) for site in sites}
        sums = batch_sums(backbone, variables, sites, origin, index, images, share=share, seed=seed)
        sums = parallel.mean({name: {part: s[part] for part in ("first", "count")} for name, s in sums.items()})
        return {name: s["first"] / _like(jnp.maximum(s["count"], 1.0 / 2), s["first"]) for name, s in sums.items()}

    def add(state: Any, variables: Tree, shifts: Any, images: Any, index: Any) -> Any:
        total, lost = state
        sums = batch_sums(backbone, variables, sites, shifts, index, images, share=share, seed=seed)
        new = jax.tree_util.tree_map(jnp.subtract, sums, lost)
        after = jax.tree_util.tree_map(jnp.add, total, new)
        return after, jax.tree_util.tree_map(lambda a, t, n: (a - t) - n, after, total, new)

    return parallel.on_devices(centre), parallel.on_devices(add, donate_argnums=(0,))


def run_pass(
    centre: Callable[..., Any],
    add: Callable[..., Any],
    variables: Tree,
    sites: Sequence[Site],
    batches: Iterable[tuple[Any, Any]],
) -> dict[Path, Moments]:
    """Runs what `make_pass` has made over the batches; see `collect_moments`."""
    everywhere = parallel.replicate(variables)
    state: Any = None
    shifts: Any = None
    for images, index in batches:
        if not np.issubdtype(index.dtype, np.integer):
            raise DataError(f"Moments need the number of each image as an integer, -1 for padding; got {index.dtype}.")
        images, index = parallel.shard(images), parallel.shard(index)
        if state is None:
            shifts = centre(everywhere, images, index)
            zeros = {site.name: no_sums(site) for site in sites}
            state = parallel.replicate((zeros, zeros))
        state = add(state, everywhere, shifts, images, index)
    if state is None:
        raise DataError("There are no images to take moments of.")
    moments = {}
    for site in sites:  # one by one: in float64 all of them would take far more memory than the pass
        total, lost = ({part: parallel.host_sum(leaf) for part, leaf in tree[site.name].items()} for tree in state)
        sums = {part: total[part] - lost[part] for part in total}
        shift = parallel.unreplicate(shifts[site.name]).astype(np.float64)
        moments[site.path] = moments_from_sums(site, sums, shift)
    return moments


def collect_moments(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    batches: Iterable[tuple[Any, Any]],
    *,
    share: float = 1.0,
    seed: int = 0,
) -> dict[Path, Moments]:
    """Accumulates the moments of every site; memory does not depend on the number of images.

    Each device sums in float32 around the first batch's mean, and carries what rounding drops from one batch to the next
    (compensated summation). The sums of all devices and hosts are added once, at the end, in float64 on the host.

    Args:
      backbone, variables: the frozen backbone.
      sites: where to look.
      batches: (images, index): normalised, (batch, …), and the number of each image, (batch,) with −1 for padding.
      share: of each image's feature vectors to take, a systematic sample of its own at every site: unbiased, and moments
        of neighbouring tokens are so alike that a quarter of them tells almost as much as all.
      seed: of the samples; they depend on (seed, number of the image, site) only, not on batches or devices.

    Raises:
      ConfigError: if the share does not lie in (0, 1].
      DataError: if there is no image, or the images are not numbered.
      NonFiniteError: for NaN or Inf in the features, naming the site.
    """
    check_share(share)
    centre, add = make_pass(backbone, sites, share=share, seed=seed)
    return run_pass(centre, add, variables, sites, batches)


def _like(count: Any, array: Any) -> Any:
    return count.reshape(count.shape + (1,) * (array.ndim - count.ndim))
