"""Agreement of two networks on nearest neighbors, a criterion that needs no labels."""

import numpy as np
from jaxtyping import Float, Int


def neighbor_precision(
    features: Float[np.ndarray, "n width"], reference: Float[np.ndarray, "n width2"], count: int
) -> Float[np.ndarray, " n"]:
    """Returns the average precision with which each image retrieves its reference neighbors.

    The `count` nearest neighbors of image i by the reference are the right images, and

        AP_i = mean over right images of (right images up to its rank) / rank.

    >>> features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> neighbor_precision(features, features, 1).tolist()
    [1.0, 1.0, 1.0]

    Args:
      features: (n, width), such as those of corrupted images.
      reference: (n, width2), the unfused backbone's features of the clean images.
      count: neighbors of an image that count as right, of few images at most half of the others:
        if all others were right, every ranking would be perfect.

    Returns:
      Fractions, (n,); all NaN if any feature is NaN or Inf.
    """
    if not np.isfinite(features).all() or not np.isfinite(reference).all():
        return np.full(len(features), np.nan)
    neighbors = order(reference)[:, : min(count, max(1, (len(reference) - 1) // 2))]
    is_neighbor = np.zeros((len(features), len(features)), bool)
    np.put_along_axis(is_neighbor, neighbors, True, axis=1)
    right = np.take_along_axis(is_neighbor, order(features), axis=1)
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    return np.sum(precision * right, axis=1) / right.sum(axis=1)


def order(features: Float[np.ndarray, "n width"]) -> Int[np.ndarray, "n others"]:
    """Returns for each image all other images by descending cosine similarity, (n, n − 1)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = np.nan_to_num(features / np.linalg.norm(features, axis=-1, keepdims=True))
    similarities = directions @ directions.T
    np.fill_diagonal(similarities, -np.inf)
    return np.argsort(-similarities, axis=1, kind="stable")[:, :-1]
