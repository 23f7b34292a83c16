"""Corruptions of images, in JAX: the noise of image i depends on (seed, i) alone, not on the batch it is in."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from drep_jax.errors import ConfigError, did_you_mean

CLEAN = "clean"


def gaussian(image: Float[Array, "h w c"], key: jax.Array, std: float) -> Float[Array, "h w c"]:
    """Returns image + std · z with z ~ N(0, I); std in grey levels of 0..255."""
    return image + std * jax.random.normal(key, image.shape, image.dtype)


# Another corruption is one function (image, key, strength) -> image and one line here.
CORRUPTIONS: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "gaussian": gaussian,
}


def parse_corruption(spec: str) -> tuple[str, float]:
    """Splits `NAME:STRENGTH` into the two; `clean` stands alone and has strength 0.

    Raises:
      ConfigError: for an unknown name, or a strength that is not a finite number of at least 0.
    """
    name, colon, strength = spec.partition(":")
    if name == CLEAN and not colon:
        return CLEAN, 0.0
    if name not in CORRUPTIONS:
        if name == CLEAN:
            raise ConfigError(f'The corruption "{CLEAN}" takes no strength; got "{spec}".')
        raise ConfigError(f'Unknown corruption "{name}".{did_you_mean(name, [CLEAN, *CORRUPTIONS])}')
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(
            f'The corruption "{name}" needs a finite strength of at least 0, as in "{name}:20"; got "{spec}".'
        )
    return name, value


def corrupt(
    images: Num[Array, "b h w c"], index: Int[Array, "b"], name_and_strength: str, seed: int
) -> Float[Array, "b h w c"]:
    """Corrupts images, each by random numbers of its own.

    Args:
      images: (B, H, W, C), grey levels from 0 to 255; integers are taken to float32.
      index: (B,), each image's index in its source: the same image is always corrupted in the same way.
      name_and_strength: `clean`, or as in `gaussian:20`; static under jit.
      seed: another seed is other noise.

    Returns:
      (B, H, W, C), float, clipped to 0..255.
    """
    name, strength = parse_corruption(name_and_strength)
    images = images if jnp.issubdtype(images.dtype, jnp.floating) else images.astype(jnp.float32)
    if name == CLEAN:
        return images
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index)
    noisy = jax.vmap(CORRUPTIONS[name], in_axes=(0, 0, None))(images, keys, strength)
    return jnp.clip(noisy, 0, 255)
