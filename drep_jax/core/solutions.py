"""What measured noise has solved: denoisers with their errors, and where it stands."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from drep_jax.core.order import Place
from drep_jax.core.regression import Solution
from drep_jax.core.shrinkage import Shrinkage
from drep_jax.core.sites import Site
from drep_jax.core.stretches import name_of
from drep_jax.trees import set_in
from drep_jax.typing import Path, Tree


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of `measure`.

    Attributes:
      denoise: the `denoise` subtree for rule "affine": kernel (I − A*)ᵀ and bias −c*.
      errors: {site name, or site name[copy]: (before, after)} on the images: ‖t − W w‖² and
        ‖t − W* w − c‖², each over ‖t − E t‖².
      outputs: of the backbone, fused site by site, for each stream; None if not wanted.
      held_out: {site name: error after, on images that the solution has not seen}; {} with a given
        ridge.
      ridge: {site name: λ over the mean power of the features}; infinite for a site that is left as
        it is, because no change of it held on images it was not fitted to.
    """

    denoise: Tree
    errors: dict[str, tuple[float, float]]
    outputs: Shaped[np.ndarray, "streams images *output"] | None
    held_out: dict[str, float] = dataclasses.field(default_factory=dict)
    ridge: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def left_alone(self) -> tuple[str, ...]:
        """Names of the sites that are left as they are."""
        return tuple(name for name, ridge in self.ridge.items() if np.isinf(ridge))


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a solution stands.

    Attributes:
      done, total: sites solved, and all of them; copies of a stacked site count each.
      name: of the site that was solved last.
      before, after: its errors, see `Measured`.
      held_out: its error on held-out images, or None.
    """

    done: int
    total: int
    name: str
    before: float
    after: float
    held_out: float | None


class Solutions:
    """The solutions so far, in the types of the `denoise` subtree."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._leaves: dict[Path, Tree] = {}
        self._rows: dict[Place, tuple[Solution, Shrinkage]] = {}

    def add(self, site: Site, copy: int | None, solution: Solution, shrinkage: Shrinkage) -> Solution:
        """Takes the solution of a site's copy, and returns what is left of it without its matrix."""
        leaves, place = self._of(site), () if copy is None else (copy,)
        leaves["kernel"][place] = solution.kernel.reshape(leaves["kernel"][place].shape)
        if solution.constant is not None:
            leaves["bias"][place] = solution.constant.reshape(leaves["bias"][place].shape)
        small = solution._replace(kernel=np.zeros(0))  # a wide one is large
        self._rows[site.path, copy] = (small, shrinkage)
        return small

    def _of(self, site: Site) -> Tree:
        if site.path not in self._leaves:
            leaves = {"kernel": np.zeros(site.denoiser_shape, np.float32)}
            if site.bias:
                leaves["bias"] = np.zeros(site.denoiser_shape[:-1], np.float32)
            self._leaves[site.path] = leaves
        return self._leaves[site.path]

    def measured(self, outputs: np.ndarray | None) -> Measured:
        """Returns all of them."""
        tree: Tree = {}
        errors, held_out, ridges = {}, {}, {}
        for site in self._sites:
            tree = set_in(tree, site.path, self._of(site))
            for copy in (None,) if site.stack is None else range(site.stack):
                if (site.path, copy) not in self._rows:
                    continue
                solution, shrinkage = self._rows[site.path, copy]
                name = name_of((site.path, copy))
                errors[name] = (solution.before, solution.after)
                ridges[name] = shrinkage.ridge
                if shrinkage.held_out is not None:
                    held_out[name] = shrinkage.held_out
        return Measured(tree, errors, outputs, held_out, ridges)
