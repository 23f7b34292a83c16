"""Random numbers of one example, a function of its own key: noise, and systematic samples of its feature vectors."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Int


def threefry(key: Any) -> Any:
    """Returns a threefry key: other generators ("rbg"), mapped over keys, draw for the batch and not for each key."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


def draw(keys: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns ε ~ N(0, I) of (keys, *shape), each (threefry) key's part a function of that key alone.

    Two chunks in a loop, because XLA fuses a loop's result into nothing: it would draw the noise again at each use. And
    both words of a threefry block are used, which `jax.random` does not; together they halve the cost of the noise.
    """

    def one(key: Any) -> Any:
        if dtype != jnp.float32:
            return jax.random.normal(key, shape, dtype)
        size = math.prod(shape)
        bits = threefry_2x32(jax.random.key_data(key), jnp.arange(size + size % 2, dtype=jnp.uint32))[:size]
        unit = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0  # [0, 1)
        inside = jnp.float32(1.0 - 2.0**-24)
        return jnp.float32(math.sqrt(2.0)) * jax.lax.erf_inv(jnp.maximum(2.0 * unit - inside, -inside)).reshape(shape)

    return jax.lax.map(one, keys, batch_size=-(-keys.shape[0] // 2))


def systematic(key: Any, total: int, share: float) -> Int[Array, " picked"]:
    """Returns the positions of a systematic sample: evenly spread from a random start, each position equally likely."""
    picked = max(1, round(share * total))
    spread = (np.arange(picked) * total) // picked  # in NumPy's int64: the product of two numbers of pixels
    return (jax.random.randint(key, (), 0, total) + jnp.asarray(spread, jnp.int32)) % total
