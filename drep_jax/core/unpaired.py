"""Denoisers from clean and noisy features that were never paired: second moments only.

Let F be a site's clean feature, with mean m and covariance Σ, and X = F + ε + δ the noisy one, with
a shift δ and noise ε that is uncorrelated with F. Then X has the mean m' = m + δ and the covariance
Σ' = Σ + N, so that N = Σ' − Σ is known although no F has been seen beside its X. As the images of the
two sets differ, the difference need not be a covariance. It is projected onto those that are, in the
coordinates in which Σ' is I: there the eigenvalues of Σ are at most 1.

The map A x + c that is best for the mixture of a fraction s of clean and 1 − s of noisy features is

    A = Σ (Σ + (1 − s)·N + s(1 − s)·δδᵀ)⁻¹        c = m − A (m + (1 − s)·δ).

Through the origin, E[F Fᵀ] takes the place of Σ, and c = δ = 0. For N = v·I and s = 0 this is the Wiener
filter of `drep_jax.core.closed_form.wiener_maps`. This is our extension of the paper.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float

from drep_jax.core.moments import Moments
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.sites import Site
from drep_jax.errors import ConfigError
from drep_jax.trees import set_in
from drep_jax.typing import Path, Tree

LEAST = 1e-7
"""Least variance of a noisy feature, as a fraction of the site's mean; below it a direction is left alone."""


@dataclasses.dataclass(frozen=True)
class Unpaired:
    """Maps of all sites.

    Attributes:
      denoise: the `denoise` subtree for rule "affine": kernel (I − A)ᵀ and bias −c.
      errors: {site name, or site name[copy]: (before, after)}: the expected ‖X − F‖² and
        ‖A X + c − F‖² of noisy features, each over the clean features' variance.
    """

    denoise: Tree
    errors: dict[str, tuple[float, float]]


def noise_covariance(
    clean: Float[np.ndarray, "*lead d d"], noisy: Float[np.ndarray, "*lead d d"]
) -> Float[np.ndarray, "*lead d d"]:
    """Returns noisy − clean, projected onto the positive semidefinite matrices where `noisy` is I.

    With noisy = L Lᵀ and the eigenvalues λ and eigenvectors V of L⁻¹·clean·L⁻ᵀ it is
    L V max(1 − λ, 0) Vᵀ Lᵀ, which is the difference itself if that has no negative eigenvalue.

    Args:
      clean, noisy: covariances or second moments, symmetric.

    >>> clean, noisy = np.diag([4.0, 1.0]), np.diag([5.0, 0.5])
    >>> (noise_covariance(clean, noisy).round(5) + 0).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    flat = [
        _noise_of_one(one, other)
        for one, other in zip(clean.reshape(-1, *clean.shape[-2:]), noisy.reshape(-1, *clean.shape[-2:]), strict=True)
    ]
    return np.stack(flat).reshape(clean.shape)


def _noise_of_one(clean: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    width = len(noisy)
    floor = max(LEAST * float(np.trace(noisy)) / width, np.finfo(np.float64).tiny)
    values, axes = scipy.linalg.eigh(noisy)
    alive = values > floor
    axes, root = axes[:, alive], np.sqrt(values[alive])
    ratio = (axes / root).T @ clean @ (axes / root)
    share, turned = np.linalg.eigh((ratio + ratio.T) / 2)
    factor = (axes * root) @ turned
    noise = (factor * np.maximum(1.0 - share, 0.0)) @ factor.T
    return (noise + noise.T) / 2


@standard_promotion
def unpaired_maps(
    clean: Mapping[Path, Moments], noisy: Mapping[Path, Moments], sites: Sequence[Site], clean_share: float = 0.0
) -> Unpaired:
    """Returns the best maps for a mixture of clean and noisy features, from their moments.

    Args:
      clean: {site path: moments of the features of clean images}.
      noisy: the same of noisy images, which show other scenes of the same kind.
      sites: whose time steps do not matter.
      clean_share: s, weight of the clean images, in [0, 1).

    Raises:
      ConfigError: for a share outside of [0, 1).
    """
    if not 0.0 <= clean_share < 1.0:
        raise ConfigError(f"The share of clean images lies in [0, 1); got {clean_share!r}.")
    tree: Tree = {}
    errors: dict[str, tuple[float, float]] = {}
    for site in sites:
        before, after = clean[site.path], noisy[site.path]
        signal, other = (part.covariance if site.bias else part.second for part in (before, after))
        noise = noise_covariance(signal, other)
        shift = (after.mean - before.mean) * float(site.bias)
        outer = shift[..., :, None] * shift[..., None, :]
        mixed = signal + (1 - clean_share) * noise + clean_share * (1 - clean_share) * outer
        # (I − A)ᵀ = (Σ + …)⁻¹ (… without Σ), as both are symmetric.
        kernel = _solve(mixed, mixed - signal)
        matrix = np.eye(site.width) - np.swapaxes(kernel, -1, -2)
        leaves = {"kernel": kernel.astype(np.float32)}
        constant = before.mean - np.einsum("...de,...e->...d", matrix, before.mean + (1 - clean_share) * shift)
        if site.bias:
            leaves["bias"] = -constant.astype(np.float32)
        tree = set_in(tree, site.path, leaves)
        errors |= _errors(site, signal, noise, outer, matrix, shift, constant, before.mean)
    return Unpaired(tree, errors)


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns matrix⁻¹·right for symmetric matrices, with directions of no variance left alone."""
    values, axes = np.linalg.eigh(matrix)
    floor = np.maximum(LEAST * np.trace(matrix, axis1=-2, axis2=-1) / matrix.shape[-1], np.finfo(np.float64).tiny)
    inverse = np.where(values > floor[..., None], 1.0 / np.maximum(values, floor[..., None]), 0.0)
    return (axes * inverse[..., None, :]) @ (np.swapaxes(axes, -1, -2) @ right)


def _errors(
    site: Site,
    signal: np.ndarray,
    noise: np.ndarray,
    outer: np.ndarray,
    matrix: np.ndarray,
    shift: np.ndarray,
    constant: np.ndarray,
    mean: np.ndarray,
) -> dict[str, tuple[float, float]]:
    """Returns the expected errors of one site, by name, means over groups."""

    def trace(a: np.ndarray) -> Any:
        return np.trace(a, axis1=-2, axis2=-1)

    transposed = np.swapaxes(matrix, -1, -2)
    left = matrix - np.eye(site.width)
    offset = np.einsum("...de,...e->...d", matrix, mean + shift) + constant - mean if site.bias else 0.0 * mean
    after = trace(left @ signal @ np.swapaxes(left, -1, -2) + matrix @ noise @ transposed) + (offset**2).sum(axis=-1)
    before = trace(noise + outer)
    power = np.maximum(trace(signal), np.finfo(np.float64).tiny)
    copies = (1 if site.stack is None else site.stack, -1)
    pairs = [(part / power).reshape(copies).mean(axis=1) for part in (before, after)]
    return {
        site.name if site.stack is None else f"{site.name}[{copy}]": (float(one), float(two))
        for copy, (one, two) in enumerate(zip(*pairs, strict=True))
    }
