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
from drep_jax.data.buckets import Bucket, exact_buckets, restore_order
from drep_jax.data.collate import read, read_or_mask
from drep_jax.data.corruptions import CLEAN, corrupt
from drep_jax.data.fits import round_up
from drep_jax.data.labels import check_range
from drep_jax.data.loader import evaluation_batches
from drep_jax.data.source import original_size_of, original_sizes_of, size_of, sizes_of, varies
from drep_jax.data.steps import Size
from drep_jax.errors import DataError
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.parallel import devices
from drep_jax.progress import bar
from drep_jax.run.setup import Setup
from drep_jax.tasks import Items, Task
from drep_jax.typing import Batch, Tree

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
        per bucket. None for one bucket per size if the source keeps the sizes of its images, so
        that nothing is padded beyond multiples of `Task.padding`.
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
    if buckets is None and varies(source):
        originals = original_sizes_of(source) if keeps_original(task) else None
        sizes = -(-sizes_of(source) // task.padding) * task.padding
        buckets = exact_buckets(sizes, originals, parts=devices.device_count())
    others = {name: devices.on_devices(_network_outputs(network)) for name, network in networks.items()}
    everywhere = {name: devices.replicate(variables) for name, variables in arms.items()}
    prepare = devices.on_devices(setup.inputs)
    for condition in conditions:
        corrupted = None if condition == CLEAN else task.corrupted_rows(source)
        rows: dict[str, list[Tree]] = {name: [] for name in arms}
        scalars: dict[str, list[np.ndarray]] = {}
        batches = evaluation_batches(
            source, batch_size, shard=devices.host(), columns=task.columns, buckets=buckets, sizes=setup.sizes
        )
        total = sum(len(bucket.steps(batch_size)) for bucket in buckets or ()) or -(-len(source) // batch_size)
        name = f"evaluation, {condition}"
        for batch in bar(batches, name, total, "batch", shown=progress):
            labels = {name: column for name, column in batch.items() if name != "image"}
            labeled = task.has_label(labels) | ~batch["mask"]
            if (numbers := labels.get("label")) is not None and numbers.ndim in (1, 3):
                check_range(numbers, source.num_classes, source.name, batch["index"])
            seen = corrupt(batch["image"], batch["index"], condition, seed, batch.get("size"))
            if corrupted is not None:
                seen = np.where(corrupted[batch["index"]][:, None, None, None], seen, batch["image"])
            labels_there = devices.shard(labels)
            images = prepare({**labels_there, "image": devices.shard(seen)})
            # Label maps may have another size than images, and the program of a network sees those alone.
            known = {name: labels_there[name] for name, column in labels.items() if column.ndim < 3}
            size = batch["image"].shape[1:3]
            for name, variables in everywhere.items():
                network = others.get(name) or backbone_program(task, setup.backbone, statistics.get(name), size)
                outputs = network(variables, images, known)
                counted = statistics_program(task, label_size(labels, size))(outputs, labels_there)
                rows[name].append(devices.unshard(counted))
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


def one_image(setup: Setup, source: Source, index: int) -> Batch:
    """Returns a batch of one image as `score_arms` reads it, with the padding that the task asks for.

    Args:
      setup: of the run.
      source: the images.
      index: which.
    """
    task, where = setup.task, np.array([index], np.int32)
    if not varies(source):
        return read(source, where, task.columns, sizes=setup.sizes)
    original = original_size_of(source, index) if keeps_original(task) else None
    shape = round_up(size_of(source, index), task.padding)
    return read_or_mask(source, where, 1, task.columns, shape, original, sizes=setup.sizes)


def keeps_original(task: Task) -> bool:
    """Returns whether label maps of test images keep the size of the stored image."""
    return any(column.original for column in task.columns)


def label_size(labels: Mapping[str, np.ndarray], size: Size) -> Size:
    """Returns the size of the label maps of a batch; that of its images if there are none."""
    return next((column.shape[1:3] for _, column in sorted(labels.items()) if column.ndim == 3), size)


PROGRAMS = 64
"""Compiled programs that are kept, one for each size of images."""


@functools.lru_cache(maxsize=PROGRAMS)
def backbone_program(task: Task, backbone: nn.Module, mixed: Statistics | None, size: Size) -> Callable[..., Any]:
    """Returns (variables, images, columns) ↦ outputs of the task's network, compiled once per backbone.

    Args:
      task, backbone: of the run.
      mixed: what BatchNorms mix with their trained statistics, or None.
      size: (height, width) of the images.
    """
    del size

    def outputs(variables: Tree, images: Any, columns: Tree) -> Any:
        network: Any = backbone
        if mixed is not None:
            network = MixedStatistics(backbone, mixed, columns["mask"], devices.AXIS)
        return task.predict(network, variables, images, columns)

    return devices.on_devices(outputs)


@functools.lru_cache(maxsize=PROGRAMS)
def statistics_program(task: Task, size: Size) -> Callable[..., Any]:
    """Returns (outputs, columns) ↦ statistics of the task.

    It is a program of its own, so that images of several sizes that the network sees at one size
    share the program of the network, which takes longest to compile.

    Args:
      task: of the run.
      size: (height, width) of the label maps.
    """
    del size
    return devices.on_devices(task.statistics)


def _network_outputs(network: Network) -> Callable[..., Any]:
    return lambda variables, images, columns: network(variables, images)


def _gathered(rows: Mapping[str, list[Tree]], scalars: dict[str, list[np.ndarray]]) -> Scored:
    """Returns the rows of all batches and hosts in the order of the source, without padding."""

    def everyone(*parts: np.ndarray) -> np.ndarray:
        by_host = devices.gather(np.concatenate(parts))  # the index restores the order
        return by_host.reshape(-1, *by_host.shape[2:])

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
