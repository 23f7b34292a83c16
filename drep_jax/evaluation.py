"""Scores several networks of one shape on the same test images under the same corruptions, so that they can be paired."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import numpy as np

from drep_jax.data import Source
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import evaluation_batches
from drep_jax.errors import DataError
from drep_jax.report.comparisons import TESTED, pairs_of
from drep_jax.statistics import mcnemar, paired_interval
from drep_jax.training import parallel

Tree = Any
Scores = dict[str, np.ndarray]


def score_arms(
    backbone: nn.Module,
    arms: Mapping[str, Tree],
    source: Source,
    conditions: Sequence[str],
    scores: Callable[[np.ndarray, Scores], Scores],
    *,
    batch_size: int,
    inputs: Callable[[Mapping[str, Any]], Any],
    seed: int,
    networks: Mapping[str, Callable[[Tree, Any], Any]] = MappingProxyType({}),
) -> dict[str, dict[str, Scores]]:
    """Runs every arm on every condition.

    Args:
      backbone: the one architecture of all arms.
      arms: name ↦ variables.
      source: labelled test images.
      conditions: corruption specs, see `drep_jax.data.corruptions`.
      scores: (outputs, columns of the images, such as "label" and "index") ↦ {name: (n, …)}.
      batch_size: over all hosts, a multiple of the number of their devices.
      inputs: batch ↦ images as the backbone gets them.
      seed: of the corruptions; every arm sees the same images.
      networks: name ↦ (variables, images) ↦ outputs, of arms that are not the backbone itself.

    Returns:
      {condition: {arm: {name: (n, …)}}}, of all images on every host. The last batch is padded, and what is padding is
      left out, so the scores are exact for any number of images.
    """
    parallel.check_batch(batch_size, "evaluate.batch_size")
    everywhere = {name: parallel.replicate(variables) for name, variables in arms.items()}
    plain = parallel.on_devices(backbone.apply)
    apply = {name: parallel.on_devices(networks[name]) if name in networks else plain for name in arms}
    prepare = parallel.on_devices(inputs)
    result: dict[str, dict[str, Scores]] = {}
    for condition in conditions:
        outputs: dict[str, list[np.ndarray]] = {name: [] for name in arms}
        columns: dict[str, list[np.ndarray]] = {}
        for batch in evaluation_batches(source, batch_size, shard=parallel.host()):
            told = {name: column for name, column in batch.items() if name != "image"}
            noisy = corrupt(batch["image"], batch["index"], condition, seed)
            images = prepare(parallel.shard({**told, "image": noisy}))
            for name, column in told.items():
                columns.setdefault(name, []).append(column)
            for name, variables in everywhere.items():
                outputs[name].append(parallel.unshard(apply[name](variables, images)))
        batches = len(columns["mask"])
        all_columns = {name: np.concatenate(parts) for name, parts in columns.items()}
        own = {name: scores(np.concatenate(rows), all_columns) for name, rows in outputs.items()}
        mask = in_order(all_columns["mask"], batches)
        result[condition] = {
            name: {metric: in_order(values, batches)[mask] for metric, values in found.items()}
            for name, found in own.items()
        }
    return result


def in_order(rows: np.ndarray, batches: int) -> np.ndarray:
    """Returns the rows of all hosts in the order of the source, on every host.

    Args:
      rows: this host's, (batches · its part of a batch, …): every host has an equal slice of each batch.
      batches: how many.
    """
    everyone = parallel.gather(rows)
    cut = everyone.reshape(len(everyone), batches, -1, *rows.shape[1:])
    return np.swapaxes(cut, 0, 1).reshape(-1, *rows.shape[1:])


def summarize(
    results: Mapping[str, Mapping[str, Scores]],
    *,
    controls: Sequence[str],
    resamples: int,
    seed: int,
    clusters: np.ndarray | None = None,
) -> dict[str, Any]:
    """Turns scores into the report's `metrics`: means in per cent, paired differences, 95 % intervals, McNemar.

    Args:
      results: {condition: {arm: {metric: (n,)}}}; arms other than `baseline` and the controls are denoised networks.
      controls: arms that show what comes about without denoising.
      resamples, seed: of the bootstrap.
      clusters: (n,) numbers of what is resampled as a whole, such as the persons of the queries; None for each item by itself.

    Returns:
      By condition, what docs/report.md describes. Every denoised arm is compared with the baseline and with every
      control, and every control with the baseline.

    Raises:
      DataError: where the baseline or a control has no scores.
    """
    table = {}
    for condition, arms in results.items():
        for name in ("baseline", *controls):
            if name not in arms:
                raise DataError(f"No scores of the arm {name!r} under {condition}; there are: {', '.join(arms)}.")
        percent = {name: {m: 100.0 * float(v.mean()) for m, v in scores.items()} for name, scores in arms.items()}
        entry: dict[str, Any] = {
            "n": len(next(iter(arms["baseline"].values()))),
            "baseline": percent["baseline"],
            "control": {name: percent[name] for name in controls},
            "denoised": {name: percent[name] for name in arms if name not in ("baseline", *controls)},
            "difference": {},
            "interval": {},
            "mcnemar": {},
        }
        for ours, theirs in pairs_of(entry):
            name = f"{ours} - {theirs}"
            found = {
                m: paired_interval(v, arms[theirs][m], resamples=resamples, seed=seed, clusters=clusters)
                for m, v in arms[ours].items()
            }
            entry["difference"][name] = {m: 100.0 * i.difference for m, i in found.items()}
            entry["interval"][name] = {m: [100.0 * i.low, 100.0 * i.high] for m, i in found.items()}
            for metric in TESTED & arms[ours].keys():
                values = arms[ours][metric], arms[theirs][metric]
                if clusters is None and np.isin(values, (0, 1)).all():  # not means over several galleries
                    entry["mcnemar"][name] = mcnemar(*values)
        table[condition] = entry
    return table
