"""Whether the right class is first, or among the first five."""

import numpy as np
from jaxtyping import Float, Int


def scores(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """Returns for each image whether its class is first (acc@1) and among the first five (acc@5), (n,) of 0 or 1.

    Ties count against the network: a class is ranked behind every other class with the same logit.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    rank = np.sum(logits >= own, axis=1) - 1
    return {f"acc@{k}": (rank < k).astype(np.float64) for k in (1, 5)}
