"""Which of a set of known features is nearest: accuracy of a network without a head."""

import numpy as np
from jaxtyping import Float, Int

QUERIES = 512
"""Features that are compared with the gallery at once."""


def nearest(
    gallery: Float[np.ndarray, "known width"], queries: Float[np.ndarray, "asked width"]
) -> Int[np.ndarray, " asked"]:
    """Returns the row of the gallery's feature of largest cosine similarity to each query.

    A feature that is zero or not finite has no neighbor: −1 for such a query, and no query finds such a row.
    """
    known, asked = unit(gallery), unit(queries)
    usable = np.any(known != 0, axis=1)
    rows = np.full(len(asked), -1)
    for start in range(0, len(asked) if usable.any() else 0, QUERIES):
        similar = np.where(usable, asked[start : start + QUERIES] @ known.T, -np.inf)
        rows[start : start + QUERIES] = similar.argmax(axis=1)
    return np.where(np.any(asked != 0, axis=1), rows, -1)


def unit(features: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    """Returns the features at length one, float32; zeros for those that have no direction."""
    features = np.asarray(features).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.where(np.isfinite(directions).all(axis=1, keepdims=True), directions, 0.0)
