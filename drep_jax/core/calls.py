"""The calls of a layer in one forward pass: which of their feature vectors count, and how much.

A layer that is called several times (a head that the levels of a pyramid share, a recurrent cell)
has one kernel, so one denoiser, and reads the mixture p = Σ π_l p_l of what its calls read. Each
objective here is quadratic in the denoiser, so its minimum over the mixture follows from the pooled
sums, with the same weights π_l everywhere: Algorithm 1's loss, moments, and the regression of
measured noise. They are the numbers of positions of an image (all vectors count alike), or equal
(all calls count alike), as `Site.call_weights` says.

What the network calls padding (`drep_jax.rows`) counts for nothing. A vector's weight does not
depend on how much padding there is elsewhere.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
from jaxtyping import Array, Bool

from drep_jax.core.layers import Layer
from drep_jax.core.matrix_form import features
from drep_jax.core.sites import POSITIONS, Site
from drep_jax.rows import valid_vectors


def positions_of(site: Site, layer: Layer, kind: str, x: Any) -> tuple[int, ...]:
    """Returns the shape of the array of a call's feature vectors, without their own axes.

    Args:
      site, layer: of the call.
      kind: how features are read, see `drep_jax.core.matrix_form.features`.
      x: the layer's input.
    """
    shape = jax.eval_shape(lambda x: features(layer, kind, x), x).shape
    return shape[: len(shape) - (1 if site.groups == 1 else 2)]


def counted_vectors(site: Site, layer: Layer, kind: str, x: Any) -> Bool[Array, "*positions"] | None:
    """Returns which feature vectors of a call the network says count, or None if all do.

    Args:
      site, layer, kind, x: see `positions_of`.
    """
    return valid_vectors(layer.path[-1], positions_of(site, layer, kind, x))


def call_weight(site: Site, positions: int) -> float:
    """Returns the weight of a call beside the site's other calls; 1 if there are none.

    Args:
      site: of the layer.
      positions: feature vectors of an image in this call.
    """
    return float(positions) if site.layers[0].calls > 1 and site.call_weights == POSITIONS else 1.0


def vector_weight(site: Site, positions: int, used: int) -> float:
    """Returns the weight of each feature vector of a call; 1 if there are no other calls.

    Args:
      site: of the layer.
      positions: feature vectors of an image in this call.
      used: those of them that a sample takes.
    """
    return call_weight(site, positions) / used if site.layers[0].calls > 1 else 1.0


def shares_of(site: Site, positions: Sequence[int]) -> list[Fraction]:
    """Returns the weights of all calls of a site's layers, which sum to 1.

    Args:
      site: of the layer.
      positions: feature vectors of an image at each call.
    """
    weights = [n if site.call_weights == POSITIONS else 1 for n in positions]
    return [Fraction(weight, sum(weights)) for weight in weights]


def table_weight(site: Site, layer: Layer, x: Any, mask: Any) -> Any:
    """Returns the weight of each feature vector that a call reads of a table, which is there for every image; see above.

    Args:
      site, layer, x: of the call.
      mask: (batch,) 1 for images that count.
    """
    if site.layers[0].calls == 1:
        return 1.0
    positions = math.prod(positions_of(site, layer, site.kind, x))
    return mask.sum() * vector_weight(site, positions, positions)
