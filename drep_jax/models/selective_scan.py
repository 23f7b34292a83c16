"""Selective scan (Gu and Dao 2023) over images: h_k = exp(Δ_k A) h_{k-1} + Δ_k B_k x_k,  y_k = C_kᵀ h_k.

The scan goes row by row, as in reading, with no loop over all pixels. Every row is first scanned
from an empty state, all rows at once; then the states at the rows' ends are chained, h_row <- P_row
h_{row-1} + h'_row with P_row the product of a row's decays; and the state that a row starts with,
decayed, is added to its own. That is width + height steps instead of width · height, and memory
linear in their product. Decays are exp(Δ A) with A < 0 < Δ: all factors are at most 1, and nothing
is ever divided by them.

The gradient is a scan the other way: with g_k = C_k dy_k + exp(Δ_{k+1} A) g_{k+1} and r_k = exp(Δ_k
A) h_{k-1},

    dx = Δ Bᵀg,  dB = Δ Σ_channels g x,  dC = Σ_channels h dy,  dA = Σ_pixels Δ g r,  dΔ = Σ_states g (A r + B x).

It is written out because what is derived from the equations above needs twice the memory and, on
CPUs, twice the time.
"""

import functools
from typing import Any

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
    wide = jnp.promote_types(jnp.result_type(x, delta), jnp.float32)
    x, delta, a, b, c = (t.astype(wide) for t in (x, delta, a, b, c))
    return _scan(1 if by_columns else 2, reverse, x, delta, a, b, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(along: int, reverse: bool, x: Any, delta: Any, a: Any, b: Any, c: Any) -> Maps:
    return _forward(along, reverse, x, delta, a, b, c)[0]


def _forward(along: int, reverse: bool, x: Any, delta: Any, a: Any, b: Any, c: Any) -> tuple[Maps, Any]:
    states = _recur(_decay(delta, a), _inputs(x, delta, b), along, reverse)
    return jnp.sum(states * c[..., None], axis=-2), (x, delta, a, b, c, states)


def _backward(along: int, reverse: bool, saved: Any, dy: Maps) -> tuple[Any, ...]:
    x, delta, a, b, c, states = saved
    decay = _decay(delta, a)
    grads = _recur(decay, c[..., None] * dy[..., None, :], along, not reverse, late=True)
    remembered = states - _inputs(x, delta, b)
    via_decay = grads * remembered
    d_delta = jnp.sum(via_decay * a[None, None, None] + grads * b[..., None] * x[..., None, :], axis=-2)
    d_a = jnp.sum(via_decay * delta[..., None, :], axis=(0, 1, 2))
    d_x = delta * jnp.sum(grads * b[..., None], axis=-2)
    return (
        d_x,
        d_delta,
        d_a,
        _over_channels(grads * (delta * x)[..., None, :]),
        _over_channels(states * dy[..., None, :]),
    )


_scan.defvjp(_forward, _backward)


def _decay(delta: Maps, a: Any) -> States:
    return jnp.exp(delta[..., None, :] * a[None, None, None])


def _inputs(x: Maps, delta: Maps, b: Any) -> States:
    return (delta * x)[..., None, :] * b[..., None]


def _over_channels(values: States) -> Float[Array, "batch rows columns states"]:
    """Returns the sums over the channels, as a matrix product: on CPUs XLA's own sum takes 18 times as long."""
    return jnp.matmul(values, jnp.ones(values.shape[-1], values.dtype), precision=lax.Precision.HIGHEST)


def _recur(decay: States, inputs: States, along: int, reverse: bool, late: bool = False) -> States:
    """Returns h with h_k = decay_k h_{k-1} + inputs_k, or decay_{k-1} h_{k-1} + inputs_k if `late`.

    Args:
      decay: in [0, 1].
      inputs: of the same shape.
      along: the axis, 1 or 2, of neighboring pixels; the other one leads from line to line.
      reverse: whether k counts from the last pixel.
      late: whether a state decays as it is left instead of as the next is reached.
    """

    def step(state: tuple[Array, Array], pixel: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        decay, inputs = pixel
        if late:
            seen = state[0], state[1] + inputs
            return (decay * seen[0], decay * seen[1]), seen
        seen = decay * state[0], decay * state[1] + inputs
        return seen, seen

    def chain(start: Array, line: tuple[Array, Array]) -> tuple[Array, Array]:
        return line[0] * start + line[1], start

    pixels = jnp.moveaxis(decay, along, 0), jnp.moveaxis(inputs, along, 0)
    empty = jnp.ones_like(pixels[0][0]), jnp.zeros_like(pixels[1][0])
    ends, (decayed, own) = lax.scan(step, empty, pixels, reverse=reverse)
    lines = jnp.moveaxis(ends[0], 1, 0), jnp.moveaxis(ends[1], 1, 0)
    _, starts = lax.scan(chain, jnp.zeros_like(lines[1][0]), lines, reverse=reverse)
    return jnp.moveaxis(own + decayed * jnp.moveaxis(starts, 0, 1)[None], 0, along)
