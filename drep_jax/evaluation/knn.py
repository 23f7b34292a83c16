"""Accuracy without a head: a test image has the class of the training image whose features are nearest (cosine).

So the arms of a run can be compared on images whose classes the backbone's head does not know.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from drep_jax.data.corruptions import CLEAN
from drep_jax.data.datasets import Labelled
from drep_jax.errors import DataError
from drep_jax.evaluation.arms import score_arms
from drep_jax.typing import Scores, Tree

QUERIES = 512
"""Test images that are compared with the gallery at once."""


def score_by_neighbors(
    backbone: nn.Module, arms: Mapping[str, Tree], images: Labelled, conditions: Sequence[str], **options: Any
) -> dict[str, dict[str, Scores]]:
    """Classifies a source's test images by every arm's features under every condition; the gallery stays clean.

    Args:
      backbone: the architecture of all arms without its head.
      arms: name ↦ variables; those of a head are not used.
      images: gallery and test images.
      conditions: corruption specs.
      **options: batch_size, inputs and seed of `drep_jax.evaluation.arms.score_arms`.

    Returns:
      {condition: {arm: {"acc@1": (n,)}}}, of 0 or 1.
    """
    if images.gallery is None:
        raise DataError(f"{images.name} has no gallery of training images.")
    known = score_arms(backbone, arms, images.gallery, (CLEAN,), features, **options)[CLEAN]
    asked = score_arms(backbone, arms, images.test, conditions, features, **options)
    return {
        condition: {arm: {"acc@1": hits(known[arm], found)} for arm, found in by_arm.items()}
        for condition, by_arm in asked.items()
    }


def hits(gallery: Scores, queries: Scores) -> np.ndarray:
    """Returns whether the nearest image of the gallery has the class of each query, (n,) of 0 or 1.

    Features that are not finite, or zero, have no neighbour: such a query counts as wrong, and no query finds such an image.

    Args:
      gallery, queries: "features" (n, width) and "labels" (n,).
    """
    known, asked = _unit(gallery["features"]), _unit(queries["features"])
    real = np.any(known != 0, axis=1)
    found = np.full(len(asked), -1)
    for start in range(0, len(asked) if real.any() else 0, QUERIES):
        nearest = np.where(real, asked[start : start + QUERIES] @ known.T, -np.inf).argmax(axis=1)
        found[start : start + QUERIES] = gallery["labels"][nearest]
    return ((found == queries["labels"]) & np.any(asked != 0, axis=1)).astype(np.float64)


def features(outputs: np.ndarray, columns: Scores) -> Scores:
    """Returns outputs as features, with the images' "label" and "index"."""
    return {"features": outputs.reshape(len(outputs), -1), "labels": columns["label"], "index": columns["index"]}


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.where(np.isfinite(unit).all(axis=1, keepdims=True), unit, 0.0)
