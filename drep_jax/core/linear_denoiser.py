"""One linear denoiser: D(x) = x·K_D + b_D, with a full matrix or a low-rank one.

A denoiser is a dict of arrays in Flax layout, so K_D = W_Dᵀ. A full matrix is the leaf `kernel`. A
matrix of rank r plus a multiple of the identity is given by three factors:

    K_D = scale·I + down·up        scale: a number, down: (d, r), up: (r, d)

The leaf `bias` is b_D. A site with `groups` > 1 has one matrix a group; its leaves then have the
groups as first axis.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from drep_jax.core.matrix_form import affine
from drep_jax.typing import AnyArray

FACTORS = ("scale", "down", "up")
"""Leaves of a low-rank denoiser that take the place of `kernel`."""


def is_low_rank(denoiser: Mapping[str, Any]) -> bool:
    """Returns whether a denoiser is given by its factors."""
    return "down" in denoiser


def has_matrix(denoiser: Any) -> bool:
    """Returns whether a denoiser has either a full matrix or all factors of one, not both."""
    if not isinstance(denoiser, Mapping):
        return False
    present = [name in denoiser for name in FACTORS]
    return not any(present) if "kernel" in denoiser else all(present)


def dtype_of(denoiser: Mapping[str, Any]) -> Any:
    """Returns the type of a denoiser's matrix."""
    return denoiser["down" if is_low_rank(denoiser) else "kernel"].dtype


def predict(denoiser: Mapping[str, Any], x: Float[AnyArray, "*batch d"]) -> Float[AnyArray, "*batch d"]:
    """Returns D(x), the predicted noise of feature vectors.

    Args:
      denoiser: of one layer, without the axis of a stack.
      x: (…, d), or (…, groups, d) for a grouped denoiser.

    >>> denoiser = {"kernel": jnp.array([[0.0, 2.0], [1.0, 0.0]]), "bias": jnp.array([0.5, 0.0])}
    >>> predict(denoiser, jnp.array([[1.0, 3.0]])).tolist()
    [[3.5, 2.0]]
    """
    if not is_low_rank(denoiser):
        return affine(x, denoiser["kernel"], denoiser.get("bias"))
    scale = denoiser["scale"]
    scaled_x = x * scale.reshape((1,) * (x.ndim - 1 - scale.ndim) + scale.shape + (1,))
    return scaled_x + affine(affine(x, denoiser["down"]), denoiser["up"], denoiser.get("bias"))


def dense(denoiser: Mapping[str, Any]) -> Float[AnyArray, "*lead d d"]:
    """Returns the matrix K_D of a denoiser, as NumPy or JAX array like its leaves."""
    if not is_low_rank(denoiser):
        return denoiser["kernel"]
    scale = denoiser["scale"]
    identity = np.eye(denoiser["up"].shape[-1], dtype=scale.dtype)
    return scale[..., None, None] * identity + denoiser["down"] @ denoiser["up"]


def times_kernel(
    denoiser: Mapping[str, Any], groups: int, kernel: Float[AnyArray, "groups d columns"]
) -> Float[AnyArray, "groups d columns"]:
    """Returns K_D·K for a layer's kernel K; rank r costs 2·r·d·columns, not d²·columns."""

    def product(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    leaves = {name: denoiser[name] for name in (*FACTORS, "kernel") if name in denoiser}
    leaves = {name: leaf if groups > 1 else leaf[None] for name, leaf in leaves.items()}
    if not is_low_rank(denoiser):
        return product(leaves["kernel"], kernel)
    return leaves["scale"][:, None, None] * kernel + product(leaves["down"], product(leaves["up"], kernel))
