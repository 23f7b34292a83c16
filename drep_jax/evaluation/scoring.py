"""Scores of all arms on test images, by the task: of each image (classification) or of each query (retrieval)."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from drep_jax.data import Source
from drep_jax.data.corruptions import CLEAN
from drep_jax.data.metadata import protocol_of, table_of
from drep_jax.errors import NonFiniteError
from drep_jax.evaluation import knn
from drep_jax.evaluation.arms import score_arms
from drep_jax.metrics import classification
from drep_jax.metrics.retrieval.evaluate import Result, evaluate
from drep_jax.run.setup import Setting
from drep_jax.tasks import Retrieval
from drep_jax.typing import Config, Scores, Tree

PLACES = (1, 5, 10)
"""Of the cumulative match characteristic: rank1, rank5, rank10."""


class Scored(NamedTuple):
    """Scores of all arms.

    Attributes:
      scores: {condition: {arm: {metric: (n,)}}}, n images or, for retrieval, queries that have a match.
      clusters: (n,) whose they are, where intervals are to be over persons instead of queries; or None.
    """

    scores: dict[str, dict[str, Scores]]
    clusters: np.ndarray | None


def score(
    config: Config,
    setting: Setting,
    source: Source,
    arms: Mapping[str, Tree],
    conditions: Sequence[str],
    networks: Mapping[str, Callable[[Tree, Any], Any]] = MappingProxyType({}),
) -> Scored:
    """Runs every arm under every condition.

    Args:
      config, setting: of the run.
      source: test images.
      arms: name ↦ variables.
      conditions: corruption specs.
      networks: name ↦ (variables, images) ↦ outputs, of arms that are not the backbone itself.
    """
    if isinstance(setting.task, Retrieval):
        task, scores, clusters = setting.task, {}, None
        for condition in conditions:  # one after the other: features of all at once would fill the memory
            index, rows = features(config, setting, source, arms, condition, networks)
            for arm, own in rows.items():
                if not np.isfinite(own).all():
                    raise NonFiniteError(
                        f"Arm {arm} gives features with NaN or Inf on {condition} images, which cannot be ranked. Leave it out "
                        "of --config.compare, or train it with a smaller learning rate; what the run has learned is kept."
                    )
            found = {arm: ranked(task, source, index, own) for arm, own in rows.items()}
            scores[condition] = {arm: result.scores for arm, result in found.items()}
            clusters = next(iter(found.values())).identity
        return Scored(scores, clusters if task.bootstrap_unit == "identity" else None)
    how = options(config, setting)
    scores = score_arms(setting.backbone, arms, source, conditions, _hits, networks=networks, **how)
    return Scored(scores, None)


def options(config: Config, setting: Setting) -> dict[str, Any]:
    """Returns how images are read and shown to networks, for `score_arms`."""
    return {"batch_size": config["evaluate"]["batch_size"], "inputs": setting.inputs, "seed": config["seed"]}


def _hits(outputs: np.ndarray, columns: Scores) -> Scores:
    return classification.scores(outputs, columns["label"])


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval
# ---------------------------------------------------------------------------------------------------------------------


def features(
    config: Config,
    setting: Setting,
    source: Source,
    arms: Mapping[str, Tree],
    condition: str,
    networks: Mapping[str, Callable[[Tree, Any], Any]] = MappingProxyType({}),
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the numbers of the images that could be read, (n,), and every arm's features of them, (n, width).

    The condition corrupts queries, gallery or both, as the task says; images of a part that it does not corrupt are clean.
    """
    corrupted = setting.task.corrupted if isinstance(setting.task, Retrieval) else "both"
    names = (condition,) if corrupted == "both" or condition == CLEAN else (condition, CLEAN)
    found = score_arms(
        setting.backbone, arms, source, names, knn.features, networks=networks, **options(config, setting)
    )
    index = next(iter(found[condition].values()))["index"]
    rows = {arm: scores["features"] for arm, scores in found[condition].items()}
    if len(names) > 1:
        kept = table_of(source)["gallery" if corrupted == "query" else "query"][index] == 1
        rows = {arm: np.where(kept[:, None], found[CLEAN][arm]["features"], own) for arm, own in rows.items()}
    return index, rows


def ranked(task: Retrieval, source: Source, index: np.ndarray, rows: np.ndarray) -> Result:
    """Returns how well features of a test split rank, by its own protocol.

    Args:
      task: metric and re-ranking.
      source: the test split.
      index: numbers of the images that were read.
      rows: their features, (n, width).
    """
    how: dict[str, Any] = {"metric": task.metric, "branches": task.branches, "rerank": task.rerank, "ks": PLACES}
    return evaluate(rows, table_of(source, index), protocol_of(source), **how)


def held_out_map(task: Retrieval, source: Source, index: np.ndarray, rows: np.ndarray) -> float:
    """Returns the mean average precision of held-out identities, in per cent; NaN where features overflowed.

    Every image is a query and, for the others, in the gallery.
    """
    if not np.isfinite(rows).all():
        return float("nan")
    everything = np.ones(len(index), np.int32)
    table = table_of(source, index) | {"query": everything, "gallery": everything}
    found = evaluate(rows, table, protocol_of(source), metric=task.metric, branches=task.branches)
    return 100.0 * float(np.mean(found.scores["mAP"]))
