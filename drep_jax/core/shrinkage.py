"""How far a site is drawn to the identity (measured noise), chosen by held-out images.

The images are divided into folds, all feature vectors of an image into the same. The sums of a site
over all images without those of a fold give the solution that has not seen the fold. The fold's own
sums give the error of that solution on it, in closed form: with Δ = K* − K fitted elsewhere,

    E‖r − wΔ‖² = E‖r‖² − 2 tr(Δᵀ E[w rᵀ]) + tr(Δᵀ E[w wᵀ] Δ)

about the means elsewhere. The ridge with the least held-out error is taken. If no ridge beats the
layer as it is, then the images are no evidence for a change, and the site is left alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from drep_jax.core.regression import Sums, add_outer, ridge_change

RIDGES = tuple(float(10.0**exponent) for exponent in np.arange(-4.0, 2.5, 0.5))
"""Candidates for λ over the mean power of a site's features."""


START = RIDGES.index(1e-3)
"""Where the search begins; the held-out error falls and then rises along the candidates."""


COLUMNS = 128
"""Targets of wide layers are judged along so many random directions."""


FOLDS, WIDE, WIDE_FOLDS = 5, 1024, 3
"""Folds of the images.

Sites wider than 1,024 are judged on fewer and at every second candidate, to hold and factor fewer
matrices.
"""


def folds_for(width: int) -> int:
    """Returns the number of folds on which a site is judged."""
    return FOLDS if width <= WIDE else WIDE_FOLDS


class Shrinkage(NamedTuple):
    """The chosen ridge.

    Attributes:
      ridge: λ over the mean power of the features; infinite if the site is left as it is.
      held_out: error on images that the solution has not seen, over E‖t − E t‖²; None if unknown.
    """

    ridge: float
    held_out: float | None


def choose_ridge(
    whole: Sums, folds: Sequence[Sums], matrix: Float64[np.ndarray, "groups d columns"] | None
) -> Shrinkage:
    """Chooses the ridge of a site.

    Args:
      whole: the site's sums over all images.
      folds: over each fold of them.
      matrix: K of the targets, or None for I.
    """
    folds = [fold for fold in folds if fold.images]
    scale = max(float(whole.power_t.sum() / whole.images), 1e-300)
    alone = sum(float(f.power_r.sum() + f.images * (f.mean_r**2).sum()) for f in folds) / float(whole.images)
    left_alone = Shrinkage(float("inf"), alone / scale)
    if len(folds) < 2:
        return left_alone
    directions = _directions(whole.cross.shape[-1])
    reachable = directions if matrix is None else (np.linalg.pinv(matrix, rcond=1e-6) @ matrix) @ directions
    tests = [_Test(whole, fold, directions, reachable) for fold in folds]
    errors: dict[int, float] = {}

    def error(number: int) -> float:
        if number not in errors:
            errors[number] = sum(test.share * test.error(RIDGES[number]) for test in tests)
        return errors[number]

    best = START
    for size in (2, 1) if whole.square.shape[-1] <= WIDE else (2,):
        for step in (size, -size):
            while 0 <= best + step < len(RIDGES) and error(best + step) < error(best):
                best += step
    return Shrinkage(RIDGES[best], error(best) / scale) if error(best) < alone else left_alone


def _directions(columns: int) -> Float64[np.ndarray, "columns some"]:
    """Returns orthogonal directions V so that tr M is about tr(Vᵀ M V); exactly if there are few columns."""
    if columns <= COLUMNS:
        return np.eye(columns)
    draw = np.random.default_rng(0).normal(size=(columns, COLUMNS))
    return np.linalg.qr(draw)[0] * np.sqrt(columns / COLUMNS)


class _Test:
    """A fold, held out from a fit to all others.

    Attributes:
      share: of the images.
    """

    def __init__(self, whole: Sums, fold: Sums, directions: np.ndarray, reachable: np.ndarray) -> None:
        self._whole, self._fold = whole, fold
        self.share = float(fold.images / whole.images)
        self._others = whole.images - fold.images
        # of the fold about the mean of the others
        self._w, r = (whole.images / self._others * (fold[i] - whole[i]) for i in (1, 3))
        self._unseen = (fold.cross @ directions) / fold.images + self._w[..., :, None] * (r[..., None, :] @ directions)
        self._between = self._others * fold.images / whole.images
        between = self._w[..., :, None] * (r[..., None, :] @ reachable)
        self._seen = ((whole.cross - fold.cross) @ reachable - self._between * between) / self._others
        self._power = float(fold.power_r.sum() / fold.images + (r**2).sum())
        self._square = self._square_of_others() if whole.square.shape[-1] <= WIDE else None

    def _square_of_others(self) -> np.ndarray:
        square = self._whole.square - self._fold.square
        add_outer(square, -self._between * self._w, self._w)
        square /= self._others
        return square

    def error(self, ridge: float) -> float:
        """Returns the error on the fold; infinite if the equations have no solution in float64."""
        square = self._square_of_others() if self._square is None else self._square.copy()
        try:
            change = ridge_change(square, self._seen, ridge)
        except np.linalg.LinAlgError:
            return float("inf")
        product = self._fold.square @ change.astype(self._fold.square.dtype)
        explained = float((change * product).sum() / self._fold.images)
        explained += float((np.einsum("gd,gdc->gc", self._w, change) ** 2).sum())
        return max(0.0, self._power + explained - 2.0 * float((change * self._unseen).sum()))
