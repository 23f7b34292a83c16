"""Linear probes of frozen features: a BatchNorm without parameters, then one linear layer.

`ridge_probe` solves it in closed form: with standardized features F and centered one-hot labels Y,

    W = (FᵀF + λ n I)⁻¹ FᵀY,

λ the largest whose accuracy on a fifth of the images is within a standard error of the best: a probe
that leans on small differences of features is the first to fail under noise. `trained_probe` is the
recipe's: cross-entropy, Adam, a cosine, no weight decay. Norm and layer together are one affine map of
the features, so a probe can become the head of the network.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from drep_jax.errors import ConfigError, DataError
from drep_jax.progress import pulsing

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-12, 3))
"""Candidates of λ, in units of a feature's variance."""
SMALLEST = 1e-6
"""ε of the BatchNorm, as in MAE."""
HELD_OUT = 5
"""One in how many images chooses λ."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """An affine map of features to scores of classes.

    Attributes:
      kernel: (width, classes).
      bias: (classes,).
      strength: the chosen λ; None for a trained probe.
    """

    kernel: Float[np.ndarray, "width classes"]
    bias: Float[np.ndarray, " classes"]
    strength: float | None = None

    def __call__(self, features: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n classes"]:
        """Returns the scores."""
        return np.asarray(features, np.float64) @ self.kernel + self.bias

    def hits(self, features: Float[np.ndarray, "n width"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Returns whether the largest score is that of the label, 0 or 1."""
        return (self(features).argmax(axis=1) == labels).astype(np.float64)

    def head(self, shift: Float[np.ndarray, " width"] | float = 0.0) -> dict[str, np.ndarray]:
        """Returns the parameters of a linear layer on features that `shift` was subtracted from."""
        bias = self.bias + np.broadcast_to(shift, len(self.kernel)) @ self.kernel
        return {"kernel": self.kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def ridge_probe(
    features: Float[np.ndarray, "n width"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Solves a linear probe: λ is chosen on every fifth image, and the probe then solved on all.

    Raises:
      DataError: for fewer than ten images, or features that are not finite.
    """
    features, labels = _checked(features, labels)
    held = np.arange(len(labels)) % HELD_OUT == HELD_OUT - 1
    strength = strengths[0]
    if len(strengths) > 1:
        solve = _solver(features[~held], labels[~held], classes)
        accuracy = np.array([solve(each).hits(features[held], labels[held]).mean() for each in strengths])
        best = accuracy.max()
        error = np.sqrt(best * (1 - best) / held.sum())
        strength = max(each for each, value in zip(strengths, accuracy, strict=True) if value >= best - error)
    return _solver(features, labels, classes)(strength)


def _solver(features: np.ndarray, labels: np.ndarray, classes: int) -> Any:
    """Returns λ ↦ probe, from one eigendecomposition."""
    mean, scale = _moments(features)
    standard = ((features - mean) / scale).astype(np.float32)
    targets = np.eye(classes, dtype=np.float32)[labels]
    average = targets.mean(axis=0)
    values, vectors = np.linalg.eigh((standard.T @ standard).astype(np.float64))
    right = vectors.T @ (standard.T @ (targets - average)).astype(np.float64)

    def solve(strength: float) -> Probe:
        kernel = vectors @ (right / (np.maximum(values, 0.0) + strength * len(labels))[:, None])
        return _unstandardized(kernel, average.astype(np.float64), mean, scale, strength)

    return solve


def trained_probe(
    features: Float[np.ndarray, "n width"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    *,
    epochs: int = 90,
    batch_size: int = 16384,
    learning_rate: float = 6.4e-3,
    seed: int = 0,
    progress: bool = False,
) -> Probe:
    """Trains a linear probe as the recipe does: Adam, cosine, no weight decay, batches in a new order each epoch.

    Raises:
      ConfigError: for no epoch or batch.
      DataError: as `ridge_probe`.
    """
    if epochs < 1 or batch_size < 1:
        raise ConfigError(f"A probe takes at least one epoch and one image a batch; got {epochs} and {batch_size}.")
    features, labels = _checked(features, labels)
    mean, scale = _moments(features)
    standard = jnp.asarray((features - mean) / scale, jnp.float32)
    targets = jnp.asarray(labels)
    size = min(batch_size, len(labels))
    steps = len(labels) // size
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps * epochs))
    kernel = 0.01 * jax.random.normal(jax.random.key(seed), (standard.shape[1], classes), jnp.float32)
    params = {"kernel": kernel, "bias": jnp.zeros(classes, jnp.float32)}

    def loss(params: Any, rows: Any) -> Any:
        logits = standard[rows] @ params["kernel"] + params["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets[rows]).mean()

    @jax.jit
    def epoch(params: Any, state: Any, order: Any) -> Any:
        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    state, rng = tx.init(params), np.random.default_rng(seed)
    with pulsing("linear probe", epochs, "epoch", shown=progress) as bar:
        for _ in range(epochs):
            order = rng.permutation(len(labels))[: steps * size].reshape(steps, size)
            params, state = epoch(params, state, order)
            bar.update()
    return _unstandardized(
        np.asarray(params["kernel"], np.float64), np.asarray(params["bias"], np.float64), mean, scale, None
    )


def _unstandardized(
    kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, scale: np.ndarray, strength: float | None
) -> Probe:
    """Returns the probe of features as they are: BatchNorm and layer as one affine map."""
    kernel = kernel / scale[:, None]
    return Probe(kernel, bias - mean @ kernel, strength)


def standardized(
    features: Float[np.ndarray, "n width"], like: Float[np.ndarray, "m width"]
) -> Float[np.ndarray, "n width"]:
    """Returns features as the BatchNorm gives them, with the moments of others."""
    mean, scale = _moments(np.asarray(like))
    return (np.asarray(features) - mean) / scale


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = features.mean(axis=0, dtype=np.float64)
    return mean, np.sqrt(features.var(axis=0, dtype=np.float64) + SMALLEST)


def _checked(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features, labels = np.asarray(features), np.asarray(labels)
    if len(labels) < 2 * HELD_OUT:
        raise DataError(f"A linear probe needs at least {2 * HELD_OUT} labeled images, and there are {len(labels)}.")
    if not np.isfinite(features).all():
        raise DataError("The features of the probe are not finite; look at the loss of the pre-training.")
    return features, labels
