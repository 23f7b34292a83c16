"""Algorithm 1's global minimum without training: for squared error it is linear regression with known input noise.

With the mean m and covariance Σ of a site's features and X = √ᾱ·F + √(1−ᾱ)·ε, the covariance of X is C = ᾱ·Σ + (1−ᾱ)·I, and

    W_D* = √(1−ᾱ)·C⁻¹        b_D* = −√ᾱ·W_D*·m        least loss per number = 1 − (1−ᾱ)/d · tr C⁻¹.

Through the origin, E[F Fᵀ] = Σ + m mᵀ takes the place of Σ, and b_D = 0. One pass over unlabelled images gives the moments.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg

from drep_jax.core.denoisers import dense
from drep_jax.core.moments import Moments
from drep_jax.core.schedule import Schedule
from drep_jax.core.sites import Site
from drep_jax.trees import get_in, set_in
from drep_jax.typing import Path, Tree

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


def nearest(noisy: np.ndarray, noise: float, floor: float, rank: int) -> dict[str, np.ndarray]:
    """Returns the factors of a·I + U V of rank r that make Algorithm 1's loss least, float64.

    With the eigenvalues s_i of C = ᾱΣ + (1−ᾱ)I and k = √(1−ᾱ), the loss of W = a·I + U V exceeds the least by
    ‖(W* − a·I − U V)·C^½‖², so for given a the best U V takes the r directions of largest (k/s_i − a)²·s_i (Eckart and Young).
    That is convex in s_i, so the directions left are neighbours in the order of s; for n of them a = k·n/Σs, with the loss
    k²·(Σ 1/s − n²/Σs). The r + 1 choices of neighbours are compared.

    Args:
      noisy: C, (d, d).
      noise: k.
      floor: least eigenvalue that C can have.
      rank: r < d.
    """
    values, axes = np.linalg.eigh(noisy)
    values = np.maximum(values, floor)
    left = len(values) - rank
    ends = np.arange(left, len(values) + 1)
    sums, inverses = (np.concatenate([[0.0], np.cumsum(v)]) for v in (values, 1.0 / values))
    total, inverse = (c[ends] - c[ends - left] for c in (sums, inverses))
    best = int(np.argmin(inverse - left**2 / total))
    scale = noise * left / total[best]
    chosen = np.r_[0:best, best + left : len(values)]
    beyond = noise / values[chosen] - scale
    root = np.sqrt(np.abs(beyond))
    return {
        "scale": np.float64(scale),
        "down": axes[:, chosen] * root,
        "up": (axes[:, chosen] * (root * np.sign(beyond))).T,
    }
