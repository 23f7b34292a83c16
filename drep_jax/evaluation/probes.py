"""Frozen features compared by what a linear probe and nearest neighbors read from them, arm by arm on the same images."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from drep_jax.data import Source
from drep_jax.data.corruptions import CLEAN
from drep_jax.errors import DataError
from drep_jax.evaluation.arms import Network, score_arms
from drep_jax.evaluation.intervals import Bootstrap
from drep_jax.evaluation.knn import hits as neighbor_hits
from drep_jax.metrics.reducers import mean_of
from drep_jax.pretraining.probe import Probe, ridge_probe, standardized, trained_probe
from drep_jax.run.setup import Setup
from drep_jax.typing import Scores, Tree

RIDGE, TRAINED, NEIGHBOR = "ridge", "trained", "nearest"
"""What reads the features: `ridge_probe`, `trained_probe`, or the nearest training feature by the
cosine, behind the same BatchNorm without parameters."""


def features_of(
    setup: Setup,
    arms: Mapping[str, Tree],
    source: Source,
    condition: str = CLEAN,
    networks: Mapping[str, Network] = MappingProxyType({}),
    **options: Any,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns {arm: features, (n, width)} of labeled images and their labels, (n,).

    Args:
      setup: of the run; its backbone without a head gives the features.
      arms: name ↦ variables.
      source: of the images.
      condition: a corruption spec.
      networks: name ↦ network of the arms that are not the backbone.
      **options: batch_size, seed and progress of `drep_jax.evaluation.arms.score_arms`.
    """
    featured = setup.without_head()
    ((_, scored),) = score_arms(featured, arms, source, (condition,), networks=networks, **options)
    features = {name: np.asarray(rows["feature"]) for name, rows in scored.statistics.items()}
    return features, scored.columns["label"]


def probe_arms(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: int,
    *,
    readers: Sequence[str] = (RIDGE, NEIGHBOR),
    seed: int = 0,
    progress: bool = False,
    **recipe: Any,
) -> dict[str, dict[str, Any]]:
    """Returns {arm: {reader: (features, labels) ↦ hits}} learned from training features.

    Args:
      features: arm ↦ training features.
      labels: of the images.
      classes: number of them.
      readers: of `RIDGE`, `TRAINED` and `NEIGHBOR`.
      seed, progress: of the trained probe.
      **recipe: further options of `drep_jax.pretraining.probe.trained_probe`.
    """

    def learned(reader: str, rows: np.ndarray) -> Any:
        if reader == NEIGHBOR:
            gallery = standardized(rows, rows)
            return lambda queries, truth: neighbor_hits(gallery, labels, standardized(queries, rows), truth)
        probe: Probe = (
            ridge_probe(rows, labels, classes)
            if reader == RIDGE
            else trained_probe(rows, labels, classes, seed=seed, progress=progress, **recipe)
        )
        return probe.hits

    return {arm: {reader: learned(reader, rows) for reader in readers} for arm, rows in features.items()}


def compare_arms(hits: Mapping[str, Scores], ours: str, *, resamples: int, seed: int) -> dict[str, Any]:
    """Returns the accuracy of all arms, and the paired differences of one from each other one, in points.

    Args:
      hits: arm ↦ {reader: 0 or 1 an image}; the images are the same.
      ours: the arm that is compared with the others.
      resamples, seed: of the bootstrap.

    Returns:
      {"n", "accuracy": {arm: {reader: %}}, "difference": {arm: {reader: [difference, low, high]}}}.

    Raises:
      DataError: if arms have other images.
    """
    counts = {len(values) for scores in hits.values() for values in scores.values()}
    if len(counts) != 1:
        raise DataError(f"The arms have {sorted(counts)} test images; they must be the same images.")
    bootstrap = Bootstrap(count := counts.pop(), resamples=resamples, seed=seed)
    metrics = {(arm, reader): (mean_of(reader), scores) for arm, scores in hits.items() for reader in scores}
    resampled = bootstrap.values(metrics)
    difference: dict[str, dict[str, list[float]]] = {}
    for arm, scores in hits.items():
        for reader in scores if arm != ours else ():
            value = float(hits[ours][reader].mean() - scores[reader].mean())
            interval = bootstrap.interval(value, resampled[ours, reader] - resampled[arm, reader])
            numbers = (interval.difference, interval.low, interval.high)
            difference.setdefault(arm, {})[reader] = [100.0 * number for number in numbers]
    accuracy = {
        arm: {reader: 100.0 * float(values.mean()) for reader, values in scores.items()} for arm, scores in hits.items()
    }
    return {"n": count, "accuracy": accuracy, "difference": difference}
