"""Scores several networks of one shape on the same test images under the same corruptions, so that they can be paired."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import numpy as np

from drep_jax.data import Source
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import evaluation_batches
from drep_jax.parallel import devices
from drep_jax.typing import Scores, Tree


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
    devices.check_batch(batch_size, "evaluate.batch_size")
    everywhere = {name: devices.replicate(variables) for name, variables in arms.items()}
    plain = devices.on_devices(backbone.apply)
    apply = {name: devices.on_devices(networks[name]) if name in networks else plain for name in arms}
    prepare = devices.on_devices(inputs)
    result: dict[str, dict[str, Scores]] = {}
    for condition in conditions:
        outputs: dict[str, list[np.ndarray]] = {name: [] for name in arms}
        columns: dict[str, list[np.ndarray]] = {}
        for batch in evaluation_batches(source, batch_size, shard=devices.host()):
            told = {name: column for name, column in batch.items() if name != "image"}
            noisy = corrupt(batch["image"], batch["index"], condition, seed)
            images = prepare(devices.shard({**told, "image": noisy}))
            for name, column in told.items():
                columns.setdefault(name, []).append(column)
            for name, variables in everywhere.items():
                outputs[name].append(devices.unshard(apply[name](variables, images)))
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
    everyone = devices.gather(rows)
    cut = everyone.reshape(len(everyone), batches, -1, *rows.shape[1:])
    return np.swapaxes(cut, 0, 1).reshape(-1, *rows.shape[1:])
