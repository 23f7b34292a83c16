"""Bilinear resizing of maps as PyTorch's `interpolate(align_corners=False)`: pixel centers align, no antialiasing.

    y[i] = (1 − w) x[⌊s⌋] + w x[⌊s⌋ + 1]      s = (i + ½) n / m − ½, clipped to [0, n − 1], w = s − ⌊s⌋

along each axis, for n pixels in and m pixels out.
"""

import jax
from jaxtyping import Array, Float


def resize_bilinear(x: Float[Array, "batch height width channels"], size: tuple[int, int]) -> Array:
    """Returns maps of another size.

    Args:
      x: the maps.
      size: (height, width) of the result, in pixels.
    """
    if x.shape[1:3] == size:
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)
