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

A layer that is called several times is solved once, before its first call, from the inputs of all
of its calls: the sums of each call with its weight (`drep_jax.core.calls`). Inputs that depend on
the layer's own output (weights reused in depth, a loop) are those that the network has at that
moment: behind the sites solved so far, with the layer itself and later ones as they are.

Sites are solved one after another. At each, the images pass in chunks through the short stretch of
the network since the site before (`drep_jax.core.stretches`); every device takes chunks and sums
over them, and the host solves from the sums of all. Between sites, features wait in the host's
memory, up to a bound; the others are computed again. The ridge of a site is chosen on held-out
images (`drep_jax.core.shrinkage`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float, Num

from drep_jax.core.chunks import InMemory, Round, Streams, live_bytes, passes, rounds_of
from drep_jax.core.gathering import Gathering
from drep_jax.core.interpreter import check_batch_axis, check_measurable, trace, tree_of
from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import kernel_matrix
from drep_jax.core.order import Place
from drep_jax.core.promotion import standard_promotion
from drep_jax.core.regression import (
    Form,
    Solution,
    fused_leaves,
    kind_of,
    regress,
)
from drep_jax.core.shrinkage import FOLDS, Shrinkage, choose_ridge
from drep_jax.core.sites import Site
from drep_jax.core.solutions import Measured, Progress, Solutions
from drep_jax.core.stretches import Call, Cut, Network, name_of, parameters
from drep_jax.core.walk import Leaves, Walk
from drep_jax.core.working import WORKING
from drep_jax.errors import DataError, NonFiniteError
from drep_jax.parallel.threads import blas_threads_for
from drep_jax.typing import AnyArray, Tree

CHUNK = 64
"""Images that are computed at once on a device, at most."""


@standard_promotion
def measure(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    images: Float[AnyArray, "streams images *image_shape"] | Streams,
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


@standard_promotion
def measuring(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    images: Float[AnyArray, "streams images *image_shape"] | Streams,
    *,
    ridge: float | None = None,
    vectors: int = 400,
    shortcut: bool = True,
    chunk: int = CHUNK,
    memory_gib: float = 4.0,
    outputs: bool = True,
    say: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Callable[..., Measured]:
    """Returns a function of the streams' weights that solves every site; it compiles once.

    Args:
      backbone, variables: the frozen backbone.
      sites: to solve, in execution order.
      images: normalized. The first stream is clean. The others are corrupted versions of the same
        images in the same order; one that is clean again preserves clean accuracy. An array, or
        `Streams`, which make each chunk when it is needed.
      ridge: λ over the mean power of a site's features, above 0; None chooses it for each site on
        held-out images.
      vectors: feature vectors to use at a site, in multiples of its width; if there are more, every
        n-th of each image's, but at least one.
      shortcut: whether layers cancel the noise of the shortcut that they are added to.
      chunk: images that are computed at once on a device, at most; large ones go through in smaller
        chunks.
      memory_gib: GiB of solutions, and of features that may wait in the memory of a host between
        sites. Features that do not fit are computed again at each site.
      outputs: whether the result has the backbone's outputs.
      say: called with a line of text about memory, if features do not fit.
      **kwargs: for the backbone, such as `train=False`.

    Returns:
      (weights, watch=None) ↦ `Measured`. There is one weight for each stream after the first, at
      least 0; only their ratios matter. `watch` is called with a `Progress` after every site.

    Raises:
      NonFiniteError: if features or solutions are not finite, naming the site.
      DataError: for fewer than two streams, or weights that do not fit them.
      SiteError: if a site's features cannot be followed.
    """
    check_measurable(sites)
    if len(images.shape) < 3 or images.shape[0] < 2 or images.shape[1] < 1:
        raise DataError(
            f"Measuring needs a clean and at least one corrupted stream of images; got images {tuple(images.shape)}."
        )
    if not memory_gib >= 0:
        raise DataError(f"memory_gib={memory_gib} is a number of GiB and at least 0.")
    streams = InMemory(np.asarray(images)) if isinstance(images, np.ndarray | jax.Array) else images
    limit = max(0.0, memory_gib * 2**30 - _solution_bytes(sites))
    solver = _Solver(backbone, variables, sites, streams, ridge, vectors, shortcut, chunk, limit, outputs, kwargs)
    if say is not None and (line := solver.about_memory()):
        say(line)

    def solve(weights: Sequence[float] | np.ndarray, watch: Callable[[Progress], None] | None = None) -> Measured:
        mixture = np.asarray(weights, np.float64)
        if mixture.shape != (images.shape[0] - 1,):
            raise DataError(
                f"{images.shape[0]} streams need one weight for each corrupted one; got {mixture.size} weights."
            )
        if not (np.isfinite(mixture).all() and (mixture >= 0).all() and mixture.sum() > 0):
            raise DataError(
                f"The weights of the corrupted streams must be at least 0 and not all 0, got {list(weights)}."
            )
        return solver.solve(mixture / mixture.sum(), watch)

    return standard_promotion(solve)


def _solution_bytes(sites: Sequence[Site]) -> int:
    """Returns the bytes of the denoisers and of the fused kernels of all sites."""
    return 4 * sum(math.prod(site.denoiser_shape) + sum(layer.kernel_size for layer in site.layers) for site in sites)


class _Solver:
    """The programs of a backbone and its sites, for any weights of the streams."""

    def __init__(
        self,
        backbone: nn.Module,
        variables: Tree,
        sites: Sequence[Site],
        images: Streams,
        ridge: float | None,
        vectors: int,
        shortcut: bool,
        chunk: int,
        limit: float,
        outputs: bool,
        kwargs: Mapping[str, Any],
    ) -> None:
        self.sites, self.images, self.ridge, self.limit, self.wants_outputs = sites, images, ridge, limit, outputs
        self.count = (images.shape[0], images.shape[1])
        self.gathering = Gathering(self.count, vectors, by_fold=ridge is None)
        self.parts: dict[
            Path, list[tuple[Site, Layer]]
        ] = {}  # of first layers; several where they read a concatenation
        for site in sites:
            self.parts.setdefault(site.layers[0].path, []).append((site, site.layers[0]))
        first_of = {layer.path: site.layers[0].path for site in sites for layer in site.layers}
        corrected = {
            site.path
            for site in sites
            if shortcut and len(site.layers) == 1 and site.layers[0].part is None and kind_of(site) != "pointwise"
        }
        first, folds = images.take(np.zeros(1, int))[0], 1 if ridge is not None else FOLDS
        beside = images.arguments(np.zeros(1, int))

        def shapes(batch: int) -> tuple[Any, Any]:
            image, *others = (
                jax.ShapeDtypeStruct((batch, *rows.shape[1:]), rows.dtype) for rows in (first, *beside.values())
            )
            return image, dict(zip(beside, others, strict=True))

        def network(rounds: Sequence[Round]) -> Network:
            image, arguments = shapes(self.count[0] * rounds[0].index.shape[1])
            program = trace(backbone, variables, sites, image, kwargs, self.count[0], arguments)
            return Network(program, first_of, corrected, len(arguments))

        image, arguments = shapes(1)
        check_batch_axis(backbone, variables, sites, image, kwargs, arguments)
        self.rounds = rounds_of(self.count[1], folds, chunk)
        self.network = network(self.rounds)
        size = self.rounds[0].index.shape[1]
        fitting = int(WORKING / max(1.0, self._chunk_bytes() / size))
        if fitting < size:
            self.rounds = rounds_of(self.count[1], folds, max(1, fitting))
            self.network = network(self.rounds)
        self.fixed = self.network.fixed_values(jax.tree_util.tree_leaves(variables))
        self.stretch_programs: dict[str, Callable[..., Any]] = {}

    def _calls(self, cut: Cut, site: Site, layer: Layer) -> list[tuple[Call, Form, Fraction]]:
        """Returns the calls at a cut, with the form of their sums and their weights."""
        forms = self.gathering.forms(cut, site, layer, self.rounds[0].index.shape[1])
        return [(call, *form) for call, form in zip(cut.calls, forms, strict=True)]

    def _chunk_bytes(self) -> int:
        """Returns the bytes that a chunk takes on a device, at most."""
        sites = [(cut, *part) for cut in self.network.cuts for part in self.parts[cut.place[0]]]
        calls = [call for site in sites for call in self._calls(*site)]
        chunk = self.rounds[0].index.shape[1]
        sizes = (self.gathering.bytes(call, form, chunk) for call, form, _ in calls)
        return max((self.network.working_bytes(), *sizes))

    def about_memory(self) -> str:
        """Returns a line about features that do not fit into memory, or ""."""
        here = len(self.rounds[0].mine()[0])
        sizes = [live_bytes(cut.live, here) for cut in self.network.cuts]
        if not sizes or max(sizes) * len(self.rounds) <= self.limit:
            return ""
        widest = self.network.cuts[int(np.argmax(sizes))].place
        return (
            f"The features of {self.count[1]:,} images take up to {max(sizes) * len(self.rounds) / 2**30:.1f} GiB (at "
            f"{name_of(widest)}), of which {self.limit / 2**30:.3g} GiB may wait in memory (measured.memory_gib, less "
            f"the solutions). The rest is computed again at each site: about "
            f"{passes(sizes, len(self.rounds), self.limit):.1f} forward passes in all."
        )

    def solve(self, weights: np.ndarray, watch: Callable[[Progress], None] | None) -> Measured:
        """Solves all sites for weights that sum to 1."""
        walk = Walk(self.network, self.images, self.rounds, self.fixed, self.limit, self.stretch_programs)
        result = Solutions(self.sites)
        solved, total = 0, sum(len(self.parts[cut.place[0]]) for cut in self.network.cuts)
        for number, cut in enumerate(self.network.cuts):
            fused: dict[Place, Leaves] = {}  # all parts of a layer are solved from its input as it is
            for site, first in self.parts[cut.place[0]]:
                solution, shrinkage = self._solve_site(walk, number, cut, site, first, weights, fused)
                solution = result.add(site, cut.place[1], solution, shrinkage)
                solved += 1
                if watch is not None:
                    errors = (solution.before, solution.after, shrinkage.held_out)
                    watch(Progress(solved, total, name_of((site.path, cut.place[1])), *errors))
            walk.fuse(fused)
        return result.measured(walk.outputs() if self.wants_outputs else None)

    def _solve_site(
        self,
        walk: Walk,
        number: int,
        cut: Cut,
        site: Site,
        first: Layer,
        weights: np.ndarray,
        fused: dict[Place, Leaves],
    ) -> tuple[Solution, Shrinkage]:
        """Solves a site at a cut, and adds its layers' parameters to `fused`."""
        copy, calls = cut.place[1], self._calls(cut, site, first)
        part, form = [one for one, _ in self.parts[cut.place[0]]].index(site), calls[0][1]
        matrices = [self._matrix(layer, site, copy) for layer in site.layers]
        matrix: Any = np.concatenate(matrices, axis=-1)
        if all(call.chain is None for call in cut.calls) and (form.kind == "pointwise" or form.columns >= site.width):
            matrix = None
        whole, folds = self.gathering.sums(walk, number, calls, part, matrix, weights)
        if not whole.images > 0:
            raise DataError(
                f"{site.name}: no row of its input counts in any image; the network says that all are padding or empty."
            )
        if not all(np.isfinite(value).all() for value in whole):
            raise NonFiniteError(
                f"{site.name}: the features of the clean or corrupted images are not finite, so nothing can be fitted to "
                "them. Check the images and the backbone's weights."
            )
        with blas_threads_for(site.width):
            shrinkage = Shrinkage(self.ridge, None) if self.ridge is not None else choose_ridge(whole, folds, matrix)
            folds.clear()
            solution = regress(whole, matrix, shrinkage.ridge, site.bias)
            for layer, old in zip(site.layers, matrices, strict=True):
                place = (layer.path, copy)
                leaves = tree_of(fused[place]) if place in fused else self._leaves(place)
                fused[place] = fused_leaves(layer, kind_of(site), leaves, old, solution)
        return solution, shrinkage

    def _leaves(self, place: Place) -> Tree:
        return parameters(self.network.leaves[place], self.fixed)

    def _matrix(self, layer: Layer, site: Site, copy: int | None) -> np.ndarray:
        kernel = self._leaves((layer.path, copy))["kernel"].astype(np.float64)
        return np.asarray(kernel_matrix(layer, kind_of(site), kernel))
