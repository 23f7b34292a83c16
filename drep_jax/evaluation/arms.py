"""Scores of several networks on the same test images and corruptions, for paired comparison.

Statistics are computed on the devices, batch by batch. The host holds one row per image, never the
outputs of a test set.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from drep_jax.data import Source
from drep_jax.data.buckets import Bucket, restore_order
from drep_jax.data.corruptions import CLEAN, corrupt
from drep_jax.data.labels import check_range
from drep_jax.data.loader import evaluation_batches
from drep_jax.errors import DataError
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.parallel import devices
from drep_jax.progress import bar
from drep_jax.run.setup import Setup
from drep_jax.tasks import Items, Task
from drep_jax.typing import Tree

Network = Callable[[Tree, Any], Any]
"""(variables, images) ↦ outputs."""

UNLABELED = "unlabeled"
"""Name of the column of images without a label, which batches do not have."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Statistics of all arms under one condition.

    Attributes:
      index: (n,) indices of the images read that have a label to be scored by.
      columns: their scalar label columns, such as "label", (n,) each.
      statistics: arm ↦ tree with one row per image.
      unlabeled: number of images that were left out because they have no label.
    """

    index: np.ndarray
    columns: dict[str, np.ndarray]
    statistics: dict[str, Tree]
    unlabeled: int = 0


def score_arms(
    setup: Setup,
    arms: Mapping[str, Tree],
    source: Source,
    conditions: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    networks: Mapping[str, Network] = MappingProxyType({}),
    statistics: Mapping[str, Statistics] = MappingProxyType({}),
    buckets: Sequence[Bucket] | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Scored]]:
    """Yields each condition with the task's statistics of every image and arm.

    Args:
      setup: the backbone, the task and the normalization of images.
      arms: name ↦ variables.
      source: test images with their labels.
      conditions: corruption specs, see `drep_jax.data.corruptions`; the task says which images they
        corrupt.
      batch_size: images per batch over all hosts, a multiple of the number of devices.
      seed: of the corruptions; every arm sees the same images.
      networks: name ↦ network, for the arms that are not the backbone itself.
      statistics: name ↦ what the backbone's BatchNorms mix with their trained statistics, for arms
        that do. Over "batch" it is that of the evaluation, on all devices and without padding.
      buckets: for images of several sizes, see `drep_jax.data.buckets.make_buckets`; one program
        per bucket.
      progress: whether to show a progress bar.

    Returns:
      (condition, statistics of all images, on every host), one condition after the other. Padding
      of the last batch is removed, so the statistics are exact for any number of images; so are
      images without a label, see `Task.has_label`.

    Raises:
      DataError: for labels outside the classes of the source, or if no image is left.
    """
    devices.check_batch(batch_size, "evaluate.batch_size")
    task = setup.task
    programs = {
        name: devices.on_devices(_network_statistics(task, networks[name]))
        if name in networks
        else backbone_program(task, setup.backbone, statistics.get(name))
        for name in arms
    }
    everywhere = {name: devices.replicate(variables) for name, variables in arms.items()}
    prepare = devices.on_devices(setup.inputs)
    for condition in conditions:
        corrupted = None if condition == CLEAN else task.corrupted_rows(source)
        rows: dict[str, list[Tree]] = {name: [] for name in arms}
        scalars: dict[str, list[np.ndarray]] = {}
        batches = evaluation_batches(source, batch_size, shard=devices.host(), columns=task.columns, buckets=buckets)
        total = sum(len(bucket.steps(batch_size)) for bucket in buckets or ()) or -(-len(source) // batch_size)
        name = f"evaluation, {condition}"
        for batch in bar(batches, name, total, "batch", shown=progress):
            labels = {name: column for name, column in batch.items() if name != "image"}
            labeled = task.has_label(labels) | ~batch["mask"]
            if (numbers := labels.get("label")) is not None and numbers.ndim == 1:
                check_range(numbers, source.num_classes, source.name, batch["index"])
            seen = corrupt(batch["image"], batch["index"], condition, seed, batch.get("size"))
            if corrupted is not None:
                seen = np.where(corrupted[batch["index"]][:, None, None, None], seen, batch["image"])
            labels_there = devices.shard(labels)
            images = prepare({**labels_there, "image": devices.shard(seen)})
            for name, variables in everywhere.items():
                rows[name].append(devices.unshard(programs[name](variables, images, labels_there)))
            labels = {**labels, "index": np.where(labeled, labels["index"], -1), UNLABELED: ~labeled}
            for name, column in labels.items():
                if column.ndim == 1:
                    scalars.setdefault(name, []).append(column)
        result = _gathered(rows, scalars)
        if not len(result.index):
            raise DataError(
                f"None of the {len(source):,} images of {source.name} can be scored: none is readable and labeled."
            )
        yield condition, result


@functools.lru_cache(maxsize=8)
def backbone_program(task: Task, backbone: nn.Module, mixed: Statistics | None = None) -> Callable[..., Any]:
    """Returns (variables, images, labels) ↦ statistics of the task, compiled once per backbone.

    Args:
      task, backbone: of the run.
      mixed: what BatchNorms mix with their trained statistics, or None.
    """

    def statistics(variables: Tree, images: Any, labels: Tree) -> Tree:
        network: Any = backbone
        if mixed is not None:
            network = MixedStatistics(backbone, mixed, labels["mask"], devices.AXIS)
        return task.statistics(task.predict(network, variables, images, labels), labels)

    return devices.on_devices(statistics)


def _network_statistics(task: Task, network: Network) -> Callable[..., Any]:
    return lambda variables, images, labels: task.statistics(network(variables, images), labels)


def _gathered(rows: Mapping[str, list[Tree]], scalars: dict[str, list[np.ndarray]]) -> Scored:
    """Returns the rows of all batches and hosts in the order of the source, without padding."""
    batches = len(scalars["index"])

    def everyone(*parts: np.ndarray) -> np.ndarray:
        return in_order(np.concatenate(parts), batches)

    index = everyone(*scalars["index"])

    def whole(*parts: np.ndarray) -> np.ndarray:
        return restore_order(index, everyone(*parts))

    columns = {name: whole(*parts) for name, parts in scalars.items() if name not in ("index", "mask", UNLABELED)}
    statistics = {name: jax.tree_util.tree_map(whole, *parts) for name, parts in rows.items()}
    return Scored(restore_order(index, index), columns, statistics, int(everyone(*scalars[UNLABELED]).sum()))


def items_of(setup: Setup, source: Source, scored: Scored, condition: str) -> dict[str, Items]:
    """Returns the items of every arm, such as queries, from the statistics of the images."""
    left_out = {"images without a label": scored.unlabeled} if scored.unlabeled else {}
    items = {
        arm: setup.task.items(rows, source, scored.index, f"Arm {arm} on {condition} images")
        for arm, rows in scored.statistics.items()
    }
    return {arm: each._replace(left_out={**left_out, **each.left_out}) for arm, each in items.items()}


def in_order(rows: np.ndarray, batches: int) -> np.ndarray:
    """Returns the rows of all hosts in the order in which batches were made, on every host.

    Args:
      rows: the rows of this host, (batches · rows per batch and host, …); all hosts have equal
        slices of each batch.
      batches: number of batches.
    """
    by_host = devices.gather(rows)
    by_batch = by_host.reshape(len(by_host), batches, -1, *rows.shape[1:])
    return np.swapaxes(by_batch, 0, 1).reshape(-1, *rows.shape[1:])
