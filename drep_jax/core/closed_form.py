"""The global minimum of Algorithm 1's squared loss (Eq. 11) in closed form, without training.

It is linear regression with known input noise. A site's features F have mean m and covariance Σ.
The noisy features X = √ᾱ·F + √(1−ᾱ)·ε then have covariance C = ᾱ·Σ + (1−ᾱ)·I, and

    W_D* = √(1−ᾱ)·C⁻¹        b_D* = −√ᾱ·W_D*·m        least loss per entry = 1 − (1−ᾱ)/d · tr C⁻¹.

Through the origin (b_D = 0), E[F Fᵀ] = Σ + m mᵀ takes the place of Σ. One pass over unlabeled
images gives the moments m and Σ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float

from drep_jax.core.denoisers import Denoisers, resolve
from drep_jax.core.linear_denoiser import dense
from drep_jax.core.moments import Moments
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Path, Tree

# ---------------------------------------------------------------------------------------------------------------------
# The minimum
# ---------------------------------------------------------------------------------------------------------------------


def _noisy_covariance(
    moments: Moments, alpha_bar: Float[np.ndarray, "*stack"] | float, bias: bool
) -> Float[np.ndarray, "*lead d d"]:
    """Returns C = ᾱ·Σ + (1−ᾱ)·I, with E[F Fᵀ] for Σ through the origin; one ᾱ, or one a copy."""
    clean = moments.covariance if bias else moments.second
    bar = np.asarray(alpha_bar, np.float64).reshape(np.shape(alpha_bar) + (1,) * (clean.ndim - np.ndim(alpha_bar)))
    return bar * clean + (1.0 - bar) * np.eye(clean.shape[-1])


def _inverse(
    matrix: Float[np.ndarray, "*lead d d"], floor: Float[np.ndarray, "*floors"] | float
) -> Float[np.ndarray, "*lead d d"]:
    """Inverts symmetric matrices that have, but for rounding, no eigenvalue below `floor` > 0.

    Moments are summed in float32. If some direction is 10⁷ times stronger than the noise, rounding
    can leave eigenvalues of C below the floor, or below zero. Those are raised to the floor. Only
    then is an eigendecomposition needed; otherwise a Cholesky decomposition will do.
    """
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    floors = np.broadcast_to(floor, matrix.shape[:-2]).reshape(-1)
    return np.stack([_inverse_of_one(m, f) for m, f in zip(flat, floors, strict=True)]).reshape(matrix.shape)


def _inverse_of_one(matrix: Float[np.ndarray, "d d"], floor: float) -> Float[np.ndarray, "d d"]:
    eye = np.eye(len(matrix))
    try:
        # This decomposition exists if all eigenvalues exceed half of the floor.
        scipy.linalg.cholesky(matrix - 0.5 * floor * eye, check_finite=False)
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix, overwrite_a=False), eye)
    except scipy.linalg.LinAlgError:
        values, axes = scipy.linalg.eigh(matrix)
        return (axes / np.maximum(values, floor)) @ axes.T


def alpha_bars(site: Site, schedule: Schedule) -> Float[np.ndarray, "*stack"] | float:
    """Returns ᾱ at the site's own t: a number, or one for each stacked copy."""
    bars = np.array([schedule.alpha_bar(t) for t in site.times])
    return bars[0] if site.stack is None else bars


def minimizer(site: Site, moments: Moments, schedule: Schedule) -> dict[str, np.ndarray]:
    """Returns the denoiser of a site that minimizes Algorithm 1's l2 loss.

    W_D* = √(1−ᾱ)·C⁻¹,  b_D* = −√ᾱ·W_D*·m,  with C = ᾱ·Σ + (1−ᾱ)·I.

    The noise itself regularizes: C has no eigenvalue below 1 − ᾱ. So there is a solution for fewer
    vectors than channels, and for dead or constant channels, without a ridge.

    Args:
      site: with time steps; with a `rank`, the best denoiser of that rank is returned.
      moments: of the site's features.
      schedule: the noise schedule.

    Returns:
      {"kernel": W_D*ᵀ, "bias": b_D*} in float64, or the factors and "bias"; no "bias" where the
      site may have none.

    >>> import dataclasses, flax.linen as nn, jax
    >>> from drep_jax import find_sites
    >>> (site,) = find_sites(nn.Sequential([nn.Dense(1)]), jax.ShapeDtypeStruct((1, 2), "float32"))
    >>> site = dataclasses.replace(site, times=(1000,))
    >>> moments = Moments(100, np.array([1.0, 0.0]), np.diag([4.0, 0.0]))
    >>> best = minimizer(site, moments, Schedule())
    >>> best["kernel"].round(4).tolist(), (best["bias"].round(4) + 0).tolist()
    ([[0.3936, 0.0], [0.0, 1.2401]], [-0.2327, 0.0])
    """
    bars: Any = alpha_bars(site, schedule)
    if site.rank:
        return _low_rank_minimizer(site, moments, bars)
    lead = moments.covariance.ndim - np.ndim(bars)
    noise = np.sqrt(1.0 - bars).reshape(np.shape(bars) + (1,) * lead)
    floor = (1.0 - bars).reshape(np.shape(bars) + (1,) * (lead - 2))
    weight = noise * _inverse(_noisy_covariance(moments, bars, site.bias), floor)
    weight = (weight + np.swapaxes(weight, -1, -2)) / 2  # W_D* is symmetric, so Flax's transposed layout is the same
    if not site.bias:
        return {"kernel": weight}
    signal = np.sqrt(bars).reshape(np.shape(bars) + (1,) * (lead - 1))
    return {"kernel": weight, "bias": -signal * np.einsum("...de,...e->...d", weight, moments.mean)}


def _low_rank_minimizer(site: Site, moments: Moments, bars: Any) -> dict[str, np.ndarray]:
    noisy = _noisy_covariance(moments, bars, site.bias)
    lead = noisy.shape[:-2]
    flat_bars = np.broadcast_to(np.reshape(bars, np.shape(bars) + (1,) * (len(lead) - np.ndim(bars))), lead).reshape(-1)
    factors = [
        best_factors(matrix, np.sqrt(1.0 - bar), 1.0 - bar, site.rank or 0)
        for matrix, bar in zip(noisy.reshape(-1, *noisy.shape[-2:]), flat_bars, strict=True)
    ]
    leaves = {name: np.stack([f[name] for f in factors]).reshape(lead + factors[0][name].shape) for name in factors[0]}
    if site.bias:
        signal = np.sqrt(flat_bars).reshape(*lead, 1)
        leaves["bias"] = -signal * np.einsum("...de,...d->...e", dense(leaves), moments.mean)
    return leaves


@standard_promotion
def closed_form(
    moments: Mapping[Path, Moments], sites: Sequence[Site], schedule: Schedule, dtype: Any = np.float32
) -> Tree:
    """Returns the `denoise` subtree of all minimizers, solved in float64 and rounded once.

    Args:
      moments: {site path: moments of its features}.
      sites: with time steps.
      schedule: the noise schedule.
      dtype: of the leaves.
    """
    tree: Tree = {}
    for site in sites:
        leaves = minimizer(site, moments[site.path], schedule)
        tree = set_in(tree, site.path, {name: leaf.astype(dtype) for name, leaf in leaves.items()})
    return tree


@standard_promotion
def wiener_maps(moments: Mapping[Path, Moments], sites: Sequence[Site], ratio: float) -> Tree:
    """Returns the best linear maps against isotropic noise of power `ratio` times the features'.

    With the mean feature power p = tr E[F Fᵀ] / d and the noise variance v = ratio·p, the best
    estimate of F from F + √v·ε is the Wiener filter x̂ = A x + c:

        A = Σ (Σ + v·I)⁻¹        c = m − A m

    Through the origin, E[F Fᵀ] takes the place of Σ and c = 0. This is our extension of the paper.
    It is like the step to the clean estimate (`ddim:0`), but with the noise relative to each site's
    features instead of 1 − ᾱ_t.

    Args:
      moments: {site path: moments of its features}.
      sites: whose time steps do not matter.
      ratio: noise power over feature power, above 0.

    Returns:
      The `denoise` subtree for rule "affine", {"kernel": (I − A)ᵀ, "bias": −c} a site, in float32.
    """
    tree: Tree = {}
    for site in sites:
        site_moments = moments[site.path]
        clean = site_moments.covariance if site.bias else site_moments.second
        power = np.trace(site_moments.second, axis1=-2, axis2=-1) / site.width
        eye = np.eye(site.width)
        variance = np.maximum(ratio * power, np.finfo(np.float64).tiny)[..., None, None]
        kernel = variance * _inverse(clean + variance * eye, variance[..., 0, 0])  # I − Σ(Σ + vI)⁻¹ = v(Σ + vI)⁻¹
        leaves = {"kernel": ((kernel + np.swapaxes(kernel, -1, -2)) / 2).astype(np.float32)}  # it is symmetric
        if site.bias:
            leaves["bias"] = -np.einsum("...de,...e->...d", kernel, site_moments.mean).astype(np.float32)
        tree = set_in(tree, site.path, leaves)
    return tree


def spectrum(moments: Moments, matrix: Float[np.ndarray, "*lead d d"]) -> dict[str, list[float]]:
    """Returns the variances of features along their principal axes, and a map's gain there.

    Args:
      moments: of the site's features.
      matrix: A of x̂ = A x + c, shaped as the covariance.

    Returns:
      {"variance": eigenvalues λ_i of the covariance, "gain": v_iᵀ A v_i}, largest λ_i first, each a
      mean over groups and stacked copies.
    """
    variance, axes = np.linalg.eigh(moments.covariance)
    gain = np.einsum("...di,...de,...ei->...i", axes, matrix, axes)
    width = variance.shape[-1]
    return {
        "variance": np.maximum(variance, 0.0).reshape(-1, width).mean(axis=0)[::-1].tolist(),
        "gain": gain.reshape(-1, width).mean(axis=0)[::-1].tolist(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The loss of any denoiser
# ---------------------------------------------------------------------------------------------------------------------


def expected_loss(
    site: Site, moments: Moments, schedule: Schedule, denoiser: Tree
) -> Float[np.ndarray, "*stack"] | float:
    """Returns Algorithm 1's l2 loss of any linear denoiser exactly.

    E‖ε − W X − b‖² / d = [d − 2√(1−ᾱ)·tr W + tr(W C Wᵀ) + ‖√ᾱ·W m + b‖²] / d,

    where C is the noisy covariance, from Σ.

    Args:
      site, moments, schedule: as for `minimizer`.
      denoiser: of the site.

    Returns:
      A number, or one for each stacked copy; the mean over groups.
    """
    bars = alpha_bars(site, schedule)
    kernel = dense({name: np.asarray(leaf, np.float64) for name, leaf in denoiser.items()})  # W_Dᵀ
    width = site.width
    noisy = _noisy_covariance(moments, bars, bias=True)
    lead = kernel.ndim - 2 - np.ndim(bars)
    noise, signal = (np.reshape(v, np.shape(bars) + (1,) * lead) for v in (np.sqrt(1.0 - bars), np.sqrt(bars)))
    offset = signal[..., None] * np.einsum("...ij,...i->...j", kernel, moments.mean)
    if "bias" in denoiser:
        offset = offset + np.asarray(denoiser["bias"], np.float64)
    quadratic = np.sum(kernel * (noisy @ kernel), axis=(-2, -1)) + np.sum(offset**2, axis=-1)
    trace = np.trace(kernel, axis1=-2, axis2=-1)
    loss = (width - 2.0 * noise * trace + quadratic) / width
    return loss if site.groups == 1 else loss.mean(axis=-1)


@standard_promotion
def expected_losses(
    moments: Mapping[Path, Moments], sites: Sequence[Site], schedule: Schedule, denoise: Tree | Denoisers | None = None
) -> dict[str, float]:
    """Returns the exact l2 loss of each site's denoiser; without denoisers, the least one.

    Args:
      moments: {site path: moments of its features}.
      sites: with time steps.
      schedule: the noise schedule.
      denoise: a `denoise` subtree or a `Denoisers`; None for the minimizers.

    Returns:
      {site name, or site name[copy]: loss}, named like the training metrics.
    """
    denoise, _, _ = resolve(denoise)
    table = {}
    for site in sites:
        site_moments = moments[site.path]
        denoiser = minimizer(site, site_moments, schedule) if denoise is None else get_in(denoise, site.path)
        loss = np.asarray(expected_loss(site, site_moments, schedule, denoiser))
        for copy, value in enumerate(loss.reshape(-1)):
            table[site.name if site.stack is None else f"{site.name}[{copy}]"] = float(value)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Low rank
# ---------------------------------------------------------------------------------------------------------------------


def best_factors(noisy: Float[np.ndarray, "d d"], noise: float, floor: float, rank: int) -> dict[str, Any]:
    """Returns the factors of a·I + U V of rank r that minimize Algorithm 1's l2 loss, in float64.

    With the eigenvalues s_i of C = ᾱΣ + (1−ᾱ)I and k = √(1−ᾱ), the loss of W = a·I + U V exceeds
    the least by ‖(W* − a·I − U V)·C^½‖². For given a, the best U V therefore takes the r directions
    with the largest (k/s_i − a)²·s_i (Eckart and Young). This is convex in s_i, so the other n = d − r
    directions are adjacent in the order of s. For them the best a is k·n/Σs, with the loss
    k²·(Σ 1/s − n²/Σs). The r + 1 adjacent sets are compared.

    Args:
      noisy: C.
      noise: k.
      floor: least eigenvalue that C can have, but for rounding.
      rank: r < d.

    Returns:
      {"scale": a, "down": (d, r), "up": (r, d)}.
    """
    values, axes = np.linalg.eigh(noisy)
    values = np.maximum(values, floor)
    count = len(values) - rank
    ends = np.arange(count, len(values) + 1)
    sums, inverse_sums = (np.concatenate([[0.0], np.cumsum(v)]) for v in (values, 1.0 / values))
    total, inverse_total = (c[ends] - c[ends - count] for c in (sums, inverse_sums))
    best = int(np.argmin(inverse_total - count**2 / total))
    scale = noise * count / total[best]
    chosen = np.r_[0:best, best + count : len(values)]
    excess = noise / values[chosen] - scale
    root = np.sqrt(np.abs(excess))
    return {
        "scale": np.float64(scale),
        "down": axes[:, chosen] * root,
        "up": (axes[:, chosen] * (root * np.sign(excess))).T,
    }
