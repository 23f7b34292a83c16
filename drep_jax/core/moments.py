"""Means and covariances of the features at every site, in one pass over unlabeled images on all devices of all hosts.

The devices say nothing to each other until the last image has been seen; then their sums are added up in one all-reduce.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from drep_jax.core.intercept import sow, visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import features, sampled_features
from drep_jax.core.sampling import systematic
from drep_jax.core.sites import Site
from drep_jax.errors import ConfigError, DataError, NonFiniteError
from drep_jax.parallel import devices
from drep_jax.trees import get_in
from drep_jax.typing import Path, Tree


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of the features at one site, float64; leading axes are ([stack], [groups]).

    Attributes:
      count: number of feature vectors.
      mean: (…, d).
      covariance: (…, d, d), of the population (divided by the count).
    """

    count: int
    mean: Float[np.ndarray, "*lead d"]
    covariance: Float[np.ndarray, "*lead d d"]

    @property
    def second(self) -> Float[np.ndarray, "*lead d d"]:
        """E[F Fᵀ]."""
        return self.covariance + self.mean[..., :, None] * self.mean[..., None, :]


ROW_BLOCKS = 4
"""F Fᵀ is symmetric: its rows are summed in at most so many blocks, each from the diagonal on, for 5/8 of the operations."""


LEAST_BLOCK = 192
"""Rows in a block at least: smaller products lose more speed than they save operations."""


def _blocks(width: int) -> list[tuple[int, int]]:
    """Returns the first and the end row of every block of a symmetric matrix."""
    rows = max(LEAST_BLOCK, -(-width // ROW_BLOCKS))
    return [(first, min(first + rows, width)) for first in range(0, width, rows)]


def no_sums(site: Site) -> dict[str, np.ndarray]:
    """Returns a site's sums before the first batch, laid out as in `batch_sums`."""
    *lead, _, width = site.denoiser_shape
    stack = () if site.stack is None else (site.stack,)
    blocks = {f"second{n}": (*lead, end - first, width - first) for n, (first, end) in enumerate(_blocks(width))}
    shapes = {"count": stack, "first": (*lead, width), **blocks}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def sum_bytes(site: Site) -> int:
    """Returns the bytes that a site takes during a pass: its sums, what rounding dropped, one batch's sums, and the total."""
    return 4 * sum(leaf.nbytes for leaf in no_sums(site).values())


def passes(sites: Sequence[Site], limit: float) -> list[tuple[Site, ...]]:
    """Cuts sites, in their order, into groups of at most `limit` bytes of sums each, or of one site if that is more."""
    groups: list[list[Site]] = []
    free = 0.0
    for site in sites:
        if not groups or (free := free - sum_bytes(site)) < 0:
            groups, free = [*groups, []], limit - sum_bytes(site)
        groups[-1].append(site)
    return [tuple(group) for group in groups]


def batch_sums(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    shifts: Mapping[str, Any],
    mask: Any,
    *args: Any,
    tokens: float = 1.0,
    keys: Any = None,
    first_slot: int = 0,
) -> dict[str, dict[str, Any]]:
    """Returns, for each site, the sums over one batch of (F − shift), (F − shift)(F − shift)ᵀ and 1.

    Args:
      backbone, variables: the frozen backbone.
      sites: where to look.
      shifts: {site name: ([stack], [groups], d)}, float32, near the mean, so that float32 loses nothing to cancellation.
      mask: (batch,) 1 for real images, 0 for padding, which counts for nothing.
      *args: for the backbone, the batch first.
      tokens: share of each image's feature vectors to use, a systematic sample of its own at every site.
      keys: (batch,) threefry keys of the images, needed if `tokens` is below 1: others, mapped over, draw for the batch.
      first_slot: number of sites and stacked copies before these, where all sites are taken in several passes.

    Returns:
      {site name: {"count", "first", "second0", "second1", …}}; the last are the blocks of rows of the symmetric matrix, from
      the diagonal on (`moments_from_sums` puts them together).
    """
    batch = mask.shape[0]
    extras: dict[Path, Tree] = {}
    slot = first_slot
    for site in sites:
        slots = jnp.arange(slot, slot + (site.stack or 1), dtype=jnp.int32)
        slot += slots.size
        extras[site.path] = {"shift": shifts[site.name], "slot": slots[0] if site.stack is None else slots}

    def visit(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        if layer.path == site.path:  # the other layers of a site read the same tensor
            shift = extra["shift"]
            form = jax.eval_shape(lambda x: features(layer, site.kind, x), x).shape
            each = len(form) > shift.ndim and form[0] % batch == 0  # else a table, the same for every image
            if each and tokens < 1.0:
                total = math.prod(form[: -shift.ndim]) // batch
                own = jax.vmap(lambda k: jax.random.fold_in(k, extra["slot"]))(keys)
                vectors = sampled_features(layer, site.kind, x, jax.vmap(lambda k: systematic(k, total, tokens))(own))
            else:
                vectors = features(layer, site.kind, x)
            vectors = vectors.reshape(-1, *shift.shape)
            real = jnp.repeat(mask > 0, vectors.shape[0] // batch) if each else jnp.ones(vectors.shape[0], bool)
            for name, value in _sums(vectors, real, shift).items():
                sow(module, layer, name, value)
        return call(x)

    _, collected = visit_sites(backbone, variables, sites, extras, visit, *args, collect=True)
    return {site.name: _own_axes(site, get_in(collected, site.path)) for site in sites}


def _sums(vectors: Any, real: Any, shift: Any) -> dict[str, Any]:
    """Sums of vectors (n, [groups], d) around `shift` where `real`."""
    wide = real.reshape(-1, *(1,) * shift.ndim)
    centred = jnp.where(wide, vectors.astype(shift.dtype) - shift[None], 0.0)
    square = "nd,ne->de" if shift.ndim == 1 else "ngd,nge->gde"
    sums = {"count": jnp.sum(real, dtype=centred.dtype), "first": jnp.sum(centred, axis=0)}
    for number, (first, end) in enumerate(_blocks(shift.shape[-1])):
        rows, rest = centred[..., first:end], centred[..., first:]
        sums[f"second{number}"] = jnp.einsum(square, rows, rest, precision=jax.lax.Precision.HIGHEST)
    return sums


def _own_axes(site: Site, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Adds up the calls of one layer that `nn.scan` repeats or `nn.vmap` spreads, which are axes after that of the stack."""
    vector = len(site.denoiser_shape) - 1
    stack = 0 if site.stack is None else 1

    def add(name: str, value: Any) -> Any:
        axes = {"count": stack, "first": vector}.get(name, vector + 1)
        return value.sum(axis=tuple(range(stack, stack + value.ndim - axes)))

    return {name: add(name, value) for name, value in leaves.items()}


def moments_from_sums(site: Site, sums: Mapping[str, np.ndarray], shift: np.ndarray) -> Moments:
    """Turns sums around `shift`, float64, into moments.

    Raises:
      NonFiniteError: for NaN or Inf in the features, naming the site.
      DataError: if no feature vector was seen.
    """
    if not all(np.isfinite(value).all() for value in sums.values()):
        raise NonFiniteError(
            f"{site.name}: the features contain NaN or Inf; check the images and the backbone's weights."
        )
    count = np.asarray(sums["count"])
    if count.min() < 1:
        raise DataError(f"{site.name}: no feature vector was seen.")

    def mean(total: np.ndarray) -> np.ndarray:
        return total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))

    offset, upper = mean(sums["first"]), np.zeros(site.denoiser_shape)
    for number, (first, end) in enumerate(_blocks(site.width)):
        upper[..., first:end, first:] = mean(sums[f"second{number}"])
    upper = np.triu(upper - offset[..., :, None] * offset[..., None, :])
    return Moments(int(count.max()), shift + offset, upper + np.swapaxes(np.triu(upper, 1), -1, -2))


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
    which, hosts = devices.host()
    shifts: Any = (
        None if near is None else centre(variables, near, np.ones(len(near), np.float32), _first_keys(key, near))
    )
    everywhere = devices.replicate(variables)
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
            state, shifted = nothing_yet(sites), devices.replicate(shifts)
        batch = tuple(devices.shard(part) for part in (images, mask, image_keys(key, place)))
        state = add(state, everywhere, shifted, *batch)
    if state is None:
        raise DataError("There are no images to take moments of.")
    high, low = everyone(*state)
    moments = {}
    for site in sites:  # one by one: in float64 all of them would take far more memory than the pass
        exact = {part: devices.unreplicate(leaf).astype(np.float64) for part, leaf in high[site.name].items()}
        for part, leaf in low[site.name].items():
            exact[part] += devices.unreplicate(leaf)
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
        return devices.exact_total(total, jax.tree_util.tree_map(jnp.negative, lost))

    on_devices = devices.on_devices
    return jax.jit(centre), on_devices(add, donate_argnums=(0,)), on_devices(everyone, donate_argnums=(0, 1))


def nothing_yet(sites: Sequence[Site]) -> Any:
    """Returns the state before the first batch: the sums, and what rounding has dropped from them, on every device."""
    zeros = {site.name: no_sums(site) for site in sites}
    return devices.replicate((zeros, zeros))


@jax.jit
def image_keys(key: Any, places: Any) -> Any:
    """Returns the raw random key of each image, (batch, 2)."""
    return jax.random.key_data(jax.vmap(lambda place: jax.random.fold_in(key, place))(places))


def _first_keys(key: Any, images: Any) -> Any:
    return image_keys(key, np.arange(len(images), dtype=np.int32))


def _like(count: Any, array: Any) -> Any:
    return count.reshape(count.shape + (1,) * (array.ndim - count.ndim))
