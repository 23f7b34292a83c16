"""Which part of a padded batch is image."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def shape_of(maps: Float[Array, "batch height width channels"]) -> tuple[int, int]:
    """Returns (height, width) of images or maps."""
    height, width = maps.shape[1:3]
    return height, width


def extents(
    shape: tuple[int, int], size: Float[Array, "batch 2"] | None, batch: int, dtype: Any
) -> Float[Array, "batch 2"]:
    """Returns (height, width) of each image without its padding.

    Args:
      shape: (height, width) of the network's input.
      size: of each image without its padding; None where nothing is padded.
      batch: number of images.
      dtype: of the result.
    """
    if size is None:
        return jnp.broadcast_to(jnp.asarray(shape, dtype)[None], (batch, 2))
    return jnp.asarray(size, dtype)


def valid_cells(
    shape: tuple[int, int], cells: tuple[int, int], size: Float[Array, "batch 2"] | None, batch: int
) -> Bool[Array, "batch rows columns"]:
    """Returns which cells of a map are of the image: those whose first pixel is, as PyTorch resizes masks ("nearest").

    >>> valid_cells((64, 96), (2, 3), jnp.array([[64.0, 33.0]]), 1)[0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 0]]

    Args:
      shape: (height, width) of the network's input.
      cells: (rows, columns) of the map.
      size: (height, width) of each image without its padding; None where nothing is padded.
      batch: number of images.
    """
    if size is None:
        return jnp.ones((batch, *cells), bool)
    rows, columns = (
        (jnp.arange(count) * side // count)[None] < jnp.asarray(size)[:, axis, None]
        for axis, (count, side) in enumerate(zip(cells, shape, strict=True))
    )
    return rows[:, :, None] & columns[:, None, :]
