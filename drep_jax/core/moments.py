"""Means and covariances of the features at every site, in one pass over unlabeled images.

The pass runs on all devices of all hosts. They do not communicate until the last image has been
seen; then their sums are added in one all-reduce.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt32

from drep_jax.core.calls import counted_vectors, table_weight, vector_weight
from drep_jax.core.intercept import sow, sown, sum_calls, visit_sites
from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import features, sampled_features
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.sampling import systematic
from drep_jax.core.sites import Site
from drep_jax.core.vector_sums import row_blocks, sums_in_parts, vector_sums
from drep_jax.core.working import WORKING
from drep_jax.errors import ConfigError, DataError, NonFiniteError
from drep_jax.parallel import devices
from drep_jax.typing import AnyArray, Path, Tree


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of the features at one site, float64; leading axes are ([stack], [groups]).

    Attributes:
      count: number of feature vectors; where calls weigh alike, as many as there are calls.
      mean: m = E F.
      covariance: Σ = E[(F − m)(F − m)ᵀ], of the population (divided by the count).

    >>> moments = Moments(4, mean=np.array([1.0, 2.0]), covariance=np.eye(2))
    >>> moments.second.tolist()
    [[2.0, 2.0], [2.0, 5.0]]
    """

    count: int
    mean: Float[np.ndarray, "*lead d"]
    covariance: Float[np.ndarray, "*lead d d"]

    @property
    def second(self) -> Float[np.ndarray, "*lead d d"]:
        """E[F Fᵀ] = Σ + m mᵀ."""
        return self.covariance + self.mean[..., :, None] * self.mean[..., None, :]


# ---------------------------------------------------------------------------------------------------------------------
# Sums over one batch
# ---------------------------------------------------------------------------------------------------------------------


def zero_sums(site: Site) -> dict[str, Float[np.ndarray, "..."]]:
    """Returns a site's sums before the first batch, laid out as in `batch_sums`."""
    *lead, _, width = site.denoiser_shape
    stack = () if site.stack is None else (site.stack,)
    blocks = {f"second{n}": (*lead, end - first, width - first) for n, (first, end) in enumerate(row_blocks(width))}
    shapes = {"count": stack, "first": (*lead, width), **blocks}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def sum_bytes(site: Site) -> int:
    """Returns the bytes that a site takes during a pass.

    They hold its sums, their rounding errors, the sums of one batch, and the total over devices.
    """
    return 4 * sum(leaf.nbytes for leaf in zero_sums(site).values())


def passes(sites: Sequence[Site], limit: float) -> list[tuple[Site, ...]]:
    """Divides sites, in their order, into groups that each fit into memory.

    Args:
      sites: to take moments of.
      limit: bytes of sums in a group; a site that needs more is a group of its own.
    """
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
    shifts: Mapping[str, Float[AnyArray, "..."]],
    mask: Num[AnyArray, " batch"],
    *args: Any,
    tokens: float = 1.0,
    keys: Any = None,
    first_slot: int = 0,
    **kwargs: Any,
) -> dict[str, dict[str, Float[Array, "..."]]]:
    """Returns each site's sums over one batch: of F − shift, (F − shift)(F − shift)ᵀ and 1.

    All calls of a layer are summed, weighted as `Site.call_weights` says, without what the network says
    is padding (`drep_jax.rows`).

    Args:
      backbone, variables: the frozen backbone.
      sites: to take sums at.
      shifts: {site name: ([stack], [groups], d)}, float32, near the mean of F, so that float32
        loses nothing to cancellation.
      mask: 1 for images, 0 for padding, which is not counted.
      *args: inputs of the backbone, the batch first.
      tokens: fraction of each image's feature vectors to use, by a systematic sample at every site.
      keys: (batch,) threefry keys of the images, needed if `tokens` < 1. Other generators mapped
        over keys draw for the whole batch, not for each key.
      first_slot: number of sites, stacked copies counted, in earlier passes; see `passes`.
      **kwargs: for the backbone.

    Returns:
      {site name: {"count", "first", "second0", "second1", …}}. The last are the row blocks of the
      symmetric matrix, each from the diagonal on; `moments_from_sums` joins them.
    """
    batch = mask.shape[0]
    extras: dict[Path, Tree] = {}
    slot = first_slot
    for site in sites:
        slots = jnp.arange(slot, slot + (site.stack or 1), dtype=jnp.int32)
        slot += slots.size
        extras[site.path] = {"shift": shifts[site.name], "slot": slots[0] if site.stack is None else slots}

    def visit(site: Site, layer: Layer, module: nn.Module, extra: Tree, x: Any, call: Any) -> Any:
        if layer.path == site.layers[0].path:  # the other layers of a site read the same tensor
            shift = extra["shift"]
            shape = jax.eval_shape(lambda x: features(layer, site.kind, x), x).shape
            by_image = len(shape) > shift.ndim and shape[0] % batch == 0  # else a table for all images
            total = math.prod(shape[: -shift.ndim]) // batch
            picks = None
            if by_image and tokens < 1.0:
                site_keys = jax.vmap(lambda k: jax.random.fold_in(k, extra["slot"]))(keys)
                picks = jax.vmap(lambda k: systematic(k, total, tokens))(site_keys)
            used = total if picks is None else picks.shape[1]
            rows = max(1, WORKING // (8 * batch * shift.size))  # of each image at once
            valid = counted_vectors(site, layer, site.kind, x)
            valid = None if valid is None else valid.reshape(batch if by_image else 1, -1)
            if by_image and site.kind == "patch" and used > rows:
                picks = jnp.tile(jnp.arange(total)[None], (batch, 1)) if picks is None else picks
                sums = sums_in_parts(site, layer, x, picks, mask, shift, rows, valid)
            else:
                if picks is None:
                    vectors: Any = features(layer, site.kind, x)
                else:
                    vectors = sampled_features(layer, site.kind, x, picks)
                vectors = vectors.reshape(-1, *shift.shape)
                count = vectors.shape[0]
                counted = jnp.repeat(mask > 0, count // batch) if by_image else jnp.ones(count, bool)
                if valid is not None:
                    valid = valid if picks is None else jnp.take_along_axis(valid, picks, axis=1)
                    counted = counted & valid.reshape(-1)
                sums = vector_sums(vectors, counted, shift)
            weight = vector_weight(site, total, used) if by_image else table_weight(site, layer, x, mask)
            for name, value in sums.items():
                sow(module, layer, name, value if isinstance(weight, float) and weight == 1.0 else weight * value)
        return call(x)

    _, collected = visit_sites(backbone, variables, sites, extras, visit, *args, collect=True, **kwargs)
    axes = {"count": -1, "first": 1}
    return {site.name: sum_calls(site, sown(collected, site.layers[0]), axes, 2) for site in sites}


def moments_from_sums(
    site: Site, sums: Mapping[str, Float[np.ndarray, "..."] | np.floating], shift: Float[np.ndarray, "*lead d"]
) -> Moments:
    """Returns the moments of a site from its sums around `shift`, in float64.

    Raises:
      NonFiniteError: for NaN or Inf in the features, naming the site.
      DataError: if no feature vector was seen.
    """
    if not all(np.isfinite(value).all() for value in sums.values()):
        raise NonFiniteError(
            f"{site.name}: the features contain NaN or Inf; check the images and the backbone's weights."
        )
    count = np.asarray(sums["count"])
    if not count.min() > 0:
        raise DataError(f"{site.name}: no feature vector was seen.")

    def mean(total: Any) -> np.ndarray:
        return total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))

    offset, upper = mean(sums["first"]), np.zeros(site.denoiser_shape)
    for index, (first, end) in enumerate(row_blocks(site.width)):
        upper[..., first:end, first:] = mean(sums[f"second{index}"])
    upper = np.triu(upper - offset[..., :, None] * offset[..., None, :])
    return Moments(max(1, round(float(count.max()))), shift + offset, upper + np.swapaxes(np.triu(upper, 1), -1, -2))


# ---------------------------------------------------------------------------------------------------------------------
# The pass
# ---------------------------------------------------------------------------------------------------------------------

SHIFT_IMAGES = 8
"""Number of images whose mean feature is near enough to the mean of all."""


@standard_promotion
def collect_moments(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    batches: Iterable[tuple[Any, ...]],
    *,
    shift_images: Any = None,
    shift_arguments: Mapping[str, Any] = MappingProxyType({}),
    tokens: float = 1.0,
    seed: int = 0,
    first_slot: int = 0,
    **kwargs: Any,
) -> dict[Path, Moments]:
    """Takes the moments of every site in one pass; memory does not depend on the number of images.

    Each device sums in float32 around the mean feature of a few images, and carries rounding errors
    from one batch to the next (compensated summation). The sums and errors of all devices and hosts
    are added once, at the end.

    Args:
      backbone, variables: the frozen backbone.
      sites: to take moments at.
      batches: (images, mask), normalized, (batch, …) and (batch,) with 0 for padding; where the
        backbone is given more of each image, (images, mask, {argument: (batch, …)}). With several
        hosts: each host's equal part of every batch.
      shift_images: images whose mean feature is the shift, normalized, the same on every host.
        Needed with several hosts; by default the first images of the first batch.
      shift_arguments: what the backbone is given beside them.
      tokens: fraction of each image's feature vectors to use, in (0, 1]. Which ones depends only on
        the seed, the site and the image's index in the stream. Neighboring tokens are so similar
        that a quarter of them gives nearly the same moments.
      seed: of the sample.
      first_slot: number of sites, stacked copies counted, in earlier passes; see `passes`.
      **kwargs: for the backbone, such as `train=False`.

    Returns:
      {site path: moments}.

    Raises:
      ConfigError: for `tokens` outside (0, 1], or several hosts without `shift_images`.
      DataError: if there is no image.
      NonFiniteError: for NaN or Inf in the features, naming the site.
    """
    if not 0.0 < tokens <= 1.0:
        raise ConfigError(f"tokens is the fraction of feature vectors to use and lies in (0, 1], got {tokens!r}.")
    center, add, total = programs(backbone, tuple(sites), tokens, first_slot, tuple(sorted(kwargs.items())))
    # Other generators, mapped over keys, draw for the whole batch and not for each key.
    key, seen = jax.random.key(seed, impl="threefry2x32"), 0
    host, host_count = devices.host()

    def mean_feature(images: Any, mask: Any, arguments: Mapping[str, Any]) -> Any:
        keys = image_keys(key, np.arange(len(images), dtype=np.int32))
        return center(variables, images, mask, keys, *_given(arguments))

    shifts: Any = None
    if shift_images is not None:
        shifts = mean_feature(shift_images, np.ones(len(shift_images), np.float32), shift_arguments)
    replicated = devices.replicate(variables)
    state: Any = None
    replicated_shifts: Any = None
    for images, mask, *further in batches:
        arguments = dict(*further)
        index = seen + host * len(mask) + np.arange(len(mask), dtype=np.int32)
        seen += host_count * len(mask)
        if state is None:
            if shifts is None:
                if host_count > 1:
                    raise ConfigError(
                        "With several hosts, moments need images that all of them have: give `shift_images`."
                    )
                first = {name: rows[:SHIFT_IMAGES] for name, rows in arguments.items()}
                shifts = mean_feature(images[:SHIFT_IMAGES], np.asarray(mask[:SHIFT_IMAGES]), first)
            state, replicated_shifts = initial_state(sites), devices.replicate(shifts)
        parts = (images, mask, image_keys(key, index), *_given(arguments))
        batch = tuple(devices.shard(part) for part in parts)
        state = add(state, replicated, replicated_shifts, *batch)
    if state is None:
        raise DataError("There are no images to take moments of.")
    high, low = total(*state)
    moments = {}
    for site in sites:  # one by one: all of them in float64 would take more memory than the pass
        sums = {part: devices.unreplicate(leaf).astype(np.float64) for part, leaf in high[site.name].items()}
        for part, leaf in low[site.name].items():
            sums[part] += devices.unreplicate(leaf)
        shift = np.asarray(shifts[site.name], np.float64)
        moments[site.path] = moments_from_sums(site, sums, shift)
    return moments


def programs(
    backbone: nn.Module,
    sites: tuple[Site, ...],
    tokens: float,
    first_slot: int = 0,
    options: tuple[tuple[str, Any], ...] = (),
) -> tuple[Callable[..., Any], ...]:
    """Returns the compiled functions of a pass, the same ones for equal arguments.

    Args:
      backbone, sites, tokens, first_slot: as for `collect_moments`.
      options: names and values of further arguments of the backbone.

    Returns:
      center: (variables, images, mask, keys) ↦ each site's mean feature, on one device.
      add: (state, variables, shifts, images, mask, keys) ↦ state on every device; donates the
        state. Both take what the backbone is given beside the images as a further argument.
      total: (sums, errors) ↦ (high, low), the sums over all devices and hosts in two float32
        numbers; donates both.
    """
    try:
        return _programs(backbone, sites, tokens, first_slot, options)
    except TypeError:  # the attributes of a backbone need not be hashable
        return _programs.__wrapped__(backbone, sites, tokens, first_slot, options)


@functools.lru_cache(maxsize=8)
def _programs(
    backbone: nn.Module,
    sites: tuple[Site, ...],
    tokens: float,
    first_slot: int,
    options: tuple[tuple[str, Any], ...],
) -> tuple[Callable[..., Any], ...]:
    origin = {site.name: jnp.zeros(site.denoiser_shape[:-1], jnp.float32) for site in sites}

    def sums_of(variables: Tree, shifts: Any, images: Any, mask: Any, key_data: Any, *given: Any) -> Any:
        keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        sampling = {"tokens": tokens, "keys": keys, "first_slot": first_slot, **dict(options), **dict(*given)}
        return batch_sums(backbone, variables, sites, shifts, mask, images, **sampling)

    def center(variables: Tree, *batch: Any) -> Any:
        sums = sums_of(variables, origin, *batch)
        return {name: s["first"] / _like(jnp.maximum(s["count"], 1.0), s["first"]) for name, s in sums.items()}

    def add(state: Any, variables: Tree, shifts: Any, *batch: Any) -> Any:
        sums, errors = state
        new = jax.tree_util.tree_map(jnp.subtract, sums_of(variables, shifts, *batch), errors)
        after = jax.tree_util.tree_map(jnp.add, sums, new)
        return after, jax.tree_util.tree_map(lambda a, s, n: (a - s) - n, after, sums, new)

    def total(sums: Any, errors: Any) -> Any:
        return devices.exact_total(sums, jax.tree_util.tree_map(jnp.negative, errors))

    on_devices = devices.on_devices
    return jax.jit(center), on_devices(add, donate_argnums=(0,)), on_devices(total, donate_argnums=(0, 1))


def initial_state(sites: Sequence[Site]) -> Any:
    """Returns the state before the first batch, on every device: sums and rounding errors."""
    zeros = {site.name: zero_sums(site) for site in sites}
    return devices.replicate((zeros, zeros))


@jax.jit
def image_keys(key: jax.Array, index: Any) -> UInt32[Array, "batch 2"]:
    """Returns the raw random key of each image from its index in the stream."""
    return jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(key, i))(index))


def _given(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Returns what a program takes beside images, mask and keys: nothing, if the backbone is given nothing."""
    return (dict(arguments),) if arguments else ()


def _like(count: Any, array: Any) -> Any:
    return count.reshape(count.shape + (1,) * (array.ndim - count.ndim))
