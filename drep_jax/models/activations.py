"""The exact GELU, x·Φ(x), by erf, and the approximation that CLIP was trained with, x·σ(1.702 x)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x·(1 + erf(x/√2))/2, in float32 at least.

    `jax.nn.gelu` takes erfc, for the last digits of its left tail; on a CPU that is two to three
    times slower, and neither PyTorch nor timm do.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x·σ(1.702 x), in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)
