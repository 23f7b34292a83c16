"""Measured noise: regress clean on corrupted features, site by site, each with the earlier sites already fused.

The paper assumes isotropic Gaussian noise at every layer. Where a corruption of the *images* is known, the noise at a site can
be measured: with u the feature of the clean image in the unfused backbone and w that of the corrupted image behind the
sites fused so far,

    A* = (Cov(u, w) + λI) (Cov(w) + λI)⁻¹        c* = E u − A* E w,

or with second moments and c* = 0 where a site may have no constant. The ridge λ pulls towards the identity, so that where
there is no evidence nothing changes. This is our extension of the paper.

In a residual network the shortcut q brings noise past every denoiser. Where a layer's output y meets it in a sum, z = L(y) + q
(see `drep_jax.core.interpreter`), the layer can answer for it: instead of W u it is fitted to W u + L⁻¹(q_clean − q), so that the
sum comes out clean. The fit is over the layer's own outputs,

    W* = (E[t wᵀ] + λW) (E[w wᵀ] + λI)⁻¹        A* = I + W⁺(W* − W),

the smallest denoiser that fuses to W* (or, if the layer has more outputs than inputs, to the nearest that one can).

All sites are solved in one program and one forward pass of all images, clean and corrupted side by side. The images are
divided among the devices of all hosts, in the chunks that one device would take after each other; each device adds up its own,
and solves every site from the sums of all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drep_jax.core.fusion import fuse_layer
from drep_jax.core.interpreter import Call, trace, walk
from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import features, kernel_matrix
from drep_jax.core.schedule import Schedule, reverse_steps
from drep_jax.core.sites import Site
from drep_jax.errors import DataError, NonFiniteError, SiteError
from drep_jax.parallel import devices
from drep_jax.trees import set_in
from drep_jax.typing import Path, Tree

CHUNK = 64
"""Images whose patches are held at once, at most."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What measuring gives.

    Attributes:
      denoise: the `denoise` subtree for rule "affine": kernel (I − A*)ᵀ and bias −c*.
      errors: {site name[copy]: (before, after)}, ‖t − W w‖² and ‖t − W* w − c‖² over ‖t − E t‖², on its images.
      outputs: what the backbone gave for the streams, (1 + streams, images, …).
    """

    denoise: Tree
    errors: dict[str, tuple[float, float]]
    outputs: np.ndarray


def measure(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    images: Float[Array | np.ndarray, "streams batch height width channels"],
    weights: Sequence[float],
    **options: Any,
) -> Measured:
    """Solves every site in execution order; `measuring` with these weights, once."""
    return measuring(backbone, variables, sites, images, **options)(weights)


def measuring(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    images: Float[Array | np.ndarray, "streams batch height width channels"],
    *,
    ridge: float = 1e-3,
    vectors: int = 400,
    shortcut: bool = True,
    chunk: int = CHUNK,
) -> Callable[[Sequence[float]], Measured]:
    """Returns a function of the streams' weights that solves every site in execution order; it compiles once.

    Args:
      backbone, variables: the frozen backbone.
      sites: where.
      images: normalised; the first stream is clean, the others are corrupted versions of the same images, in the same
        order. A stream that is the clean one again keeps clean accuracy. All are held in memory at once, each on one device.
      ridge: λ over the mean power of a site's features, above 0.
      vectors: feature vectors a site uses, in multiples of its width; of more than so many, an even sample.
      shortcut: whether layers answer for the noise of the shortcut that they are added to.
      chunk: images whose patches are held at once, at most; fewer take less memory.

    Returns:
      weights ↦ `Measured`; one weight for each stream after the first, at least 0; only their ratios matter.

    Raises:
      NonFiniteError: if features or solutions are not finite, naming the site.
      DataError: for fewer than two streams, or weights that do not fit them.
      SiteError: if a site's features cannot be followed.
    """
    if images.ndim < 3 or images.shape[0] < 2 or images.shape[1] < 1:
        raise DataError(
            f"Measuring needs a clean and at least one corrupted stream of images; got images {tuple(images.shape)}."
        )
    spread = _Spread.of(images.shape[1], chunk)
    solver = _Solver(sites, images.shape[0], ridge, vectors, shortcut, spread)
    program = devices.on_devices(lambda v, x, w: solver.run(backbone, v, x, w), in_axes=(None, 0, None))
    batch = spread.cut(np.asarray(images))

    def solve(weights: Sequence[float]) -> Measured:
        share = np.asarray(weights, np.float64)
        if share.shape != (images.shape[0] - 1,):
            raise DataError(
                f"{images.shape[0]} streams need one weight for each corrupted one; got {share.size} weights."
            )
        if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
            raise DataError(
                f"The weights of the corrupted streams must be at least 0 and not all 0, got {list(weights)}."
            )
        with jax.enable_x64(True):  # sums and solves are in float64; images and parameters stay in their own types
            outputs, kept = program(variables, batch, share / share.sum())
        return _collect(sites, devices.unreplicate(kept), spread.join(np.asarray(outputs)))

    return solve


def _collect(sites: Sequence[Site], kept: dict[Path, Any], outputs: np.ndarray) -> Measured:
    tree: Tree = {}
    errors = {}
    for site in sites:
        form = site.denoiser_shape
        if site.path not in kept:  # what it reads does not depend on the images
            leaves: Any = {"kernel": np.zeros(form, np.float32)}
            if site.bias:
                leaves["bias"] = np.zeros(form[:-1], np.float32)
            tree = set_in(tree, site.path, leaves)
            continue
        found = kept[site.path]
        if not all(np.isfinite(leaf).all() for leaf in jax.tree_util.tree_leaves(found)):
            raise NonFiniteError(
                f"{site.name}: the features of the clean or corrupted images are not finite, so nothing can be fitted to them. "
                "Check the images and the backbone's weights."
            )
        leaves = {"kernel": found["kernel"].reshape(form).astype(np.float32)}
        if site.bias:
            leaves["bias"] = found["bias"].reshape(form[:-1]).astype(np.float32)
        tree = set_in(tree, site.path, leaves)
        for copy, pair in enumerate(found["errors"].reshape(-1, 2)):
            errors[site.name if site.stack is None else f"{site.name}[{copy}]"] = (float(pair[0]), float(pair[1]))
    return Measured(tree, errors, outputs)


class _Spread(NamedTuple):
    """How images are divided: chunk by chunk, whole ones to each device, and none counted twice.

    Attributes:
      images: how many.
      chunk: images in a chunk, a number that divides them.
      each: chunks a device has; the last devices repeat chunks that others have, which then count for nothing.
      devices: how many this host uses.
    """

    images: int
    chunk: int
    each: int
    devices: int

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return self.images // self.chunk

    @classmethod
    def of(cls, images: int, most: int = CHUNK) -> "_Spread":
        """Returns the division of so many images among the devices that there are."""
        chunk = next(c for c in range(min(most, images), 0, -1) if images % c == 0)
        each = -(-(images // chunk) // devices.device_count())
        alone = devices.host()[1] == 1
        return cls(images, chunk, each, -(-(images // chunk) // each) if alone else devices.local_device_count())

    def cut(self, images: np.ndarray) -> np.ndarray:
        """Returns this host's images, (devices, streams, each · chunk, …), of all, (streams, images, …)."""
        size = self.each * self.chunk
        first = devices.host()[0] * self.devices * size
        mine = images[:, (first + np.arange(self.devices * size)) % self.images]
        return np.moveaxis(mine.reshape(len(images), self.devices, size, *images.shape[2:]), 1, 0)

    def join(self, outputs: np.ndarray) -> np.ndarray:
        """Returns the outputs of all images, (streams, images, …), of this host's, (devices, streams, each · chunk, …)."""
        everyone = devices.gather(outputs)
        streams = np.moveaxis(everyone, 2, 0)
        return streams.reshape(len(streams), -1, *outputs.shape[3:])[:, : self.images]


@dataclasses.dataclass(frozen=True)
class _Solver:
    sites: Sequence[Site]
    streams: int
    ridge: float
    vectors: int
    shortcut: bool
    spread: _Spread

    def run(self, backbone: nn.Module, variables: Tree, images: Any, weights: Any) -> Any:
        """Returns (outputs, {site path: {"kernel", "bias", "errors"}})."""
        flat = images.reshape(-1, *images.shape[2:])
        closed = trace(backbone, variables, self.sites, flat)
        leaves = jax.tree_util.tree_leaves(variables)
        table = {layer.path: (site, layer) for site in self.sites for layer in site.layers}
        solved: dict[Path, Any] = {}

        def visit(call: Call) -> Any:
            site, layer = table[call.path]
            if call.x.shape[0] % flat.shape[0]:
                raise SiteError(
                    f"{layer.name}: the first axis of its input {tuple(call.x.shape)} is not the batch of {flat.shape[0]} "
                    "images, so clean and corrupted features cannot be told apart; narrow sites.pattern."
                )
            x = call.x.reshape(self.streams, -1, *call.x.shape[1:])
            y = call.apply(call.leaves, x[0])
            keep = None
            if site.path == call.path:
                solved[site.path], keep = self._solve(site, call, x, y, weights)
            fused = fuse_layer(layer, site, call.leaves, solved[site.path], AFFINE, 1.0, stacked=False)
            rest = call.apply(fused, x[1:].reshape(-1, *x.shape[2:]))
            return jnp.concatenate([y, rest]), keep

        outputs, kept = walk(closed, [*leaves, flat], [False] * len(leaves) + [True], visit)
        return outputs[0].reshape(*images.shape[:2], *outputs[0].shape[1:]), kept

    def _solve(self, site: Site, call: Call, x: Any, y: Any, weights: Any) -> tuple[Tree, Tree]:
        """Returns the site's denoiser and, with its errors, what is to be kept of it."""
        matrices = [
            kernel_matrix(layer, site.kind, call.leaves_of(layer.path)["kernel"]).astype(jnp.float64)
            for layer in site.layers
        ]
        matrix = jnp.concatenate(matrices, axis=-1)
        delta = None
        if self.shortcut and call.correction is not None and len(site.layers) == 1 and site.kind != "pointwise":
            apart = (self.streams, *y.shape)
            change = lambda q: _by_stream(q, self.streams, lambda s: s[:1] - s)  # noqa: E731
            everywhere = jnp.broadcast_to(y[None], apart).reshape(-1, *y.shape[1:])
            delta = call.correction(everywhere, change).reshape(apart)[1:]
        if delta is None and (site.kind == "pointwise" or matrix.shape[-1] >= site.width):
            matrix = jnp.broadcast_to(jnp.eye(site.width), (site.groups, site.width, site.width))
        sums = self._sums(site, site.layers[0], x, matrix, delta, weights)
        return _regress(site, matrix, sums, self.ridge, direct=matrix.shape[-1] == site.width and delta is None)

    def _sums(self, site: Site, layer: Layer, x: Any, matrix: Any, delta: Any, weights: Any) -> Tree:
        """Returns the means and the centred second moments of features w and targets t over the corrupted streams."""
        g, d, columns = matrix.shape
        parts = self.spread.each
        chunk = x.shape[1] // parts  # images, or what they are cut into, such as windows

        def cut(a: Any) -> Any:
            return jnp.moveaxis(a.reshape(a.shape[0], parts, chunk, *a.shape[2:]), 1, 0)

        probe = jax.eval_shape(
            lambda a: features(layer, site.kind, a),
            jax.ShapeDtypeStruct(x.shape[2:] and (chunk, *x.shape[2:]), x.dtype),
        )
        positions = int(np.prod(probe.shape)) // (g * d)  # of a chunk
        stride = max(1, positions * self.spread.chunks * (self.streams - 1) // (self.vectors * d))
        thin = matrix.astype(jnp.float32)
        identity = delta is None and columns == d

        def pairs(piece: Any) -> tuple[Any, Any]:
            number, images, *more = piece
            f = features(layer, site.kind, images.reshape(-1, *images.shape[2:])).reshape(self.streams, -1, g, d)
            f = _every(stride, number, f).astype(jnp.float32)
            u, w = f[0], f[1:]
            t = u if identity else jnp.einsum("ngd,gdc->ngc", u, thin, precision="highest")
            t = jnp.broadcast_to(t[None], (self.streams - 1, *t.shape))
            if more:
                extra = more[0].reshape(self.streams - 1, -1, g, columns)
                t = t + _every(stride, number, extra)
            return w, t

        numbers = devices.device_index() * parts + jnp.arange(parts)
        pieces = (numbers, cut(x), *(() if delta is None else (cut(delta),)))

        def add(total: Any, new: Any, number: Any) -> Any:
            share = jnp.where(number < self.spread.chunks, 1.0 / self.spread.chunks, 0.0)
            return jax.tree_util.tree_map(lambda a, b: a + b.astype(jnp.float64) * share, total, new)

        def means(total: Any, piece: Any) -> Any:
            new = tuple(jnp.einsum("s,sgd->gd", weights, a.mean(axis=1)) for a in pairs(piece))
            return add(total, new, piece[0]), None

        mw, mt = jnp.zeros((g, d)), jnp.zeros((g, columns))
        if site.bias:
            mw, mt = devices.total(jax.lax.scan(means, (mw, mt), pieces)[0])
        base_w, base_t = mw.astype(jnp.float32), mt.astype(jnp.float32)

        def moments(total: Any, piece: Any) -> Any:
            w, t = pairs(piece)
            w, t = w - base_w[None, None], t - base_t[None, None]
            n = w.shape[1]
            scaled = (weights / n).astype(jnp.float32)[:, None, None, None] * w
            square = jnp.einsum("sngd,snge->gde", scaled, w, precision="highest")
            cross = jnp.einsum("sngd,snge->gde", scaled, t, precision="highest")
            power = jnp.einsum("s,sngc,sngc->g", weights / n, t, t)
            return add(total, (square, cross, power), piece[0]), None

        zero = (jnp.zeros((g, d, d)), jnp.zeros((g, d, columns)), jnp.zeros(g))
        square, cross, power = devices.total(jax.lax.scan(moments, zero, pieces)[0])
        return {
            "square": square,
            "cross": cross,
            "power": power,
            "mean_w": base_w.astype(jnp.float64),
            "mean_t": base_t.astype(jnp.float64),
        }


AFFINE = reverse_steps(Schedule(), 1, 1, "affine")


def _every(stride: int, start: Any, a: Any) -> Any:
    """Returns every so many of the second axis, from a start that moves from chunk to chunk."""
    count = max(1, a.shape[1] // stride)
    pick = (start % stride + stride * jnp.arange(count)) % a.shape[1]
    return jnp.take(a, pick, axis=1)


def _by_stream(a: Any, streams: int, change: Any) -> Any:
    return change(a.reshape(streams, -1, *a.shape[1:])).reshape(a.shape)


def _regress(site: Site, matrix: Any, sums: Tree, ridge: float, direct: bool) -> tuple[Tree, Tree]:
    """Returns {"kernel": (I − A)ᵀ, "bias": −c} in float64, and the same with the errors before and after."""
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
        # The constant meets W as well: its target is E t − W* E w.
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
