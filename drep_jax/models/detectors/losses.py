"""Parts of the losses of detectors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from drep_jax.models.detectors.overlaps import generalized_iou


def focal_loss(
    logits: Float[Array, "*n"], labels: Float[Array, "*n"], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "*n"]:
    """Returns −α_t (1 − p_t)^γ ln p_t of each logit (Lin et al. 2017), p = σ(logit).

    Args:
      logits: of a class.
      labels: 1 where the class is there, else 0.
      alpha: weight of the labels 1; 1 − alpha is that of the others.
      gamma: exponent.
    """
    p = jax.nn.sigmoid(logits)
    wrong = jnp.where(labels > 0, 1 - p, p)
    weight = jnp.where(labels > 0, alpha, 1 - alpha) * wrong**gamma
    return weight * binary_cross_entropy(logits, labels)


def binary_cross_entropy(logits: Float[Array, "*n"], labels: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns −y ln σ(logit) − (1 − y) ln(1 − σ(logit)), without overflow."""
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def binary_divergence(wanted: Float[Array, "*n"], logits: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns KL(σ(wanted) ‖ σ(logit)) of single events, at least 0."""
    return jax.nn.sigmoid(wanted) * (wanted - logits) + jax.nn.softplus(logits) - jax.nn.softplus(wanted)


def dense_distance(
    classes: tuple[Float[Array, "batch places classes"], Float[Array, "batch places classes"]],
    boxes: tuple[Float[Array, "batch places 4"], Float[Array, "batch places 4"]],
    centerness: tuple[Float[Array, "batch places"], Float[Array, "batch places"]] | None = None,
) -> Float[Array, ""]:
    """Returns how far what a dense head gives is from what it gives for clean images, at least 0.

        1/n Σ_cells Σ_classes KL(c* ‖ c) + max c* · [‖box − box*‖² + KL(centerness* ‖ centerness)]

    with the probabilities c; * marks the clean outputs. Boxes matter where the clean network sees
    an object.

    Args:
      classes, centerness: (logits, clean logits).
      boxes: as the head gives them, and clean.
    """
    logits, clean = classes
    apart = jnp.sum((boxes[0] - boxes[1]) ** 2, axis=-1)
    if centerness is not None:
        apart += binary_divergence(centerness[1], centerness[0])
    cells = binary_divergence(clean, logits).sum(-1) + jax.nn.sigmoid(clean).max(-1) * apart
    return jnp.sum(cells) / logits.shape[0]


def paired_giou(boxes: Float[Array, "*n 4"], others: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Returns the generalized IoU of each box with the other one in its place."""
    return generalized_iou(boxes[..., None, :], others[..., None, :])[..., 0, 0]


def masked_sum(values: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Float[Array, ""]:
    """Returns the sum of the values where the mask is true, whatever the others are."""
    return jnp.sum(jnp.where(mask, values, 0))
