"""Image classification: cross-entropy, acc@1 and acc@5."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from drep_jax.typing import Tree


@dataclasses.dataclass(frozen=True)
class Classification:
    """A backbone gives logits."""

    def start(self, backbone: nn.Module, abstract: Tree, images: Any, key: jax.Array) -> dict[str, Tree]:
        """Returns what is trained beside the backbone, {name: tree}: nothing."""
        del backbone, abstract, images, key
        return {}

    def outputs(self, backbone: nn.Module, variables: Tree, images: Any, **how: Any) -> Any:
        """Returns the logits, and with `mutable` among the arguments the changed collections."""
        return backbone.apply(variables, images, **how)

    def loss(
        self, logits: Any, batch: Mapping[str, Any], smoothing: float, beside: Mapping[str, Tree]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the mean loss of this device's images and what is to be logged.

        Args:
          logits: (batch, classes).
          batch: see the function `loss`.
          smoothing: of the labels.
          beside: what is trained beside the backbone.
        """
        del beside
        hits = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        return loss(logits, batch, smoothing), {"accuracy": hits}


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
