"""Selection of denoisers and strength on held-out images; one option is the unchanged backbone.

Every candidate is a `denoise` subtree for rule "affine". A point of the grid is a candidate and a
strength τ. With labels, a point is scored by the task's headline metric. Without, it is scored by
*agreement*: the same metric against the task's pseudo-labels, the unfused backbone's predictions on
the clean images. The two criteria agree on every image whose pseudo-label is right, so for accuracy
they differ by at most the backbone's clean error.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.fusion import fuse_variables
from drep_jax.data.collate import read
from drep_jax.data.corruptions import CLEAN, corrupt
from drep_jax.data.loader import epoch_order
from drep_jax.errors import ConfigError, DataError, NonFiniteError
from drep_jax.evaluation.summary import value_of
from drep_jax.parallel import devices
from drep_jax.progress import pulsing
from drep_jax.run.setup import Setup
from drep_jax.tasks import Items, Task
from drep_jax.typing import Batch, Tree

SELECTION_SEED = 2
"""Added to the run's seed for the corruption of held-out images."""


AGREEMENT = "agreement"
"""The criterion of selection without labels."""

STACK_BYTES = 2**30
"""Bytes of candidates on the device at once; more candidates are evaluated in several stacks."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Options of the selection.

    Attributes:
      strengths: strengths of fusion; 0, the unchanged backbone, is always included.
      conditions: corruptions of the held-out images; clean is always included.
      images: number of held-out images, 0 for all.
      labels: whether to use labels if there are any.
      max_clean_loss: percentage points that may be lost on clean images.
      batch_size: images per batch, over all hosts.
      seed: of the images and the corruptions.
      progress: whether to show a progress bar.
    """

    strengths: tuple[float, ...]
    conditions: tuple[str, ...]
    images: int = 0
    labels: bool = True
    max_clean_loss: float = 1.0
    batch_size: int = 200
    seed: int = 0
    progress: bool = False


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Denoisers for rule "affine", with a name for the report."""

    label: str
    denoise: Tree


@dataclasses.dataclass(frozen=True)
class Point:
    """A candidate at a strength, with percentages by condition (NaN if outputs overflowed).

    Attributes:
      change: τ·‖I − A‖, the root mean square over all directions of all sites; 0 for the backbone.
    """

    label: str
    candidate: int
    strength: float
    change: float
    accuracy: dict[str, float] | None
    agreement: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The points of a grid and the selected one.

    Attributes:
      points: all points; the first is the unchanged backbone.
      chosen: index of the selected point.
      criterion: name of the score, the task's own criterion or "agreement".
      conditions: clean first.
      images: number of held-out images.
      seconds: duration of the selection.
    """

    points: tuple[Point, ...]
    chosen: int
    criterion: str
    conditions: tuple[str, ...]
    images: int
    seconds: float

    def scores(self, number: int) -> dict[str, float]:
        """Returns a point's scores by the criterion."""
        return _scores(self.points[number], self.criterion)

    def front(self) -> dict[str, Any]:
        """Returns the report's `front`."""
        return {
            "conditions": list(self.conditions),
            "chosen": self.chosen,
            "points": [
                {"label": point.label, "strength": point.strength, "scores": self.scores(number)}
                for number, point in enumerate(self.points)
            ],
        }


def grid_statistics(
    setup: Setup,
    variables: Tree,
    candidates: Sequence[Candidate],
    points: Sequence[tuple[int, float]],
    *,
    against_labels: bool,
) -> Any:
    """Returns a compiled function from a batch to the statistics of every point, on all devices.

    Args:
      setup: the unfused network and the task.
      variables: of the unfused network.
      candidates: stacked, so that one program serves all; large ones in several stacks of one
        shape.
      points: (index of the candidate, strength).
      against_labels: whether to compute statistics against the labels of the images.

    Returns:
      (images, their columns, pseudo-labels) ↦ {"labels": statistics, "pseudo": statistics,
      "finite": bool}, each with axes (points, images, …). "labels" is {} without `against_labels`,
      "pseudo" is {} without pseudo-labels.
    """
    size = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(candidates[0].denoise))
    per_stack = min(len(candidates), max(1, STACK_BYTES // max(1, size)))
    rows: dict[int, list[int]] = {}
    for row, (number, _) in enumerate(points):
        rows.setdefault(number // per_stack, []).append(row)
    longest = max(len(members) for members in rows.values())
    task = setup.task

    def run(variables: Tree, stacked: Tree, which: Any, strengths: Any, images: Any, batch: Tree, pseudo: Tree) -> Any:
        def one(point: Any) -> Any:
            # At strength 0 the map is set to 0, since 0 · Inf is not 0.
            denoise = jax.tree_util.tree_map(lambda leaf: jnp.where(point[1] == 0, 0, leaf[point[0]]), stacked)
            fusing = {"rule": "affine", "steps": 1, "strength": point[1]}
            fused = fuse_variables(variables, denoise, setup.sites, setup.schedule, **fusing)
            outputs = task.predict(setup.backbone, fused, images, batch)
            return {
                "labels": task.statistics(outputs, batch) if against_labels else {},
                "pseudo": task.statistics(outputs, {**batch, **pseudo}) if pseudo else {},
                "finite": _finite(outputs, len(images)),
            }

        return jax.lax.map(one, (which, strengths))

    program = devices.on_devices(run)

    def stack(number: int) -> Any:
        first = number * per_stack
        trees = [candidates[min(first + i, len(candidates) - 1)].denoise for i in range(per_stack)]
        members = [points[row] for row in rows[number]]
        members += [(first, 0.0)] * (longest - len(members))
        which = np.array([candidate - first for candidate, _ in members], np.int32)
        strengths = np.array([strength for _, strength in members], np.float32)
        return devices.replicate((jax.tree_util.tree_map(lambda *leaves: np.stack(leaves), *trees), which, strengths))

    everywhere = devices.replicate(dict(variables))
    single_stack = stack(next(iter(rows))) if len(rows) == 1 else None
    order = np.argsort(np.concatenate(list(rows.values())))

    def statistics(images: Any, columns: Tree, pseudo: Tree) -> Tree:
        batch = [_on_devices(tree) for tree in (images, columns, pseudo)]
        parts = []
        for number, members in rows.items():
            values = program(everywhere, *(stack(number) if single_stack is None else single_stack), *batch)

            def by_point(leaf: Any, members: Sequence[int] = members) -> np.ndarray:
                leaf = np.asarray(leaf)
                return np.swapaxes(leaf, 0, 1).reshape(longest, -1, *leaf.shape[3:])[: len(members), : len(images)]

            parts.append(jax.tree_util.tree_map(by_point, values))
        return jax.tree_util.tree_map(lambda *leaves: np.concatenate(leaves)[order], *parts)

    return statistics


def choose(setup: Setup, variables: Tree, candidates: Sequence[Candidate], options: Selection) -> Choice:
    """Scores every candidate at every strength on held-out images and selects the best.

    The best point has the highest mean over the conditions among the points that lose at most
    `max_clean_loss` percentage points on clean images against the unchanged backbone. Ties go to
    the smaller change. Each host scores its part of the images; all hosts get the same result.

    Args:
      setup: the backbone, the task and the held-out images.
      variables: of the unfused backbone.
      candidates: the denoisers.
      options: strengths, conditions and images.

    Raises:
      DataError: if there are no held-out images.
      NonFiniteError: if the backbone itself outputs NaN or Inf on them.
    """
    start_time = time.perf_counter()
    conditions = tuple(dict.fromkeys((CLEAN, *options.conditions)))
    strengths = sorted({float(value) for value in options.strengths} - {0.0})
    grid = [(0, 0.0), *((number, tau) for number in range(len(candidates)) for tau in strengths)]
    source = setup.held_out
    if not len(source):
        raise DataError(f"{source.name} has no images to choose on; give a validation split.")
    count = min(options.images or len(source), len(source))
    index = np.sort(epoch_order(len(source), options.seed, 0)[:count])
    which, hosts = devices.host()
    part = -(-count // hosts)
    mine = index[(which * part + np.arange(part)) % count]
    images = read(source, mine, setup.task.columns, sizes=setup.sizes)
    batch_size = min(max(1, options.batch_size // hosts), part)
    task = setup.task
    columns = {name: column for name, column in images.items() if name != "image"}
    has_label = np.flatnonzero(_of_all_hosts(task.has_label(columns), 0, count))
    labels_there = not images.keys().isdisjoint({"label", *(column.name for column in task.columns)})
    labeled = options.labels and labels_there and not (task.test_needs_head and setup.features)
    labeled = labeled and len(has_label) > 0
    pseudo = _pseudo_labels(setup, variables, images, batch_size)
    statistics = grid_statistics(setup, variables, candidates, grid, against_labels=labeled or not pseudo)
    total = len(conditions) * -(-part // batch_size)
    all_columns = {name: _of_all_hosts(column, 0, count) for name, column in images.items() if column.ndim == 1}
    reference: Tree = None
    agreement: Percents = {}
    accuracy: Percents = {}
    with pulsing("choosing", total, "batch", shown=options.progress) as steps:
        for condition in conditions:
            corrupted = corrupt(images["image"], mine, condition, options.seed + SELECTION_SEED, images.get("size"))
            inputs = np.asarray(setup.inputs({**images, "image": corrupted}))
            parts = []
            for start in range(0, part, batch_size):
                rows = (_padded(_cut(tree, start, batch_size), batch_size) for tree in (inputs, columns, pseudo))
                parts.append(statistics(*rows))
                steps.update()
            whole = jax.tree_util.tree_map(lambda *leaves: np.concatenate(leaves, axis=1)[:, :part], *parts)
            rows = jax.tree_util.tree_map(lambda leaf: _of_all_hosts(leaf, 1, count), whole)
            against = rows["pseudo"] if pseudo else rows["labels"]
            if reference is None:
                reference = _point(against, 0)
            finite = rows["finite"].all(axis=1)
            agreement[condition] = [
                _percent(task, task.agreement(_point(against, number), reference)) if finite[number] else math.nan
                for number in range(len(grid))
            ]
            if labeled:
                accuracy[condition] = [
                    _percent(
                        task,
                        task.held_out_items(
                            _point(rows["labels"], (number, has_label)), source, all_columns["index"][has_label]
                        ),
                    )
                    if finite[number]
                    else math.nan
                    for number in range(len(grid))
                ]
    if not math.isfinite(agreement[CLEAN][0]):
        raise NonFiniteError(f"The unchanged backbone gives NaN or Inf on images of {source.name}.")
    sizes = [_size(candidate.denoise) for candidate in candidates]
    points = []
    for number, (candidate, tau) in enumerate(grid):
        scores = {c: accuracy[c][number] for c in conditions} if accuracy else None
        agreed = {c: agreement[c][number] for c in conditions}
        label = candidates[candidate].label if number else "backbone"
        points.append(Point(label, candidate, tau, tau * sizes[candidate] if tau else 0.0, scores, agreed))
    criterion = task.criterion if labeled else AGREEMENT
    best = best_point(points, criterion, options.max_clean_loss)
    return Choice(tuple(points), best, criterion, conditions, count, time.perf_counter() - start_time)


def best_point(points: Sequence[Point], criterion: str, max_clean_loss: float) -> int:
    """Returns the index of the best point; the first, the unchanged backbone, is always eligible.

    Args:
      points: the first is the unchanged backbone.
      criterion: name of the score.
      max_clean_loss: percentage points that may be lost on clean images.

    Raises:
      ConfigError: for a negative `max_clean_loss`.
    """
    if not max_clean_loss >= 0:
        raise ConfigError(f"select.max_clean_loss={max_clean_loss} is in points and at least 0.")
    base = _scores(points[0], criterion)[CLEAN]

    def rank(number: int) -> tuple[float, float]:
        scores = _scores(points[number], criterion)
        total = sum(scores.values())
        if number and (not math.isfinite(total) or scores[CLEAN] < base - max_clean_loss - 1e-9):
            return (-math.inf, 0.0)
        return (total, -points[number].change)

    return max(range(len(points)), key=rank)


def _size(denoise: Tree) -> float:
    """Returns ‖I − A‖ / √(number of directions), over all sites."""
    kernels = [
        np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(denoise)
        if getattr(path[-1], "key", None) == "kernel"
    ]
    directions = sum(kernel.size // kernel.shape[-1] for kernel in kernels)
    return math.sqrt(sum(float(np.sum(kernel**2)) for kernel in kernels) / directions)


def _scores(point: Point, criterion: str) -> dict[str, float]:
    return point.agreement if criterion == AGREEMENT or point.accuracy is None else point.accuracy


Percents = dict[str, list[float]]
"""Condition ↦ percent of every point."""


def _pseudo_labels(setup: Setup, variables: Tree, images: Batch, batch_size: int) -> dict[str, np.ndarray]:
    """Returns pseudo-labels of the unfused backbone, (n, …) each; {} if the task has none."""
    task, inputs = setup.task, np.asarray(setup.inputs(images))

    columns = {name: column for name, column in images.items() if name != "image"}

    def label(variables: Tree, images: Any, batch: Tree) -> Any:
        return task.pseudo_labels(task.predict(setup.backbone, variables, images, batch))

    if not jax.eval_shape(label, variables, inputs[:1], _cut(columns, 0, 1)):
        return {}
    program = devices.on_devices(label)
    everywhere = devices.replicate(dict(variables))
    parts = []
    for start in range(0, len(inputs), batch_size):
        rows = [_on_devices(_padded(_cut(tree, start, batch_size), batch_size)) for tree in (inputs, columns)]
        labels = devices.unshard(program(everywhere, *rows))
        parts.append({name: column[:batch_size] for name, column in labels.items()})
    return {name: np.concatenate([labels[name] for labels in parts])[: len(inputs)] for name in parts[0]}


def _percent(task: Task, items: Items) -> float:
    """Returns the headline metric in percent."""
    return 100.0 * value_of(next(iter(task.metrics.values())), items)


def _finite(outputs: Tree, count: int) -> Any:
    """Returns whether all outputs of each image are finite, (count,)."""
    rows = [jnp.isfinite(leaf).reshape(count, -1).all(axis=1) for leaf in jax.tree_util.tree_leaves(outputs)]
    return jnp.stack(rows).all(axis=0)


def _point(statistics: Tree, number: Any) -> Tree:
    return jax.tree_util.tree_map(lambda leaf: leaf[number], statistics)


def _cut(tree: Tree, start: int, count: int) -> Tree:
    return jax.tree_util.tree_map(lambda leaf: leaf[start : start + count], tree)


def _padded(tree: Tree, count: int) -> Tree:
    """Returns the rows of a batch, padded with zeros to `count`."""
    return jax.tree_util.tree_map(
        lambda leaf: np.pad(leaf, [(0, count - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)), tree
    )


def _on_devices(tree: Tree) -> Tree:
    """Returns rows split over this host's devices, zero-padded to a multiple of their number."""
    number = devices.local_device_count()
    return devices.shard(
        jax.tree_util.tree_map(
            lambda leaf: np.pad(leaf, [(0, -len(leaf) % number)] + [(0, 0)] * (np.ndim(leaf) - 1)), tree
        )
    )


def _of_all_hosts(values: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Returns the values of all hosts, concatenated along `axis` and cut to `count` images."""
    return np.take(np.concatenate(devices.gather(values), axis=axis), np.arange(count), axis=axis)
