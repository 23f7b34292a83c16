"""Least squares at one site (measured noise): sums over features and targets, and their solution.

The targets t of features w are t = u·K + δ, with u the clean feature, K a layer's kernel (or I) and
δ a correction of the layer's output. What w does not explain as it is, is the residual r = t − w·K.
The solution is drawn to K by a ridge λ:

    K* = K + (E[w wᵀ] + λI)⁻¹ E[w rᵀ]

It becomes a denoiser that fuses to K*, see `drep_jax.core.measured`. Devices sum over a chunk of
images in float32; sums are joined and solved on the host in float64, by Cholesky factors.
"""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float, Float64

from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import bias_from_columns, features, kernel_from_matrix, sampled_features, with_part
from drep_jax.core.sites import Site
from drep_jax.parallel import devices
from drep_jax.typing import AnyArray

BATCHED = 64
"""Largest width of grouped matrices that are solved side by side."""


BLOCK = 2**18
"""Numbers of a temporary array of the sums."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What decides the arithmetic of a site's sums: equal forms share one program.

    Attributes:
      layer: of the site, without its name.
      kind: "dense", "patch" or "pointwise"; how features are read.
      groups, width: G and d.
      columns: of K for each group.
      positions: feature vectors of an image.
      stride: every so many of them are used.
      centered: whether means are subtracted, because the denoiser may have a constant.
    """

    layer: Layer
    kind: str
    groups: int
    width: int
    columns: int
    positions: int
    stride: int
    centered: bool

    @property
    def picks(self) -> int:
        """Feature vectors used of an image."""
        return max(1, self.positions // self.stride)


def positions_in(site: Site, layer: Layer, x: Any, rows: int) -> int:
    """Returns the number of feature vectors of an image at a call.

    Args:
      site, layer: the site and its first layer.
      x: shape and type of the layer's input.
      rows: number of images in it, those of all streams.
    """
    shape = jax.eval_shape(lambda x: features(layer, kind_of(site), x), x).shape
    return int(np.prod(shape)) // (site.groups * site.width * rows)


def form_of(site: Site, layer: Layer, positions: int, share: Fraction, images: int, vectors: int) -> Form:
    """Returns the form of the sums of a call.

    Args:
      site, layer: the site and its first layer.
      positions: feature vectors of an image at the call.
      share: weight of the call among those of the layer.
      images: number of corrupted images, of all streams.
      vectors: see `drep_jax.core.measured.measuring`; a call gets its share of them.
    """
    kind = kind_of(site)
    stride = max(1, int(positions / share) * images // (vectors * site.width))
    sizes = [layer.kernel_size // (layer.stack or 1) for layer in site.layers]
    columns = sum(sizes) // (site.groups * site.width)
    # without what tells equal layers apart
    nameless: dict[str, Any] = {"path": (), "stack": None, "scan": None, "reads": 0, "order": 0, "writable": True}
    layer = dataclasses.replace(layer, **nameless, refusal=None, calls=1, spread=False, bias=False, sources=())
    return Form(layer, kind, site.groups, site.width, columns, positions, stride, site.bias)


def kind_of(site: Site) -> str:
    """Returns how a site's features are read: a 1×1 convolution reads patches of one pixel."""
    window = site.layers[0].window
    return "patch" if window is not None and window.single else site.kind


class Sums(NamedTuple):
    """Sums over images, each averaged over its feature vectors and corrupted streams.

    Attributes:
      images: their number.
      mean_w, mean_t, mean_r: means of features (groups, d), and of targets and residuals (groups,
        columns); zero if nothing is centered.
      square: Σ w wᵀ about the means, (groups, d, d).
      cross: Σ w rᵀ about the means, (groups, d, columns).
      power_t, power_r: Σ ‖t‖² and Σ ‖r‖² about the means, (groups,).
    """

    images: Any
    mean_w: Any
    mean_t: Any
    mean_r: Any
    square: Any
    cross: Any
    power_t: Any
    power_r: Any


# ---------------------------------------------------------------------------------------------------------------------
# On a device
# ---------------------------------------------------------------------------------------------------------------------


def chunk_sums(
    form: Form,
    x: Float[Array, "rows *input_shape"],
    matrix: Float[Array, "groups d columns"] | None,
    delta: Float[Array, "corrupted_rows *output_shape"] | None,
    weights: Float[Array, " corrupted"],
    index: Any,
    mask: Float[Array, " images"],
    valid: Bool[Array, "*positions"] | None = None,
) -> Sums:
    """Returns the sums over a chunk of images, corrupted streams only, in float32.

    Args:
      form: of the site.
      x: inputs of the layer, the clean stream first, then the corrupted ones.
      matrix: K; None for I.
      delta: correction of the layer's output for each corrupted stream, or None.
      weights: of the corrupted streams; they sum to 1.
      index: (images,), which vectors are used depends on it.
      mask: 1 for images that count, else 0.
      valid: which of all feature vectors count; a vector does if it does so in the clean stream, too.
        The others are missing in the sums, and in the number of images as far as they are. None if
        all count.
    """
    streams, images, groups = weights.shape[0] + 1, mask.shape[0], form.groups
    starts = index % form.stride if form.positions >= form.stride else index % form.positions
    picks = starts[:, None] + form.stride * jnp.arange(form.picks)[None]

    if form.stride == 1:
        f = features(form.layer, form.kind, x)
    else:
        f = sampled_features(form.layer, form.kind, x, jnp.tile(picks, (streams, 1)))
    f = f.reshape(streams, images * form.picks, groups, -1).astype(jnp.float32)
    if valid is not None:
        valid = valid.reshape(streams, images, form.positions)
        valid = valid if form.stride == 1 else jnp.take_along_axis(valid, picks[None], axis=2)
        valid = valid.reshape(streams, -1)
        valid = valid[:1] & valid[1:]
        f = jnp.where(jnp.concatenate([valid.any(0, keepdims=True), valid])[:, :, None, None], f, 0.0)
    u, w = f[0], f[1:]

    def times_matrix(a: Any) -> Any:
        return a if matrix is None else jnp.einsum("...gd,gdc->...gc", a, matrix, precision="highest")

    t, r = times_matrix(u)[None], times_matrix(u[None] - w)
    if delta is not None:
        d = delta.reshape(streams - 1, images, form.positions, groups, -1).astype(jnp.float32)
        if form.stride > 1:
            d = jnp.take_along_axis(d, picks[None, :, :, None, None], axis=2)
        d = d.reshape(r.shape)
        t, r = t + d, r + d
    t = jnp.broadcast_to(t, r.shape)
    count = mask.sum()
    each = (weights[:, None] * jnp.repeat(mask, form.picks)[None] / form.picks).astype(jnp.float32)
    if valid is not None:
        each = jnp.where(valid, each, 0.0)
        count = each.sum()
        t, r = (jnp.where(valid[:, :, None, None], a, 0.0) for a in (t, r))

    def center(a: Any) -> tuple[Any, Any]:
        if not form.centered:
            return jnp.zeros(a.shape[2:], a.dtype), a
        mean = jnp.einsum("sn,sngd->gd", each, a, precision="highest") / jnp.where(count > 0, count, 1.0)
        return mean, a - mean[None, None]

    (mean_w, w), (mean_t, t), (mean_r, r) = center(w), center(t), center(r)
    weighted = each[:, :, None, None] * w
    return Sums(
        count,
        mean_w,
        mean_t,
        mean_r,
        jnp.einsum("sngd,snge->gde", weighted, w, precision="highest"),
        jnp.einsum("sngd,snge->gde", weighted, r, precision="highest"),
        jnp.einsum("sn,sng->g", each, jnp.sum(t * t, axis=-1), precision="highest"),
        jnp.einsum("sn,sng->g", each, jnp.sum(r * r, axis=-1), precision="highest"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# On the host
# ---------------------------------------------------------------------------------------------------------------------


def weighted(sums: Sums, share: Fraction) -> Sums:
    """Returns the sums of one of several calls with the weight of the call; the weights of all calls sum to 1."""
    if share == 1:
        return sums
    images, square, cross, power_t, power_r = (
        float(share) * np.asarray(value, np.float64)
        for value in (sums.images, sums.square, sums.cross, sums.power_t, sums.power_r)
    )
    return Sums(images, sums.mean_w, sums.mean_t, sums.mean_r, square, cross, power_t, power_r)


def joined(one: Sums | None, other: Sums) -> Sums:
    """Returns the sums over two sets of images (Chan, Golub and LeVeque, 1983), in float64.

    The arrays of the first are used again, and should not be used elsewhere.
    """
    if one is None or not one.images:
        return Sums(*(np.array(value, np.float64) for value in other))
    if not other.images:
        return one
    count = one.images + other.images
    factor, share = one.images * other.images / count, other.images / count
    w, t, r = (np.asarray(b, np.float64) - a for a, b in zip(one[1:4], other[1:4], strict=True))
    for total, part in zip(one[1:], (share * w, share * t, share * r, *other[4:]), strict=True):
        total += part
    for total, right in ((one.square, w), (one.cross, r)):
        add_outer(total, factor * w, right)
    for total, mean in ((one.power_t, t), (one.power_r, r)):
        total += factor * (mean * mean).sum(axis=-1)
    return one._replace(images=count)


def add_outer(total: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Adds left·rightᵀ of each group, some rows at a time."""
    if not (left.any() and right.any()):
        return
    rows = max(1, BLOCK // max(1, len(total) * total.shape[-1]))
    for first in range(0, total.shape[1], rows):
        total[:, first : first + rows] += left[:, first : first + rows, None] * right[:, None, :]


def of_all_hosts(local: Sums) -> Sums:
    """Returns the sums over the images of all hosts, the same bits on each."""
    if devices.host()[1] == 1:
        return local
    by_host = [devices.gather(leaf).reshape(-1, *leaf.shape) for leaf in map(np.asarray, local)]
    total = joined(None, Sums(*(leaf[0] for leaf in by_host)))
    for host in range(1, len(by_host[0])):
        total = joined(total, Sums(*(leaf[host] for leaf in by_host)))
    return total


def ridge_change(
    square: Float64[np.ndarray, "groups d d"], cross: Float64[np.ndarray, "groups d any"], ridge: float
) -> Float64[np.ndarray, "groups d any"]:
    """Returns K* − K = (S + λI)⁻¹ C.

    Args:
      square: S = E[w wᵀ]; its memory is used.
      cross: C = E[w rᵀ].
      ridge: λ over the mean power of a group's features, above 0.

    Raises:
      numpy.linalg.LinAlgError: if S + λI is not positive definite in float64.
    """
    diagonal = np.einsum("gdd->gd", square)
    power = diagonal.mean(axis=-1, keepdims=True)
    diagonal += np.where(power > 0, ridge * power, 1.0)
    if square.shape[-1] <= BATCHED and len(square) > 1:
        np.linalg.cholesky(square)  # refuses what is not positive definite
        return np.linalg.solve(square, cross)
    # The transpose of a symmetric matrix has the order that LAPACK works on without a copy.
    options: dict[str, Any] = {"check_finite": False}
    factors = (scipy.linalg.cho_factor(m.T, overwrite_a=True, **options) for m in square)
    return np.stack([scipy.linalg.cho_solve(f, c, **options) for f, c in zip(factors, cross, strict=True)])


class Solution(NamedTuple):
    """The solution of a site, in float64.

    Attributes:
      kernel: (I − A)ᵀ.
      constant: −c; None where the denoiser has none.
      before, after: E‖t − wK‖² and E‖t − wK* − c‖², each over E‖t − E t‖².
    """

    kernel: Float64[np.ndarray, "groups d d"]
    constant: Float64[np.ndarray, "groups d"] | None
    before: float
    after: float


def regress(
    sums: Sums, matrix: Float64[np.ndarray, "groups d columns"] | None, ridge: float, centered: bool
) -> Solution:
    """Solves the regression of a site.

    Args:
      sums: over all images.
      matrix: K of the targets; None for I, where the solution is the denoiser itself.
      ridge: λ over the mean power of the features; infinite to leave the site as it is.
      centered: whether the denoiser may have a constant.
    """
    before = (sums.power_r / sums.images).sum() + (sums.mean_r**2).sum()
    scale = max((sums.power_t / sums.images).sum(), 1e-300)
    if np.isinf(ridge):
        nothing = np.zeros_like(sums.square)
        constant = np.zeros_like(sums.mean_w) if centered else None
        return Solution(nothing, constant, float(before / scale), float(before / scale))
    change = ridge_change(sums.square / sums.images, sums.cross / sums.images, ridge)
    if matrix is None:
        kernel = -change
        inverse = None
    else:
        # K' − K = −N K for the smallest N: with K = Wᵀ this is A − I = W⁺(W* − W).
        inverse = np.linalg.pinv(matrix, rcond=1e-6)
        kernel = -change @ inverse
        change = -kernel @ matrix
    constant = None
    if centered:
        # The constant passes through W as well: its target is E t − W* E w.
        missing = sums.mean_r - np.einsum("gdc,gd->gc", change, sums.mean_w)
        constant = -(missing if inverse is None else np.einsum("gc,gcd->gd", missing, inverse))
    products = (change * (sums.square @ change - 2.0 * sums.cross)).sum()
    after = max(0.0, (sums.power_r.sum() + products) / sums.images)
    return Solution(kernel, constant, float(before / scale), float(after / scale))


def fused_leaves(
    layer: Layer,
    kind: str,
    leaves: Mapping[str, Any],
    matrix: Float64[np.ndarray, "groups d columns"],
    solution: Solution,
) -> tuple[AnyArray, ...]:
    """Returns a layer's parameters with a solution fused into them, in their own types and in tree order.

    Args:
      layer: a layer of the site, or its part.
      kind: from `kind_of`.
      leaves: its parameters; the other parts of the layer may be fused into them already.
      matrix: K.
      solution: of the site.
    """
    part = np.asarray(kernel_from_matrix(layer, kind, matrix - solution.kernel @ matrix))
    kernel = with_part(layer, leaves["kernel"], part.astype(leaves["kernel"].dtype))
    fused = {**leaves, "kernel": kernel}
    if solution.constant is not None:
        # A layer without bias adds it all the same (`alone`); deployed, the BatchNorm behind it does.
        columns = np.einsum("gdc,gd->gc", matrix, -solution.constant)
        bias = bias_from_columns(layer, kind, columns) + leaves.get("bias", np.zeros(1)).astype(np.float64)
        fused["bias"] = np.asarray(bias).astype(leaves.get("bias", leaves["kernel"]).dtype)
    return tuple(fused[name] for name in sorted(fused))
