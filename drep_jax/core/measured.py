"""Measured noise: clean features regressed on corrupted ones, site by site.

The paper assumes isotropic Gaussian noise at every layer. If a corruption of the *images* is known,
the noise at a site can be measured instead. Let u be the feature of the clean image in the unfused
backbone, and w that of the corrupted image behind the sites fused so far. Then

    A* = (Cov(u, w) + λI) (Cov(w) + λI)⁻¹        c* = E u − A* E w,

or with second moments and c* = 0 where a site may have no constant. The ridge λ pulls towards the
identity, so without evidence nothing changes. This is our extension of the paper.

In a residual network the shortcut q carries noise past every denoiser. If a layer's output y meets
q in a sum z = L(y) + q (see `drep_jax.core.interpreter`), the layer can cancel that noise. Its
target is then t = W u + L⁻¹(q_clean − q) instead of W u, which makes the sum clean. The regression
is over the layer's outputs,

    W* = (E[t wᵀ] + λW) (E[w wᵀ] + λI)⁻¹        A* = I + W⁺(W* − W),

where A* is the smallest denoiser that fuses to W*. If the layer has more outputs than inputs, it
fuses to the nearest weights that a denoiser can reach.

All sites are solved in one program and one forward pass of all images, clean and corrupted side by
side. The images are divided among the devices of all hosts in the chunks that one device would take
one after another. Each device sums over its own images, and solves every site from the sums of all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Num, Shaped

from drep_jax.core.fusion import fuse_layer
from drep_jax.core.interpreter import Call, check_measurable, trace, walk
from drep_jax.core.matrix_form import kernel_matrix
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.regression import regress, regression_sums
from drep_jax.core.schedule import Schedule, reverse_steps
from drep_jax.core.sites import Site
from drep_jax.errors import DataError, NonFiniteError, SiteError
from drep_jax.parallel import devices
from drep_jax.trees import set_in
from drep_jax.typing import AnyArray, Path, Tree

CHUNK = 64
"""Images whose patches are held at once, at most."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of `measure`.

    Attributes:
      denoise: the `denoise` subtree for rule "affine": kernel (I − A*)ᵀ and bias −c*.
      errors: {site name, or site name[copy]: (before, after)} on the images: ‖t − W w‖² and
        ‖t − W* w − c‖², each over ‖t − E t‖².
      outputs: of the backbone, fused site by site, for each stream.
    """

    denoise: Tree
    errors: dict[str, tuple[float, float]]
    outputs: Shaped[np.ndarray, "streams images *output"]


@standard_promotion
def measure(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    images: Float[AnyArray, "streams images *image_shape"],
    weights: Sequence[float] | Num[np.ndarray, " corrupted"],
    **options: Any,
) -> Measured:
    """Solves every site in execution order for one mixture of the streams.

    Args:
      backbone, variables, sites, images, **options: see `measuring`; `train=False` and other
        arguments of the backbone are among the options.
      weights: of the corrupted streams.

    Returns:
      Denoisers for rule "affine", with their errors.

    Raises:
      NonFiniteError, DataError, SiteError: see `measuring`.
    """
    return measuring(backbone, variables, sites, images, **options)(weights)


def measuring(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    images: Float[AnyArray, "streams images *image_shape"],
    *,
    ridge: float = 1e-3,
    vectors: int = 400,
    shortcut: bool = True,
    chunk: int = CHUNK,
    **kwargs: Any,
) -> Callable[[Sequence[float] | np.ndarray], Measured]:
    """Returns a function of the streams' weights that solves every site; it compiles once.

    Args:
      backbone, variables: the frozen backbone.
      sites: to solve, in execution order.
      images: normalized. The first stream is clean. The others are corrupted versions of the same
        images in the same order; one that is clean again preserves clean accuracy. All are held in
        memory at once, each image on one device.
      ridge: λ over the mean power of a site's features, above 0.
      vectors: feature vectors to use at a site, in multiples of its width; if there are more, every
        n-th of them.
      shortcut: whether layers cancel the noise of the shortcut that they are added to.
      chunk: images whose patches are held at once, at most; fewer take less memory.
      **kwargs: for the backbone, such as `train=False`.

    Returns:
      weights ↦ `Measured`. There is one weight for each stream after the first, at least 0; only
      their ratios matter.

    Raises:
      NonFiniteError: if features or solutions are not finite, naming the site.
      DataError: for fewer than two streams, or weights that do not fit them.
      SiteError: if a layer is called several times, or a site's features cannot be followed.
    """
    check_measurable(sites)
    if images.ndim < 3 or images.shape[0] < 2 or images.shape[1] < 1:
        raise DataError(
            f"Measuring needs a clean and at least one corrupted stream of images; got images {tuple(images.shape)}."
        )
    division = _Division.of(images.shape[1], chunk)
    solver = _Solver(sites, images.shape[0], ridge, vectors, shortcut, division)
    program = devices.on_devices(lambda v, x, w: solver.run(backbone, v, x, w, kwargs), in_axes=(None, 0, None))
    batch = division.split(np.asarray(images))

    def solve(weights: Sequence[float] | np.ndarray) -> Measured:
        mixture = np.asarray(weights, np.float64)
        if mixture.shape != (images.shape[0] - 1,):
            raise DataError(
                f"{images.shape[0]} streams need one weight for each corrupted one; got {mixture.size} weights."
            )
        if not (np.isfinite(mixture).all() and (mixture >= 0).all() and mixture.sum() > 0):
            raise DataError(
                f"The weights of the corrupted streams must be at least 0 and not all 0, got {list(weights)}."
            )
        with jax.enable_x64(True):  # for sums and solves; images and parameters keep their types
            outputs, solutions = program(variables, batch, mixture / mixture.sum())
        return _collect(sites, devices.unreplicate(solutions), division.join(np.asarray(outputs)))

    return solve


def _collect(
    sites: Sequence[Site], solutions: dict[Path, Any], outputs: Shaped[np.ndarray, "streams images *output"]
) -> Measured:
    tree: Tree = {}
    errors = {}
    for site in sites:
        shape = site.denoiser_shape
        if site.path not in solutions:  # its input does not depend on the images
            leaves: Any = {"kernel": np.zeros(shape, np.float32)}
            if site.bias:
                leaves["bias"] = np.zeros(shape[:-1], np.float32)
            tree = set_in(tree, site.path, leaves)
            continue
        solution = solutions[site.path]
        if not all(np.isfinite(leaf).all() for leaf in jax.tree_util.tree_leaves(solution)):
            raise NonFiniteError(
                f"{site.name}: the features of the clean or corrupted images are not finite, so nothing can be fitted to them. "
                "Check the images and the backbone's weights."
            )
        leaves = {"kernel": solution["kernel"].reshape(shape).astype(np.float32)}
        if site.bias:
            leaves["bias"] = solution["bias"].reshape(shape[:-1]).astype(np.float32)
        tree = set_in(tree, site.path, leaves)
        for copy, pair in enumerate(solution["errors"].reshape(-1, 2)):
            errors[site.name if site.stack is None else f"{site.name}[{copy}]"] = (float(pair[0]), float(pair[1]))
    return Measured(tree, errors, outputs)


class _Division(NamedTuple):
    """How images are divided among devices: in whole chunks, and each image counted once.

    Attributes:
      images: number of images.
      chunk: images in a chunk, a divisor of their number.
      each: chunks on a device. The last devices repeat chunks of others, which are not counted
        there.
      devices: devices that this host uses.
    """

    images: int
    chunk: int
    each: int
    devices: int

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self.images // self.chunk

    @classmethod
    def of(cls, images: int, most: int = CHUNK) -> "_Division":
        """Divides a number of images among the devices of all hosts."""
        chunk = next(c for c in range(min(most, images), 0, -1) if images % c == 0)
        each = -(-(images // chunk) // devices.device_count())
        single_host = devices.host()[1] == 1
        return cls(images, chunk, each, -(-(images // chunk) // each) if single_host else devices.local_device_count())

    def split(
        self, images: Shaped[np.ndarray, "streams images *image_shape"]
    ) -> Shaped[np.ndarray, "devices streams images_each *image_shape"]:
        """Returns this host's part of all images, each · chunk of them for each device."""
        size = self.each * self.chunk
        first = devices.host()[0] * self.devices * size
        part = images[:, (first + np.arange(self.devices * size)) % self.images]
        return np.moveaxis(part.reshape(len(images), self.devices, size, *images.shape[2:]), 1, 0)

    def join(
        self, outputs: Shaped[np.ndarray, "devices streams images_each *output"]
    ) -> Shaped[np.ndarray, "streams images *output"]:
        """Returns the outputs for all images, from those of every host."""
        of_all_hosts = devices.gather(outputs)
        streams = np.moveaxis(of_all_hosts, 2, 0)
        return streams.reshape(len(streams), -1, *outputs.shape[3:])[:, : self.images]


@dataclasses.dataclass(frozen=True)
class _Solver:
    sites: Sequence[Site]
    streams: int
    ridge: float
    vectors: int
    shortcut: bool
    division: _Division

    def run(
        self,
        backbone: nn.Module,
        variables: Tree,
        images: Float[Array, "streams images *image_shape"],
        weights: Float64[Array, " corrupted"],
        kwargs: dict[str, Any],
    ) -> tuple[Shaped[Array, "streams images *output"], dict[Path, Any]]:
        """Returns the outputs on one device, and {site path: {"kernel", "bias", "errors"}}."""
        flat = images.reshape(-1, *images.shape[2:])
        closed = trace(backbone, variables, self.sites, flat, kwargs)
        leaves = jax.tree_util.tree_leaves(variables)
        table = {layer.path: (site, layer) for site in self.sites for layer in site.layers}
        denoisers: dict[Path, Any] = {}

        def visit(call: Call) -> Any:
            site, layer = table[call.path]
            if call.x.shape[0] % flat.shape[0]:
                raise SiteError(
                    f"{layer.name}: the first axis of its input {tuple(call.x.shape)} is not the batch of {flat.shape[0]} "
                    "images, so clean and corrupted features cannot be told apart; narrow sites.pattern."
                )
            x = call.x.reshape(self.streams, -1, *call.x.shape[1:])
            clean = call.apply(call.leaves, x[0])
            solution = None
            if site.path == call.path:
                denoisers[site.path], solution = self._solve(site, call, x, clean, weights)
            fused = fuse_layer(layer, site, call.leaves, denoisers[site.path], AFFINE, 1.0, stacked=False)
            corrupted = call.apply(fused, x[1:].reshape(-1, *x.shape[2:]))
            return jnp.concatenate([clean, corrupted]), solution

        outputs, solutions = walk(closed, [*leaves, flat], [False] * len(leaves) + [True], visit)
        return outputs[0].reshape(*images.shape[:2], *outputs[0].shape[1:]), solutions

    def _solve(
        self,
        site: Site,
        call: Call,
        x: Float[Array, "streams rows *input_shape"],
        y: Float[Array, "rows *output_shape"],
        weights: Float64[Array, " corrupted"],
    ) -> tuple[Tree, Tree]:
        """Solves a site.

        Args:
          site: the site.
          call: of its first layer.
          x: the layer's inputs, by stream.
          y: its output for the clean stream.
          weights: of the corrupted streams.

        Returns:
          The denoiser, and the same with its errors.
        """
        matrices = [
            kernel_matrix(layer, site.kind, call.leaves_of(layer.path)["kernel"]).astype(jnp.float64)
            for layer in site.layers
        ]
        matrix = jnp.concatenate(matrices, axis=-1)
        delta = None
        if self.shortcut and call.correction is not None and len(site.layers) == 1 and site.kind != "pointwise":
            by_stream = (self.streams, *y.shape)
            change = lambda q: _by_stream(q, self.streams, lambda s: s[:1] - s)  # noqa: E731
            clean_y = jnp.broadcast_to(y[None], by_stream).reshape(-1, *y.shape[1:])
            delta = call.correction(clean_y, change).reshape(by_stream)[1:]
        if delta is None and (site.kind == "pointwise" or matrix.shape[-1] >= site.width):
            matrix = jnp.broadcast_to(jnp.eye(site.width), (site.groups, site.width, site.width))
        division = {"parts": self.division.each, "chunks": self.division.chunks, "vectors": self.vectors}
        sums = regression_sums(site, site.layers[0], x, matrix, delta, weights, **division)
        return regress(site, matrix, sums, self.ridge, direct=matrix.shape[-1] == site.width and delta is None)


AFFINE = reverse_steps(Schedule(), 1, 1, "affine")
"""The triple of rule "affine"."""


def _by_stream(a: Any, streams: int, change: Any) -> Any:
    """Applies `change` to an array with the streams as an axis of its own."""
    return change(a.reshape(streams, -1, *a.shape[1:])).reshape(a.shape)
