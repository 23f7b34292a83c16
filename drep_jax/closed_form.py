"""Algorithm 1's global minimum without training: for squared error it is linear regression with known input noise.

With the mean m and covariance Σ of a site's features and X = √ᾱ·F + √(1−ᾱ)·ε, the covariance of X is C = ᾱ·Σ + (1−ᾱ)·I, and

    W_D* = √(1−ᾱ)·C⁻¹        b_D* = −√ᾱ·W_D*·m        least loss per number = 1 − (1−ᾱ)/d · tr C⁻¹.

Through the origin, E[F Fᵀ] = Σ + m mᵀ takes the place of Σ, and b_D = 0. One pass over unlabelled images gives the moments.
"""

import dataclasses
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from drep_jax.denoise_tree import get_in, set_in
from drep_jax.denoiser import sow, systematic, visit_sites
from drep_jax.errors import CheckpointError, DataError, NonFiniteError
from drep_jax.linear_view import features, sampled_features
from drep_jax.low_rank import dense, nearest
from drep_jax.schedule import Schedule
from drep_jax.sites import Layer, Path, Site

Tree = Any


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


# ---------------------------------------------------------------------------------------------------------------------
# One pass over the images
# ---------------------------------------------------------------------------------------------------------------------


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


MOMENTS = "moments.npz"
"""Name of the file in a run directory."""


def save_moments(path: str, moments: Mapping[Path, Moments], owner: str, tokens: float = 1.0) -> None:
    """Writes moments whole or not at all.

    Args:
      path: of the file.
      moments: of every site.
      owner: identifies the backbone and image size whose features they describe.
      tokens: share of each image's feature vectors that they were taken of.
    """
    arrays: dict[str, Any] = {"owner": np.array(owner), "tokens": np.array(tokens)}
    for where, known in moments.items():
        for field in dataclasses.fields(known):
            arrays[f"{'/'.join(where)}:{field.name}"] = np.asarray(getattr(known, field.name))
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, **arrays)
    os.replace(f"{path}.tmp", path)


def load_moments(path: str, sites: Sequence[Site], owner: str, tokens: float = 1.0) -> dict[Path, Moments]:
    """Reads the moments of the given sites.

    Raises:
      CheckpointError: if the file is absent or damaged, belongs to another backbone or image size or to another share of
        the feature vectors, or lacks a site or has it in another width.
    """
    try:
        with (
            open(path, "rb") as file,
            np.load(file) as held,
        ):  # NumPy does not close a damaged file that it opened itself
            arrays = dict(held)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no {path}, which holds the moments of the features; run train.py with the same --workdir to take them."
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it and run again to take the moments anew."
        ) from error
    if str(arrays.get("owner")) != owner:
        raise CheckpointError(
            f"{path} holds the moments of another backbone or image size; delete it and run again to take them anew."
        )
    taken = float(arrays.get("tokens", 1.0))
    if taken != tokens:
        raise CheckpointError(
            f"{path} holds the moments of a share of {taken:g} of the feature vectors, and denoise.moment_tokens is {tokens:g}"
            "; delete it and run again to take them anew."
        )
    moments = {}
    for site in sites:
        found: dict[str, Any] = {name: arrays.get(f"{site.name}:{name}") for name in ("count", "mean", "covariance")}
        shapes = {name: None if value is None else value.shape for name, value in found.items()}
        if shapes["mean"] != site.denoiser_shape[:-1] or shapes["covariance"] != site.denoiser_shape:
            raise CheckpointError(
                f"{path}: moments of {site.name} have shape {shapes['covariance']}, expected {site.denoiser_shape}; they "
                "belong to other sites or another image size. Delete the file and run again."
            )
        moments[site.path] = Moments(int(arrays[f"{site.name}:count"]), found["mean"], found["covariance"])
    return moments


# ---------------------------------------------------------------------------------------------------------------------
# The minimum
# ---------------------------------------------------------------------------------------------------------------------


def _noisy_covariance(moments: Moments, alpha_bar: Any, bias: bool) -> np.ndarray:
    """C = ᾱ·Σ + (1−ᾱ)·I, or with E[F Fᵀ] through the origin; `alpha_bar` has the leading axes or none."""
    spread = moments.covariance if bias else moments.second
    bar = np.asarray(alpha_bar, np.float64).reshape(np.shape(alpha_bar) + (1,) * (spread.ndim - np.ndim(alpha_bar)))
    return bar * spread + (1.0 - bar) * np.eye(spread.shape[-1])


def _inverse(matrix: np.ndarray, floor: Any) -> np.ndarray:
    """Inverts symmetric matrices (…, d, d) without an eigenvalue below `floor` > 0, but for rounding, by Cholesky.

    Moments are sums in float32: if some direction is 10⁷ times stronger than the noise, rounding can leave C with
    eigenvalues below the floor, or below zero. These are then put back on it, which an eigendecomposition costs.
    """
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    floors = np.broadcast_to(floor, matrix.shape[:-2]).reshape(-1)
    return np.stack([_inverse_of_one(m, f) for m, f in zip(flat, floors, strict=True)]).reshape(matrix.shape)


def _inverse_of_one(matrix: np.ndarray, floor: float) -> np.ndarray:
    eye = np.eye(len(matrix))
    try:
        scipy.linalg.cholesky(
            matrix - 0.5 * floor * eye, check_finite=False
        )  # exists if all eigenvalues exceed half of it
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix, overwrite_a=False), eye)
    except scipy.linalg.LinAlgError:
        values, axes = scipy.linalg.eigh(matrix)
        return (axes / np.maximum(values, floor)) @ axes.T


def alpha_bars(site: Site, schedule: Schedule) -> Any:
    """ᾱ at the site's own t: a number, or one for each stacked copy."""
    bars = np.array([schedule.alpha_bar(t) for t in site.times])
    return bars[0] if site.stack is None else bars


def minimiser(site: Site, moments: Moments, schedule: Schedule) -> dict[str, np.ndarray]:
    """Returns the site's best denoiser {"kernel", "bias"} in Flax layout, float64; no bias where the site may have none.

    The noise itself regularises: C has no eigenvalue below 1 − ᾱ, so fewer vectors than channels, and dead or constant
    channels, need no further ridge. A site with a `rank` gets the factors of the best of that rank.
    """
    bars = alpha_bars(site, schedule)
    if site.rank:
        return _low_rank_minimiser(site, moments, bars)
    lead = moments.covariance.ndim - np.ndim(bars)
    noise = np.sqrt(1.0 - bars).reshape(np.shape(bars) + (1,) * lead)
    floor = (1.0 - bars).reshape(np.shape(bars) + (1,) * (lead - 2))
    weight = noise * _inverse(_noisy_covariance(moments, bars, site.bias), floor)
    weight = (weight + np.swapaxes(weight, -1, -2)) / 2  # W_D* is symmetric, so Flax's transposed layout is the same
    if not site.bias:
        return {"kernel": weight}
    signal = np.sqrt(bars).reshape(np.shape(bars) + (1,) * (lead - 1))
    return {"kernel": weight, "bias": -signal * np.einsum("...de,...e->...d", weight, moments.mean)}


def _low_rank_minimiser(site: Site, moments: Moments, bars: Any) -> dict[str, np.ndarray]:
    noisy = _noisy_covariance(moments, bars, site.bias)
    lead = noisy.shape[:-2]
    along = np.broadcast_to(np.reshape(bars, np.shape(bars) + (1,) * (len(lead) - np.ndim(bars))), lead).reshape(-1)
    found = [
        nearest(matrix, np.sqrt(1.0 - bar), 1.0 - bar, site.rank or 0)
        for matrix, bar in zip(noisy.reshape(-1, *noisy.shape[-2:]), along, strict=True)
    ]
    leaves = {name: np.stack([f[name] for f in found]).reshape(lead + found[0][name].shape) for name in found[0]}
    if site.bias:
        signal = np.sqrt(along).reshape(*lead, 1)
        leaves["bias"] = -signal * np.einsum("...de,...d->...e", dense(leaves), moments.mean)
    return leaves


def closed_form(
    moments: Mapping[Path, Moments], sites: Sequence[Site], schedule: Schedule, dtype: Any = np.float32
) -> Tree:
    """Returns the `denoise` subtree of the minimisers, solved in float64 and rounded once to `dtype`."""
    tree: Tree = {}
    for site in sites:
        leaves = minimiser(site, moments[site.path], schedule)
        tree = set_in(tree, site.path, {name: leaf.astype(dtype) for name, leaf in leaves.items()})
    return tree


def wiener_maps(moments: Mapping[Path, Moments], sites: Sequence[Site], ratio: float) -> Tree:
    """Returns the best linear maps against isotropic noise of `ratio` times a site's mean feature power, for rule "affine".

    With the power p = tr E[F Fᵀ] / d and noise variance v = ratio·p, the estimate of F from F + √v·ε that errs least is
    A = Σ (Σ + v·I)⁻¹, c = m − A m (or E[F Fᵀ] for Σ and c = 0 through the origin): the Wiener filter. It is the paper's
    step straight to the clean estimate (`ddim:0`), with the noise measured by the features instead of by 1 − ᾱ_t.

    Returns:
      {"kernel": (I − A)ᵀ, "bias": −c} a site, in float32.
    """
    tree: Tree = {}
    for site in sites:
        known = moments[site.path]
        spread = known.covariance if site.bias else known.second
        power = np.trace(known.second, axis1=-2, axis2=-1) / site.width
        eye = np.eye(site.width)
        noise = np.maximum(ratio * power, np.finfo(np.float64).tiny)[..., None, None]
        kernel = noise * _inverse(spread + noise * eye, noise[..., 0, 0])  # I − Σ(Σ + vI)⁻¹ = v(Σ + vI)⁻¹, symmetric
        leaves = {"kernel": ((kernel + np.swapaxes(kernel, -1, -2)) / 2).astype(np.float32)}
        if site.bias:
            leaves["bias"] = -np.einsum("...de,...e->...d", kernel, known.mean).astype(np.float32)
        tree = set_in(tree, site.path, leaves)
    return tree


def spectrum(moments: Moments, matrix: np.ndarray) -> dict[str, list[float]]:
    """Returns the variances of a site's features along their principal axes, and what share of each a map keeps.

    Args:
      moments: of the site.
      matrix: A of x̂ = A x + c, shaped as the covariance.

    Returns:
      {"variance": eigenvalues λ_i, largest first, "gain": v_iᵀ A v_i}, averaged over groups and stacked copies.
    """
    variance, axes = np.linalg.eigh(moments.covariance)
    gain = np.einsum("...di,...de,...ei->...i", axes, matrix, axes)
    width = variance.shape[-1]
    return {
        "variance": np.maximum(variance, 0.0).reshape(-1, width).mean(axis=0)[::-1].tolist(),
        "gain": gain.reshape(-1, width).mean(axis=0)[::-1].tolist(),
    }


def expected_loss(site: Site, moments: Moments, schedule: Schedule, denoiser: Tree) -> Any:
    """Returns Algorithm 1's l2 loss of any linear denoiser exactly, a number (one a stacked copy), averaged over groups.

    E‖ε − W X − b‖² / d = [d − 2√(1−ᾱ)·tr W + tr(W C Wᵀ) + ‖√ᾱ·W m + b‖²] / d, C with the covariance Σ.
    """
    bars = alpha_bars(site, schedule)
    kernel = dense({name: np.asarray(leaf, np.float64) for name, leaf in denoiser.items()})  # W_Dᵀ
    width = site.width
    spread = _noisy_covariance(moments, bars, bias=True)
    lead = kernel.ndim - 2 - np.ndim(bars)
    noise, signal = (np.reshape(v, np.shape(bars) + (1,) * lead) for v in (np.sqrt(1.0 - bars), np.sqrt(bars)))
    offset = signal[..., None] * np.einsum("...ij,...i->...j", kernel, moments.mean)
    if "bias" in denoiser:
        offset = offset + np.asarray(denoiser["bias"], np.float64)
    quadratic = np.sum(kernel * (spread @ kernel), axis=(-2, -1)) + np.sum(offset**2, axis=-1)
    trace = np.trace(kernel, axis1=-2, axis2=-1)
    loss = (width - 2.0 * noise * trace + quadratic) / width
    return loss if site.groups == 1 else loss.mean(axis=-1)


def expected_losses(
    moments: Mapping[Path, Moments], sites: Sequence[Site], schedule: Schedule, denoise: Tree | None = None
) -> dict[str, float]:
    """Returns the exact loss of each site's denoiser, named like the training metrics; without denoisers, the optimum."""
    table = {}
    for site in sites:
        known = moments[site.path]
        denoiser = minimiser(site, known, schedule) if denoise is None else get_in(denoise, site.path)
        loss = np.asarray(expected_loss(site, known, schedule, denoiser))
        for copy, value in enumerate(loss.reshape(-1)):
            table[site.name if site.stack is None else f"{site.name}[{copy}]"] = float(value)
    return table
