"""How a network agrees with the neighbors that another one finds: a criterion for choices without labels."""

import numpy as np
from jaxtyping import Float, Int


def neighbor_precision(
    features: Float[np.ndarray, "n width"], reference: Float[np.ndarray, "n width2"], count: int
) -> Float[np.ndarray, " n"]:
    """Returns the average precision at which each image finds its nearest neighbors by the reference.

    AP_i = mean over the `count` images that count as right for image i of (right ones up to its rank) / rank.

    Args:
      features: of the images as a network sees them, such as corrupted ones.
      reference: of the same images by the unfused backbone, clean.
      count: neighbors by the reference that count as right, of all other images.

    Returns:
      Fractions; NaN for all where any feature is NaN or Inf.
    """
    if not np.isfinite(features).all() or not np.isfinite(reference).all():
        return np.full(len(features), np.nan)
    right_ones = order(reference)[:, :count]
    marks = np.zeros((len(features), len(features)), bool)
    np.put_along_axis(marks, right_ones, True, axis=1)
    right = np.take_along_axis(marks, order(features), axis=1)
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    return np.sum(precision * right, axis=1) / right.sum(axis=1)


def order(features: Float[np.ndarray, "n width"]) -> Int[np.ndarray, "n others"]:
    """Returns for each image all others, that of the nearest feature (cosine) first, (n, n − 1)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = np.nan_to_num(features / np.linalg.norm(features, axis=-1, keepdims=True))
    similar = directions @ directions.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, :-1]
