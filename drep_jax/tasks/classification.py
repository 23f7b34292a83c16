"""Image classification: cross-entropy, acc@1 and acc@5."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


def loss(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], smoothing: float = 0.0
) -> Float[Array, ""]:
    """Returns the mean cross-entropy against (smoothed) labels, in nats."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def scores(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """Returns for each image whether its class is first (acc@1) and among the first five (acc@5), (n,) of 0 or 1.

    Ties count against the network: a class is ranked behind every other class with the same logit.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    rank = np.sum(logits >= own, axis=1) - 1
    return {f"acc@{k}": (rank < k).astype(np.float64) for k in (1, 5)}
