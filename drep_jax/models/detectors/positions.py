"""Sine encoding of the places of a feature map with padding, as in DETR (Carion et al. 2020)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sine_positions(
    valid: Bool[Array, "batch height width"], width: int = 256, *, temperature: float = 10_000.0, eps: float = 1e-6
) -> Float[Array, "batch height width features"]:
    """Returns the encoding, half of the features for the row and half for the column.

        place = 2π · (number of valid cells up to here) / (that of the last + eps), along the axis
        features 2i, 2i + 1 of an axis: sin and cos of place / temperature^(2i / (width/2))

    Args:
      valid: true on cells of the image, false on padding. Padding gets numbers, too; masks of the
        attention leave it out.
      width: number of features, a multiple of 4.
      temperature: of the frequencies.
      eps: of the division.
    """
    axes = []
    for axis in (1, 2):
        count = jnp.cumsum(valid, axis=axis, dtype=jnp.float32)
        last = count[:, -1:] if axis == 1 else count[:, :, -1:]
        place = count / (last + eps) * (2 * math.pi)
        frequency = jnp.asarray(
            [temperature ** (2 * (channel // 2) / (width // 2)) for channel in range(width // 2)], jnp.float32
        )
        angle = place[..., None] / frequency[None, None, None]
        pairs = jnp.stack([jnp.sin(angle[..., 0::2]), jnp.cos(angle[..., 1::2])], axis=-1)
        axes.append(pairs.reshape(*valid.shape, width // 2))
    return jnp.concatenate(axes, axis=-1)
