"""Top-1 and top-5 accuracy of single images, and the predicted class with its confidence."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drep_jax.metrics.reducers import Metric, mean_of

PLACES = (1, 5)
"""The k of acc@k."""

METRICS: Mapping[str, Metric] = {f"acc@{k}": mean_of(f"acc@{k}") for k in PLACES}


def hits(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> dict[str, Float[Array, " batch"]]:
    """Returns whether the true class is among the k largest logits, 0 or 1 per image and k.

    Ties count against the network: the true class ranks behind every class with the same logit.
    An image with a logit that is not finite counts as wrong.

    >>> logits = jnp.array([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]])
    >>> hits(logits, jnp.array([1, 0]))["acc@1"].tolist()
    [1.0, 0.0]

    Args:
      logits: one row per image.
      labels: the true classes.

    Returns:
      {"acc@1": (batch,), "acc@5": (batch,)}.
    """
    logit = jnp.take_along_axis(logits, labels[:, None], axis=1)
    rank = jnp.sum(logits >= logit, axis=1) - 1
    finite = jnp.isfinite(logits).all(axis=1)
    return {f"acc@{k}": ((rank < k) & finite).astype(jnp.float32) for k in PLACES}


def expected_hits(
    logits: Float[Array, "batch classes"], chances: Float[Array, "batch classes"]
) -> dict[str, Float[Array, " batch"]]:
    """Returns the probability that the true class is among the k largest logits, per image and k.

    >>> chances = jnp.array([[0.6, 0.3, 0.1]])
    >>> round(float(expected_hits(jnp.array([[0.1, 0.7, 0.2]]), chances)["acc@1"][0]), 2)
    0.3

    Args:
      logits: one row per image; one that is not finite counts as wrong.
      chances: the probabilities of the classes, from elsewhere.

    Returns:
      {"acc@1": (batch,), "acc@5": (batch,)}.
    """
    finite = jnp.isfinite(logits).all(axis=1)
    order = jax.lax.top_k(logits, min(max(PLACES), logits.shape[-1]))[1]
    ranked = jnp.cumsum(jnp.take_along_axis(chances, order, axis=1), axis=1)
    return {f"acc@{k}": ranked[:, min(k, ranked.shape[1]) - 1] * finite for k in PLACES}


def answers(logits: Float[Array, "batch classes"]) -> dict[str, Array]:
    """Returns the predicted class and its softmax probability, {"answer", "confidence"}.

    >>> float(answers(jnp.zeros((1, 4)))["confidence"][0])
    0.25
    """
    return {"answer": jnp.argmax(logits, axis=-1), "confidence": jnp.max(jax.nn.softmax(logits), axis=-1)}
