"""Image classification: cross-entropy, acc@1 and acc@5."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


def loss(logits: Float[Array, "batch classes"], batch: Mapping[str, Any], smoothing: float = 0.0) -> Float[Array, ""]:
    """Returns the mean cross-entropy, in nats; of images mixed in shares s and 1 − s, s·loss("label") + (1 − s)·loss("label2").

    Args:
      logits: (batch, classes).
      batch: "label", int (batch,); where images were mixed also "label2", int (batch,), and "share", float (batch,).
      smoothing: of the labels.
    """

    def each(labels: Any) -> Any:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    if "share" not in batch:
        return jnp.mean(each(batch["label"]))
    return jnp.mean(batch["share"] * each(batch["label"]) + (1.0 - batch["share"]) * each(batch["label2"]))


def scores(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """Returns for each image whether its class is first (acc@1) and among the first five (acc@5), (n,) of 0 or 1.

    Ties count against the network: a class is ranked behind every other class with the same logit.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    rank = np.sum(logits >= own, axis=1) - 1
    return {f"acc@{k}": (rank < k).astype(np.float64) for k in (1, 5)}
