"""Denoisers as matrices: full, or a multiple of the identity plus a product of rank r, D(x) = a·x + (x U) V + b_D.

Algorithm 1's minimiser W_D* = √(1−ᾱ)·C⁻¹ has no small rank (it is about 1/√(1−ᾱ) in every direction in which the features do
not vary), but apart from a multiple of the identity it nearly has. Leaves in Flax layout, before them the axes of a stack and
of groups: "kernel" (d, d), or "scale" (), "down" U (d, r) and "up" V (r, d); "bias" (d,) with either.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.linear_view import affine

Tree = Any

FACTORS = ("scale", "down", "up")


def is_low_rank(denoiser: Mapping[str, Any]) -> bool:
    """Returns whether a denoiser is given by its factors."""
    return "down" in denoiser


def dtype_of(denoiser: Mapping[str, Any]) -> Any:
    """Returns the type of a denoiser's matrix."""
    return denoiser["down" if is_low_rank(denoiser) else "kernel"].dtype


def predict(denoiser: Mapping[str, Any], x: Any) -> Any:
    """Returns D(x) of feature vectors (…, [groups], d) by a denoiser without the axis of a stack."""
    if not is_low_rank(denoiser):
        return affine(x, denoiser["kernel"], denoiser.get("bias"))
    scale = denoiser["scale"]
    own = x * scale.reshape((1,) * (x.ndim - 1 - scale.ndim) + scale.shape + (1,))
    return own + affine(affine(x, denoiser["down"]), denoiser["up"], denoiser.get("bias"))


def dense(denoiser: Mapping[str, Any]) -> Any:
    """Returns the matrix of a denoiser, (…, d, d), as NumPy or JAX array like its leaves."""
    if not is_low_rank(denoiser):
        return denoiser["kernel"]
    scale = denoiser["scale"]
    return (
        scale[..., None, None] * np.eye(denoiser["up"].shape[-1], dtype=scale.dtype) + denoiser["down"] @ denoiser["up"]
    )


def times_kernel(denoiser: Mapping[str, Any], groups: int, kernel: Any) -> Any:
    """Returns the denoiser's matrix, in Flax layout, times K (groups, d, columns); a low rank costs 2·r·d·columns."""

    def product(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    parts = {name: denoiser[name] for name in (*FACTORS, "kernel") if name in denoiser}
    parts = {name: leaf if groups > 1 else leaf[None] for name, leaf in parts.items()}
    if not is_low_rank(denoiser):
        return product(parts["kernel"], kernel)
    return parts["scale"][:, None, None] * kernel + product(parts["down"], product(parts["up"], kernel))


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
