"""One comparison of fused with explicit: error, bound and change, see `drep_jax.core.certificate`."""

import dataclasses
import math
from typing import Any

from drep_jax.core.precision import SAFETY


@dataclasses.dataclass(frozen=True)
class Figure:
    """One comparison of fused with explicit.

    Attributes:
      error: ‖fused − explicit‖ / ‖explicit − base‖; relative to ‖base‖ if denoising changes
        nothing.
      bound: what arithmetic allows for the error.
      change: ‖explicit − base‖ / ‖base‖.

    >>> figure([1.0, 1.0, 2.0**-14, 2.0**-40], epsilon=2.0**-23)  # squares of norms
    Figure(error=0.0001220703125, bound=0.0009765625, change=0.0078125)
    """

    error: float
    bound: float
    change: float

    @property
    def passed(self) -> bool:
        """Whether the error is a finite number within the bound."""
        return math.isfinite(self.error) and self.error <= self.bound

    @property
    def decisive(self) -> bool:
        """Whether the bound is below 1, which is the error of a fusion that does nothing."""
        return self.bound < 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain numbers."""
        return {**dataclasses.asdict(self), "passed": self.passed, "decisive": self.decisive}


def figure(squares: Any, epsilon: float, widening: float = 1.0) -> Figure:
    """Makes a `Figure` of four norms.

    Args:
      squares: sums of squares of base, explicit, explicit − base and fused − explicit.
      epsilon: ε of the coarsest type that the outputs have gone through.
      widening: factor on the bound, from what cancels in the sums.
    """
    base, explicit, change, error = (math.sqrt(float(value)) for value in squares)
    epsilon *= widening
    if change == 0.0:
        scale = base or 1.0
        return Figure(error=error / scale, bound=2 * SAFETY * epsilon, change=0.0)
    return Figure(
        error=error / change,
        bound=SAFETY * epsilon * (base + explicit) / change,
        change=change / base if base else math.inf,
    )
