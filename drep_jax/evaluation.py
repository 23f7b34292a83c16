"""Scores several networks of one shape on the same test images under the same corruptions, so that they can be paired."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from drep_jax.data import Source
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import evaluation_batches, normalize
from drep_jax.statistics import mcnemar, paired_interval
from drep_jax.training import parallel

Tree = Any
Scores = dict[str, np.ndarray]


def score_arms(
    backbone: nn.Module,
    arms: Mapping[str, Tree],
    source: Source,
    conditions: Sequence[str],
    scores: Callable[[np.ndarray, np.ndarray], Scores],
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> dict[str, dict[str, Scores]]:
    """Runs every arm on every condition.

    Args:
      backbone: the one architecture of all arms.
      arms: name ↦ variables.
      source: labelled test images.
      conditions: corruption specs, see `drep_jax.data.corruptions`.
      scores: from the task, (outputs, labels) ↦ {metric: (n,)}.
      batch_size: a multiple of the number of local devices.
      mean, std: of the normalisation, on the scale 0 to 1.
      seed: of the corruptions; every arm sees the same images.

    Returns:
      {condition: {arm: {metric: (n,)}}}.
    """
    parallel.check_batch(batch_size, "evaluate.batch_size")
    everywhere = {name: parallel.replicate(variables) for name, variables in arms.items()}
    apply = parallel.on_devices(backbone.apply)
    prepare = parallel.on_devices(lambda images: normalize(images, mean, std))
    result: dict[str, dict[str, Scores]] = {}
    for condition in conditions:
        outputs: dict[str, list[np.ndarray]] = {name: [] for name in arms}
        labels: list[np.ndarray] = []
        for batch in evaluation_batches(source, batch_size):
            images = prepare(parallel.shard(corrupt(batch["image"], batch["index"], condition, seed)))
            labels.append(batch["label"][batch["mask"]])
            for name, variables in everywhere.items():
                outputs[name].append(parallel.unshard(apply(variables, images))[batch["mask"]])
        truth = np.concatenate(labels)
        result[condition] = {name: scores(np.concatenate(rows), truth) for name, rows in outputs.items()}
    return result


def summarize(results: Mapping[str, Mapping[str, Scores]], *, resamples: int, seed: int) -> dict[str, Any]:
    """Turns scores into the report's `metrics`: means in per cent, paired differences, 95 % intervals, McNemar.

    Every arm other than `baseline` and `fused` is a control; `fused` is compared with each of them, and each control with
    the baseline.
    """
    table = {}
    for condition, arms in results.items():
        controls = [name for name in arms if name not in ("baseline", "fused")]
        pairs = [("fused", "baseline"), *(("fused", c) for c in controls), *((c, "baseline") for c in controls)]
        percent = {name: {m: 100.0 * float(v.mean()) for m, v in scores.items()} for name, scores in arms.items()}
        difference: dict[str, Any] = {}
        interval: dict[str, Any] = {}
        test: dict[str, float] = {}
        for ours, theirs in pairs:
            name = f"{ours} - {theirs}"
            found = {
                m: paired_interval(v, arms[theirs][m], resamples=resamples, seed=seed) for m, v in arms[ours].items()
            }
            difference[name] = {m: 100.0 * i.difference for m, i in found.items()}
            interval[name] = {m: [100.0 * i.low, 100.0 * i.high] for m, i in found.items()}
            if "acc@1" in arms[ours]:
                test[name] = mcnemar(arms[ours]["acc@1"], arms[theirs]["acc@1"])
        table[condition] = {
            "n": len(next(iter(arms["baseline"].values()))),
            "baseline": percent["baseline"],
            "control": {name: percent[name] for name in controls},
            "fused": percent["fused"],
            "difference": difference,
            "interval": interval,
            "mcnemar": test,
        }
    return table
