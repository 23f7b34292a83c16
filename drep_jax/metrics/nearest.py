"""Nearest neighbors by cosine similarity, which classify images without a head."""

import numpy as np
from jaxtyping import Float, Int

QUERIES = 512
"""Queries compared with the gallery at once."""


def nearest(
    gallery: Float[np.ndarray, "gallery width"], queries: Float[np.ndarray, "queries width"]
) -> Int[np.ndarray, " queries"]:
    """Returns the gallery row with the largest cosine similarity to each query.

    A feature that is zero or not finite has no neighbor: such a query gets −1, and such a gallery
    row is never returned.

    >>> gallery = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> nearest(gallery, np.array([[0.1, 1.0], [3.0, 1.0], [0.0, 0.0]])).tolist()
    [1, 0, -1]
    """
    gallery_directions, query_directions = unit(gallery), unit(queries)
    usable = np.any(gallery_directions != 0, axis=1)
    rows = np.full(len(query_directions), -1)
    for start in range(0, len(query_directions) if usable.any() else 0, QUERIES):
        similarities = query_directions[start : start + QUERIES] @ gallery_directions.T
        rows[start : start + QUERIES] = np.where(usable, similarities, -np.inf).argmax(axis=1)
    return np.where(np.any(query_directions != 0, axis=1), rows, -1)


def unit(features: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    """Returns the features scaled to unit length, float32; zeros where there is no direction."""
    features = np.asarray(features).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.where(np.isfinite(directions).all(axis=1, keepdims=True), directions, 0.0)
