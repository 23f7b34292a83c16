"""One-to-one matching of predictions with objects at least total cost, in a program and on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment


def match(cost: Float[Array, "predictions objects"], valid: Bool[Array, " objects"]) -> Int[Array, " objects"]:
    """Returns the prediction of each object, inside a compiled program.

    >>> match(jnp.array([[1.0, 0.0], [0.0, 5.0], [2.0, 2.0]]), jnp.array([True, True])).tolist()
    [1, 0]

    Args:
      cost: of each pair. What is not finite is dearer than every finite cost.
      valid: which objects there are; the others are padding, and change no pair.

    Returns:
      (objects,) the index of the prediction; −1 for padding, and for the objects that are left over
      where there are more of them than predictions.
    """
    finite = jnp.isfinite(cost) & valid[None]
    dearest = jnp.max(jnp.where(finite, cost, -jnp.inf), initial=0.0)
    # A padding column costs the same with every prediction, so it changes no pair. Where there are more columns than
    # predictions, it must be dearer than any object, or it takes a prediction away.
    filled = jnp.where(finite, cost, jnp.where(valid[None], dearest + 1, dearest + 2))
    rows, columns = optax.assignment.hungarian_algorithm(filled)
    matched = jnp.full(cost.shape[1], -1, jnp.int32).at[columns].set(rows.astype(jnp.int32))
    return jnp.where(valid, matched, -1)


def match_batch(
    cost: Float[Array, "batch predictions objects"], valid: Bool[Array, "batch objects"]
) -> Int[Array, "batch objects"]:
    """Returns `match` of every image of a batch."""
    return jax.vmap(match)(cost, valid)


def match_on_host(cost: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Returns `match` by SciPy, which is ten times as fast where nothing has to be compiled.

    Args:
      cost: (predictions, objects).
      valid: bool (objects,).
    """
    costs = np.asarray(cost)[:, valid]
    finite = np.isfinite(costs)
    dearest = np.max(costs, where=finite, initial=0.0)
    rows, columns = linear_sum_assignment(np.where(finite, costs, dearest + 1))
    matched = np.full(len(valid), -1, np.int32)
    matched[np.flatnonzero(valid)[columns]] = rows
    return matched
