"""Selective scan (Gu and Dao 2023) over images: h_k = exp(Δ_k A) h_{k-1} + Δ_k B_k x_k,  y_k = C_kᵀ h_k.

The scan goes row by row, as in reading, with no loop over all pixels. Every row is first scanned from an empty state, all rows
at once; then the states at the rows' ends are chained, h_row <- P_row h_{row-1} + h'_row with P_row the product of a row's
decays; and the state that a row starts with, decayed, is added to its own. That is width + height steps instead of
width · height, and memory linear in their product. Decays are exp(Δ A) with A < 0 < Δ: all factors are at most 1, and
nothing is ever divided by them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Maps = Float[Array, "batch rows columns channels"]
States = Float[Array, "batch rows columns states channels"]


def selective_scan(
    x: Maps,
    delta: Maps,
    a: Float[Array, "states channels"],
    b: Float[Array, "batch rows columns states"],
    c: Float[Array, "batch rows columns states"],
    *,
    by_columns: bool = False,
    reverse: bool = False,
) -> Maps:
    """Scans each image pixel by pixel.

    Args:
      x: what is read.
      delta: Δ > 0, the step.
      a: A < 0.
      b, c: B and C of every pixel, shared by the channels.
      by_columns: goes down the columns, left to right, instead of along the rows, top to bottom.
      reverse: starts at the last pixel.

    Returns:
      y, computed in float32 at least.
    """
    if by_columns:
        x, delta, b, c = (jnp.swapaxes(t, 1, 2) for t in (x, delta, b, c))
    wide = jnp.promote_types(jnp.result_type(x, delta), jnp.float32)
    x, delta, a, b, c = (t.astype(wide) for t in (x, delta, a, b, c))
    delta = delta[..., None, :]
    decay = jnp.exp(delta * a.reshape((1, 1, 1, *a.shape)))
    states = linear_recurrence(decay, delta * b[..., None] * x[..., None, :], reverse)
    y = jnp.sum(states * c[..., None], axis=-2)
    return jnp.swapaxes(y, 1, 2) if by_columns else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear_recurrence(decay: States, inputs: States, reverse: bool = False) -> States:
    """Returns h with h_k = decay_k h_{k-1} + inputs_k, k going along the rows one after the other, or back.

    Args:
      decay: in [0, 1].
      inputs: of the same shape.
      reverse: whether k counts from the last pixel.
    """
    return _recur(decay, inputs, reverse)


def _recur(decay: States, inputs: States, reverse: bool) -> States:
    def along(
        carry: tuple[Array, Array], pixel: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        decayed, state = pixel[0] * carry[0], pixel[0] * carry[1] + pixel[1]
        return (decayed, state), (decayed, state)

    def down(state: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        return row[0] * state + row[1], state

    columns = jnp.moveaxis(decay, 2, 0), jnp.moveaxis(inputs, 2, 0)
    empty = jnp.ones_like(columns[0][0]), jnp.zeros_like(columns[1][0])
    ends, (decayed, states) = lax.scan(along, empty, columns, reverse=reverse)
    rows = jnp.moveaxis(ends[0], 1, 0), jnp.moveaxis(ends[1], 1, 0)
    _, starts = lax.scan(down, jnp.zeros_like(rows[1][0]), rows, reverse=reverse)
    return jnp.moveaxis(states + decayed * jnp.moveaxis(starts, 0, 1)[None], 0, 2)


def _forward(decay: States, inputs: States, reverse: bool) -> tuple[States, tuple[States, States]]:
    states = _recur(decay, inputs, reverse)
    return states, (decay, states)


def _backward(reverse: bool, saved: tuple[States, States], grad: States) -> tuple[States, States]:
    """Returns the gradients: g_k = grad_k + decay_{k+1} g_{k+1} is a recurrence the other way."""
    decay, states = saved
    inputs = _recur(_previous(decay, not reverse), grad, not reverse)
    return inputs * _previous(states, reverse), inputs


def _previous(values: States, reverse: bool) -> States:
    """Returns v_{k-1} at each k, and 0 at the first."""
    flat = values.reshape(values.shape[0], -1, *values.shape[3:])
    zero = jnp.zeros_like(flat[:, :1])
    shifted = [flat[:, 1:], zero] if reverse else [zero, flat[:, :-1]]
    return jnp.concatenate(shifted, axis=1).reshape(values.shape)


linear_recurrence.defvjp(_forward, _backward)
