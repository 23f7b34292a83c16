"""From statistics of items to one number: a metric is a function of (statistics, weights of the items).

With weights 1 it gives the published number. With w_i the times that item i was drawn in a bootstrap resample, it gives the
number of that resample, so paired intervals work for every metric, and a mean is one special case.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Metric = Callable[[Any, np.ndarray], np.ndarray]
"""(statistics: a tree with a leading axis of n items, weights (…, n)) ↦ value (…,)."""


def mean_of(name: str) -> Metric:
    """Returns the metric Σ w_i·s_i / Σ w_i of one statistic.

    >>> metric = mean_of("acc@1")
    >>> float(metric({"acc@1": np.array([1.0, 0.0, 1.0, 1.0])}, np.ones(4)))
    0.75

    Args:
      name: of the statistic, (n,).
    """

    def mean(statistics: Any, weights: np.ndarray) -> np.ndarray:
        values = np.asarray(statistics[name], np.float64)
        return weights @ values / weights.sum(axis=-1)

    return mean
