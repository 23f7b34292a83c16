"""Accuracy by nearest neighbor: a test image gets the class of the nearest training feature.

Similarity is the cosine. This compares arms on images whose classes the backbone's head does not
know.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drep_jax.data.corruptions import CLEAN
from drep_jax.data.datasets import Labeled
from drep_jax.errors import DataError
from drep_jax.evaluation.arms import score_arms
from drep_jax.metrics.nearest import nearest
from drep_jax.metrics.reducers import Metric, mean_of
from drep_jax.run.setup import Setup
from drep_jax.tasks.base import Items
from drep_jax.typing import Tree

METRIC = "acc@1"

METRICS: Mapping[str, Metric] = {METRIC: mean_of(METRIC)}


def score_by_neighbors(
    setup: Setup, arms: Mapping[str, Tree], images: Labeled, conditions: Sequence[str], **options: Any
) -> dict[str, dict[str, Items]]:
    """Classifies test images by the features of every arm and condition, with a clean gallery.

    Args:
      setup: of the run; its backbone without a head gives the features.
      arms: name ↦ variables; those of a head are not used.
      images: gallery and test images with labels.
      conditions: corruption specs.
      **options: batch_size, seed and progress of `drep_jax.evaluation.arms.score_arms`.

    Returns:
      {condition: {arm: items with "acc@1", (n,) of 0 or 1}}.

    Raises:
      DataError: for images without a gallery.
    """
    if images.gallery is None:
        raise DataError(f"{images.name} has no gallery of training images.")
    featured = setup.without_head()
    ((_, gallery),) = score_arms(featured, arms, images.gallery, (CLEAN,), **options)
    results: dict[str, dict[str, Items]] = {}
    for condition, scored in score_arms(featured, arms, images.test, conditions, **options):
        results[condition] = {
            arm: Items(
                {
                    METRIC: hits(
                        gallery.statistics[arm]["feature"],
                        gallery.columns["label"],
                        rows["feature"],
                        scored.columns["label"],
                    )
                },
                left_out={"images without a label": scored.unlabeled} if scored.unlabeled else {},
            )
            for arm, rows in scored.statistics.items()
        }
    return results


def hits(gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns whether the nearest gallery feature has the class of each query, (n,) of 0 or 1.

    A query without a neighbor (NaN, Inf, zero) counts as wrong.

    >>> gallery = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> hits(gallery, np.array([3, 4]), np.array([[2.0, 1.0], [2.0, 1.0]]), np.array([3, 4])).tolist()
    [1.0, 0.0]

    Args:
      gallery, queries: features, (m, width) and (n, width).
      gallery_labels, labels: their classes, (m,) and (n,).
    """
    rows = nearest(gallery, queries)
    return ((rows >= 0) & (gallery_labels[rows] == labels)).astype(np.float64)
