"""Metrics as functions of (statistics of items, weights of items).

Weights of 1 give the published number. Where weight w_i is the count of item i in a bootstrap
resample, the metric gives the number of that resample. So paired intervals work for every metric,
not only for means.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Metric = Callable[[Any, np.ndarray], np.ndarray]
"""(statistics: a tree with a leading axis of n items, weights (…, n)) ↦ value (…,)."""


def mean_of(name: str) -> Metric:
    """Returns the weighted mean Σ w_i·s_i / Σ w_i of a statistic as a metric.

    >>> metric = mean_of("acc@1")
    >>> float(metric({"acc@1": np.array([1.0, 0.0, 1.0, 1.0])}, np.ones(4)))
    0.75

    Args:
      name: the statistic, (n,).
    """

    def mean(statistics: Any, weights: np.ndarray) -> np.ndarray:
        values = np.asarray(statistics[name], np.float64)
        return weights @ values / weights.sum(axis=-1)

    return mean
