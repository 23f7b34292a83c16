"""Sums over the feature vectors of a batch, all at once or in parts."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import sampled_features
from drep_jax.core.sites import Site
from drep_jax.typing import AnyArray

ROW_BLOCKS = 4
"""Largest number of row blocks of Σ (F − shift)(F − shift)ᵀ, which is symmetric.

Only the part of each block from the diagonal on is summed. With four blocks that is 5/8 of all
operations."""


LEAST_BLOCK = 192
"""Least number of rows in a block; smaller products lose more speed than they save operations."""


def row_blocks(width: int) -> list[tuple[int, int]]:
    """Returns (first row, end row) of every block of a symmetric matrix."""
    rows = max(LEAST_BLOCK, -(-width // ROW_BLOCKS))
    return [(first, min(first + rows, width)) for first in range(0, width, rows)]


def vector_sums(
    vectors: Float[AnyArray, "n *groups d"], counted: Bool[AnyArray, " n"], shift: Float[AnyArray, "*groups d"]
) -> dict[str, Float[Array, "..."]]:
    """Returns the sums of the counted vectors around `shift`."""
    selected = counted.reshape(-1, *(1,) * shift.ndim)
    centered = jnp.where(selected, vectors.astype(shift.dtype) - shift[None], 0.0)
    product = "nd,ne->de" if shift.ndim == 1 else "ngd,nge->gde"
    sums = {"count": jnp.sum(counted, dtype=centered.dtype), "first": jnp.sum(centered, axis=0)}
    for index, (first, end) in enumerate(row_blocks(shift.shape[-1])):
        rows, columns = centered[..., first:end], centered[..., first:]
        sums[f"second{index}"] = jnp.einsum(product, rows, columns, precision=jax.lax.Precision.HIGHEST)
    return sums


def sums_in_parts(
    site: Site, layer: Layer, x: Any, picks: Any, mask: Any, shift: Any, rows: int, valid: Any = None
) -> dict[str, Any]:
    """Returns the sums of windows, of which only so many of each image are gathered at once.

    Args:
      site, layer, x: a call.
      picks: (batch, used) windows of each image.
      mask: (batch,) 1 for images that count.
      shift: near the mean.
      rows: windows of an image that are gathered at once.
      valid: (batch, windows) which of all windows count; None if all do.
    """
    used = picks.shape[1]
    parts = -(-used // rows)
    places = jnp.arange(parts * rows).reshape(parts, rows)

    def part(sums: Any, place: Any) -> tuple[Any, None]:
        here = jnp.take(picks, jnp.minimum(place, used - 1), axis=1)
        vectors = sampled_features(layer, site.kind, x, here).reshape(-1, *shift.shape)
        counted = jnp.logical_and(mask[:, None] > 0, place[None] < used)
        if valid is not None:
            counted = counted & jnp.take_along_axis(valid, here, axis=1)
        counted = counted.reshape(-1)
        return jax.tree_util.tree_map(jnp.add, sums, vector_sums(vectors, counted, shift)), None

    shapes = jax.eval_shape(lambda: vector_sums(jnp.zeros((1, *shift.shape)), jnp.ones(1, bool), shift))
    start = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(part, start, places)[0]
