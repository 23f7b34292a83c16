"""Least squares at one site (measured noise): sums over features and targets, and their solution.

The targets t of features w are t = u·K + δ, with u the clean feature, K a layer's kernel (or I) and
δ a correction of the layer's output. The solution is drawn to K by a ridge λ:

    K* = (E[w wᵀ] + λI)⁻¹ (E[w tᵀ] + λK)

It becomes a denoiser that fuses to K*, see `drep_jax.core.measured`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Shaped

from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import features
from drep_jax.core.sites import Site
from drep_jax.parallel import devices
from drep_jax.typing import AnyArray, Tree


def regression_sums(
    site: Site,
    layer: Layer,
    x: Float[Array, "streams rows *input_shape"],
    matrix: Float64[Array, "groups d columns"],
    delta: Float[Array, "corrupted rows *output_shape"] | None,
    weights: Float64[Array, " corrupted"],
    *,
    parts: int,
    chunks: int,
    vectors: int,
) -> dict[str, Float64[Array, "..."]]:
    """Returns means and centered second moments of features w and targets t, corrupted streams only.

    Args:
      site, layer: the site and its first layer.
      x: inputs of the layer, by stream.
      matrix: K; the targets are t = u·K + delta.
      delta: correction of the layer's output for each corrupted stream, or None.
      weights: of the corrupted streams.
      parts: chunks on this device.
      chunks: chunks of all devices, without repetitions.
      vectors: see `drep_jax.core.measured.measuring`.

    Returns:
      "square" E[w wᵀ] (groups, d, d), "cross" E[w tᵀ] (groups, d, columns), "power" E‖t‖²
      (groups,), all centered; "mean_w" (groups, d) and "mean_t" (groups, columns).
    """
    groups, d, columns = matrix.shape
    streams = x.shape[0]
    chunk = x.shape[1] // parts  # rows: images, or windows that they are cut into

    def cut(a: Any) -> Any:
        return jnp.moveaxis(a.reshape(a.shape[0], parts, chunk, *a.shape[2:]), 1, 0)

    feature_shape = jax.eval_shape(
        lambda a: features(layer, site.kind, a),
        jax.ShapeDtypeStruct(x.shape[2:] and (chunk, *x.shape[2:]), x.dtype),
    ).shape
    positions = int(np.prod(feature_shape)) // (groups * d)  # in a chunk
    stride = max(1, positions * chunks * (streams - 1) // (vectors * d))
    kernel = matrix.astype(jnp.float32)
    target_is_feature = delta is None and columns == d

    def pairs(piece: Any) -> tuple[Any, Any]:
        """Returns w and t of a chunk, (corrupted, vectors, groups, d or columns)."""
        index, rows, *corrections = piece
        f = features(layer, site.kind, rows.reshape(-1, *rows.shape[2:])).reshape(streams, -1, groups, d)
        f = _every(stride, index, f).astype(jnp.float32)
        u, w = f[0], f[1:]
        t = u if target_is_feature else jnp.einsum("ngd,gdc->ngc", u, kernel, precision="highest")
        t = jnp.broadcast_to(t[None], (streams - 1, *t.shape))
        if corrections:
            correction = corrections[0].reshape(streams - 1, -1, groups, columns)
            t = t + _every(stride, index, correction)
        return w, t

    indices = devices.device_index() * parts + jnp.arange(parts)
    pieces = (indices, cut(x), *(() if delta is None else (cut(delta),)))

    def add(total: Any, new: Any, index: Any) -> Any:
        weight = jnp.where(index < chunks, 1.0 / chunks, 0.0)
        return jax.tree_util.tree_map(lambda a, b: a + b.astype(jnp.float64) * weight, total, new)

    def add_means(total: Any, piece: Any) -> Any:
        new = tuple(jnp.einsum("s,sgd->gd", weights, a.mean(axis=1)) for a in pairs(piece))
        return add(total, new, piece[0]), None

    mean_w, mean_t = jnp.zeros((groups, d)), jnp.zeros((groups, columns))
    if site.bias:
        mean_w, mean_t = devices.total(jax.lax.scan(add_means, (mean_w, mean_t), pieces)[0])
    shift_w, shift_t = mean_w.astype(jnp.float32), mean_t.astype(jnp.float32)

    def add_moments(total: Any, piece: Any) -> Any:
        w, t = pairs(piece)
        w, t = w - shift_w[None, None], t - shift_t[None, None]
        n = w.shape[1]
        weighted = (weights / n).astype(jnp.float32)[:, None, None, None] * w
        square = jnp.einsum("sngd,snge->gde", weighted, w, precision="highest")
        cross = jnp.einsum("sngd,snge->gde", weighted, t, precision="highest")
        power = jnp.einsum("s,sngc,sngc->g", weights / n, t, t)
        return add(total, (square, cross, power), piece[0]), None

    zeros = (jnp.zeros((groups, d, d)), jnp.zeros((groups, d, columns)), jnp.zeros(groups))
    square, cross, power = devices.total(jax.lax.scan(add_moments, zeros, pieces)[0])
    return {
        "square": square,
        "cross": cross,
        "power": power,
        "mean_w": shift_w.astype(jnp.float64),
        "mean_t": shift_t.astype(jnp.float64),
    }


def _every(stride: int, start: Any, a: Shaped[AnyArray, "streams n *rest"]) -> Shaped[Array, "streams picks *rest"]:
    """Returns every `stride`-th entry of the second axis; `start` moves from chunk to chunk."""
    count = max(1, a.shape[1] // stride)
    picks = (start % stride + stride * jnp.arange(count)) % a.shape[1]
    return jnp.take(a, picks, axis=1)


def regress(
    site: Site, matrix: Float64[Array, "groups d columns"], sums: Tree, ridge: float, direct: bool
) -> tuple[Tree, Tree]:
    """Solves the regression of a site.

    Args:
      site: the site.
      matrix: K of the targets t = u·K + delta.
      sums: see `regression_sums`.
      ridge: λ over the mean power of the features.
      direct: whether the solution is the map itself (K = I), not a layer's weights.

    Returns:
      {"kernel": (I − A)ᵀ, "bias": −c} in float64, and the same with "errors" (before, after).
    """
    square, cross = sums["square"], sums["cross"]
    width = site.width
    eye = jnp.eye(width)
    power = jnp.trace(square, axis1=-2, axis2=-1) / width
    pull = jnp.where(power > 0, ridge * power, 1.0)[:, None, None]

    def solve(m: Any, r: Any) -> Any:
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(m), r)

    best = jax.vmap(solve)(square + pull * eye[None], cross + pull * matrix)
    change = best - matrix
    if direct:
        kernel = -change
    else:
        # K' − K = N K for the smallest N: with K = Wᵀ this is A − I = W⁺(W* − W).
        kernel = -change @ jnp.linalg.pinv(matrix, rtol=1e-6)
        best = matrix - kernel @ matrix
    denoiser = {"kernel": kernel}
    if site.bias:
        # The constant passes through W as well: its target is E t − W* E w.
        missing = sums["mean_t"] - jnp.einsum("gdc,gd->gc", best, sums["mean_w"])
        constant = missing if direct else jnp.einsum("gc,gcd->gd", missing, jnp.linalg.pinv(matrix, rtol=1e-6))
        denoiser["bias"] = -constant

    def error(m: Any) -> Any:
        return jnp.sum(m * (square @ m), axis=(-2, -1)) - 2 * jnp.sum(m * cross, axis=(-2, -1)) + sums["power"]

    scale = jnp.maximum(sums["power"].sum(), 1e-300)
    before, after = error(matrix), error(best)
    if site.bias:
        gap = sums["mean_t"] - jnp.einsum("gdc,gd->gc", matrix, sums["mean_w"])
        before = before + jnp.sum(gap**2, axis=-1)
    shape = site.denoiser_shape if site.stack is None else site.denoiser_shape[1:]
    denoiser = {"kernel": denoiser["kernel"].reshape(shape)} | (
        {"bias": denoiser["bias"].reshape(shape[:-1])} if site.bias else {}
    )
    errors = jnp.stack([before.sum() / scale, after.sum() / scale])
    return denoiser, {**denoiser, "errors": errors}
