"""What measuring gives, and where it stands."""

import dataclasses

import numpy as np
from jaxtyping import Shaped

from drep_jax.typing import Tree


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
