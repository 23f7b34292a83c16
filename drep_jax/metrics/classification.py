"""Whether the right class is first, or among the first five."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drep_jax.metrics.reducers import Metric, mean_of

PLACES = (1, 5)

METRICS: Mapping[str, Metric] = {f"acc@{k}": mean_of(f"acc@{k}") for k in PLACES}


def hits(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> dict[str, Float[Array, " batch"]]:
    """Returns for each image whether its class is first (acc@1) and among the first five (acc@5), 0 or 1.

    Ties count against the network: a class is ranked behind every other class with the same logit. Logits that are not
    finite count as wrong.
    """
    logit = jnp.take_along_axis(logits, labels[:, None], axis=1)
    rank = jnp.sum(logits >= logit, axis=1) - 1
    finite = jnp.isfinite(logits).all(axis=1)
    return {f"acc@{k}": ((rank < k) & finite).astype(jnp.float32) for k in PLACES}


def answers(logits: Float[Array, "batch classes"]) -> dict[str, Array]:
    """Returns the class that a network answers with and its softmax probability, {"answer", "confidence"}."""
    return {"answer": jnp.argmax(logits, axis=-1), "confidence": jnp.max(jax.nn.softmax(logits), axis=-1)}
