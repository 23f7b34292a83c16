"""Random numbers of one example, from its own key: noise, and samples of feature vectors."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int


def threefry(key: jax.Array) -> jax.Array:
    """Returns a threefry key, made from `key` if it is of another generator.

    Other generators ("rbg") mapped over keys draw for the whole batch, not for each key.
    """
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


def draw(keys: jax.Array, shape: tuple[int, ...], dtype: Any) -> Float[Array, "batch *shape"]:
    """Draws ε ~ N(0, I) for every example, each as a function of its own key alone.

    The keys are mapped over in two chunks. XLA does not fuse the result of a loop into its users,
    so the noise is not drawn again at each use. Both words of every threefry block are used, unlike
    in `jax.random`. Together this halves the cost of the noise.

    Args:
      keys: (batch,) threefry keys.
      shape: of one example's noise.
      dtype: a floating type.

    Returns:
      (batch, *shape).
    """

    def draw_one(key: Any) -> Any:
        if dtype != jnp.float32:
            return jax.random.normal(key, shape, dtype)
        size = math.prod(shape)
        bits = threefry_2x32(jax.random.key_data(key), jnp.arange(size + size % 2, dtype=jnp.uint32))[:size]
        uniform = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0  # [0, 1)
        limit = jnp.float32(1.0 - 2.0**-24)
        return jnp.float32(math.sqrt(2.0)) * jax.lax.erf_inv(jnp.maximum(2.0 * uniform - limit, -limit)).reshape(shape)

    return jax.lax.map(draw_one, keys, batch_size=-(-keys.shape[0] // 2))


def systematic(key: jax.Array, total: int, fraction: float) -> Int[Array, " picks"]:
    """Draws a systematic sample: evenly spaced positions from a random start, each equally likely.

    Args:
      key: of the start.
      total: number of positions.
      fraction: of them to draw, in (0, 1].

    Returns:
      max(1, round(fraction·total)) different positions in 0…total − 1.

    >>> sorted(systematic(jax.random.key(0), 12, 0.25).tolist())
    [1, 5, 9]
    """
    count = max(1, round(fraction * total))
    spacing = (np.arange(count) * total) // count  # the product needs NumPy's int64
    return (jax.random.randint(key, (), 0, total) + jnp.asarray(spacing, jnp.int32)) % total
