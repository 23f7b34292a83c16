"""Choice among denoisers and strengths on held-out images, in one program; the unchanged backbone is always among them.

Every candidate is a `denoise` subtree for rule "affine"; a point of the grid is a candidate and a strength τ. With labels a
point is scored by accuracy; without, by *agreement*: the share of images, corrupted, on which the fused network says what the
unfused backbone says of the clean image. Where backbone and label agree, so do the two criteria; hence they differ by at most
the backbone's clean error. A backbone without a head says which of the held-out images it sees: the one whose clean feature
is nearest (cosine).

For retrieval, labels give the mean average precision of the held-out identities. Without labels, the images that the unfused
backbone finds nearest to each clean image count as right ones: a criterion that, unlike one image found again, changes as
soon as rankings do.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.denoisers import scaled as scaled
from drep_jax.core.fusion import fuse
from drep_jax.core.sites import Site
from drep_jax.data.collate import read
from drep_jax.data.corruptions import CLEAN, corrupt
from drep_jax.data.loader import epoch_order
from drep_jax.data.metadata import table_of
from drep_jax.errors import ConfigError, DataError, NonFiniteError
from drep_jax.evaluation import scoring
from drep_jax.parallel import devices
from drep_jax.run.setup import Setting
from drep_jax.tasks import Retrieval
from drep_jax.typing import Tree

SELECTION_SEED = 2
"""Added to the run's seed for the corruption of held-out images."""


NEIGHBOURS = 5
"""Nearest images of each that a network for retrieval should go on finding."""


STACK_BYTES = 2**30
"""Memory for the candidates that are on the device at once; of more, one stack after the other is taken."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Denoisers for rule "affine", and what to call them."""

    label: str
    denoise: Tree


@dataclasses.dataclass(frozen=True)
class Point:
    """A candidate at a strength, and what it scored under every condition (per cent; NaN where outputs overflowed).

    Attributes:
      change: τ·‖I − A‖, the root mean square over all directions at all sites; 0 for the unchanged backbone.
    """

    label: str
    candidate: int
    strength: float
    change: float
    accuracy: dict[str, float] | None
    agreement: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A grid's points and which one was chosen.

    Attributes:
      points: the first is the unchanged backbone.
      chosen: its number.
      criterion: "accuracy", "mAP" or "agreement".
      conditions: clean first.
      images, seconds: how many held-out images, and how long it took.
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


def grid_outputs(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    schedule: Any,
    candidates: Sequence[Candidate],
    points: Sequence[tuple[int, float]],
) -> Any:
    """Returns a compiled function of a batch that gives every point's outputs, (points, batch, …), on all devices.

    Args:
      backbone, variables, sites, schedule: of the unfused network.
      candidates: their trees are stacked, so that one program serves all, in several stacks of one form if they are large.
      points: (number of the candidate, strength).
    """
    size = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(candidates[0].denoise))
    per_stack = min(len(candidates), max(1, STACK_BYTES // max(1, size)))
    rows: dict[int, list[int]] = {}
    for row, (number, _) in enumerate(points):
        rows.setdefault(number // per_stack, []).append(row)
    longest = max(len(found) for found in rows.values())

    def run(variables: Tree, stacked: Tree, which: Any, strengths: Any, images: Any) -> Any:
        def one(point: Any) -> Any:
            # No map at all where the strength is 0, since 0 times what has overflowed would not be 0.
            denoise = jax.tree_util.tree_map(lambda leaf: jnp.where(point[1] == 0, 0, leaf[point[0]]), stacked)
            params = {"backbone": variables["params"], "denoise": denoise}
            fused = fuse(params, sites, schedule, rule="affine", steps=1, strength=point[1])
            return backbone.apply({**variables, "params": fused}, images)

        return jax.lax.map(one, (which, strengths))

    program = devices.on_devices(run)

    def stack(number: int) -> Any:
        first = number * per_stack
        trees = [candidates[min(first + i, len(candidates) - 1)].denoise for i in range(per_stack)]
        chosen = [points[row] for row in rows[number]]
        chosen += [(first, 0.0)] * (longest - len(chosen))
        which = np.array([candidate - first for candidate, _ in chosen], np.int32)
        strengths = np.array([strength for _, strength in chosen], np.float32)
        return devices.replicate((jax.tree_util.tree_map(lambda *leaves: np.stack(leaves), *trees), which, strengths))

    everywhere = devices.replicate(dict(variables))
    kept = stack(next(iter(rows))) if len(rows) == 1 else None

    def outputs(images: Any) -> np.ndarray:
        batch = devices.shard(_padded(np.asarray(images), devices.local_device_count()))
        parts = []
        for number, found in rows.items():
            values = np.asarray(program(everywhere, *(stack(number) if kept is None else kept), batch))
            by_point = np.swapaxes(values, 0, 1).reshape(longest, -1, *values.shape[3:])
            parts.append(by_point[: len(found), : len(images)])
        order = np.argsort(np.concatenate(list(rows.values())))
        return np.concatenate(parts)[order]

    return outputs


def choose(config: Mapping[str, Any], setting: Setting, variables: Tree, candidates: Sequence[Candidate]) -> Choice:
    """Scores every candidate at every strength on held-out images and picks the best.

    Best is the highest mean over the conditions among the points that lose at most `select.max_clean_loss` points on
    clean images against the unchanged backbone; ties go to the smaller change. Each host looks at its part of the images,
    and all get the same answers.

    Raises:
      DataError: if no images can be held out.
      NonFiniteError: if the backbone itself gives NaN or Inf on them.
    """
    began = time.perf_counter()
    options = config["select"]
    conditions = tuple(dict.fromkeys((CLEAN, *(options["conditions"] or config["evaluate"]["conditions"]))))
    strengths = sorted({float(value) for value in options["strengths"]} - {0.0})
    grid = [(0, 0.0), *((number, tau) for number in range(len(candidates)) for tau in strengths)]
    outputs = grid_outputs(setting.backbone, variables, setting.sites, setting.schedule, candidates, grid)
    source = setting.held_out
    if not len(source):
        raise DataError(f"{source.name} has no images to choose on; give a validation split.")
    count = min(options["images"] or len(source), len(source))
    index = np.sort(epoch_order(len(source), config["seed"], 0)[:count])
    which, hosts = devices.host()
    part = -(-count // hosts)
    mine = index[(which * part + np.arange(part)) % count]
    found = read(source, mine)
    batch = min(max(1, config["evaluate"]["batch_size"] // hosts), part)

    def shown(condition: str, change: Any = None) -> np.ndarray:
        """Returns what every point says of all images, (points, images, …), changed batch by batch."""
        corrupted = corrupt(found["image"], mine, condition, config["seed"] + SELECTION_SEED)
        inputs = setting.inputs({**found, "image": corrupted})
        return _of_all_hosts(_every_output(outputs, inputs, batch, change), 1, count)

    if isinstance(setting.task, Retrieval):
        labelled = options["labels"] and "label" in table_of(source)  # merged sources have none
        criterion = "mAP" if labelled else "agreement"
        kept = _of_all_hosts(found["index"], 0, count) if labelled else None  # of the images that could be read
        agreed, right = _by_neighbours(setting.task, source, kept, conditions, shown)
    else:
        labels = found.get("label") if options["labels"] and not setting.features else None
        criterion = "agreement" if labels is None else "accuracy"
        truth = None if labels is None else _of_all_hosts(labels, 0, count)
        agreed, right = _by_answers(setting.features, truth, conditions, shown)
    if not math.isfinite(agreed[CLEAN][0]):
        raise NonFiniteError(f"The unchanged backbone gives NaN or Inf on images of {source.name}.")
    sizes = [_size(candidate.denoise) for candidate in candidates]
    points = []
    for number, (candidate, tau) in enumerate(grid):
        accuracy = {c: right[c][number] for c in conditions} if right else None
        agreement = {c: agreed[c][number] for c in conditions}
        label = candidates[candidate].label if number else "backbone"
        points.append(Point(label, candidate, tau, tau * sizes[candidate] if tau else 0.0, accuracy, agreement))
    chosen = best_point(points, criterion, options["max_clean_loss"])
    return Choice(tuple(points), chosen, criterion, conditions, count, time.perf_counter() - began)


def best_point(points: Sequence[Point], criterion: str, max_clean_loss: float) -> int:
    """Returns the number of the best point; the first one is the unchanged backbone and can always be had."""
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
    """Returns ‖I − A‖ over the root of the number of directions, of all sites together."""
    kernels = [
        np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(denoise)
        if getattr(path[-1], "key", None) == "kernel"
    ]
    directions = sum(kernel.size // kernel.shape[-1] for kernel in kernels)
    return math.sqrt(sum(float(np.sum(kernel**2)) for kernel in kernels) / directions)


def _scores(point: Point, criterion: str) -> dict[str, float]:
    return point.agreement if criterion == "agreement" or point.accuracy is None else point.accuracy


Found = dict[str, list[float]]
"""Per cent of every point by condition."""


def _by_answers(featured: bool, truth: np.ndarray | None, conditions: Sequence[str], shown: Any) -> tuple[Found, Found]:
    """Returns how often each point answers as the first one does on clean images, and as the labels say if there are any.

    The answer is the class, or where there are features the number of the image whose clean feature is nearest.
    """
    known = _unit(shown(CLEAN, lambda found: found[:1])[0]) if featured else None

    def answer(found: np.ndarray) -> np.ndarray:
        scores = found if known is None else _unit(found) @ known.T
        return np.where(np.isfinite(found).all(axis=-1), scores.argmax(axis=-1), -1)

    said = {condition: shown(condition, answer) for condition in conditions}
    agreed = {condition: [_share(own, said[CLEAN][0]) for own in answers] for condition, answers in said.items()}
    if truth is None:
        return agreed, {}
    return agreed, {condition: [_share(own, truth) for own in answers] for condition, answers in said.items()}


def _by_neighbours(
    task: Retrieval, source: Any, index: np.ndarray | None, conditions: Sequence[str], shown: Any
) -> tuple[Found, Found]:
    """Returns how each point agrees with the neighbours that the first one finds among clean images, and its mAP.

    Args:
      task, source: of the held-out images.
      index: their numbers; None for no mAP, which takes labels.
      conditions: clean first.
      shown: condition ↦ features (points, images, width).
    """
    agreed: Found = {}
    right: Found = {}
    nearest = None
    for condition in conditions:
        features = shown(condition)
        if nearest is None:
            nearest = _order(features[0])[:, :NEIGHBOURS]
        agreed[condition] = [neighbour_agreement(rows, nearest) for rows in features]
        if index is not None:
            right[condition] = [scoring.held_out_map(task, source, index, rows) for rows in features]
    return agreed, right


def neighbour_agreement(features: np.ndarray, nearest: np.ndarray) -> float:
    """Returns the mean average precision, in per cent, at which images find those that they should; NaN for such features.

    Args:
      features: (images, width).
      nearest: (images, k), the numbers of those that count as right for each.
    """
    if not np.isfinite(features).all():
        return float("nan")
    marks = np.zeros((len(features), len(features)), bool)
    np.put_along_axis(marks, nearest, True, axis=1)
    right = np.take_along_axis(marks, _order(features), axis=1)
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    return 100.0 * float(np.mean(np.sum(precision * right, axis=1) / right.sum(axis=1)))


def _order(features: np.ndarray) -> np.ndarray:
    """Returns for each image all others, that of the nearest feature (cosine) first, (images, images − 1)."""
    unit = _unit(features)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, :-1]


def _every_output(outputs: Any, images: Any, batch: int, change: Any = None) -> np.ndarray:
    """Returns the outputs, changed batch by batch, for all images, (points, images, …)."""
    padded = _padded(np.asarray(images), batch)
    found = []
    for start in range(0, len(padded), batch):
        values = np.asarray(outputs(padded[start : start + batch]))
        found.append(values if change is None else change(values))
    return np.concatenate(found, axis=1)[:, : len(images)]


def _padded(images: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(images, [(0, -len(images) % multiple)] + [(0, 0)] * (images.ndim - 1))


def _of_all_hosts(values: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Returns what all hosts have found for their parts of the images, which lie along `axis`, without repetitions."""
    return np.take(np.concatenate(devices.gather(values), axis=axis), np.arange(count), axis=axis)


def _unit(features: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(features / np.linalg.norm(features, axis=-1, keepdims=True))


def _share(answers: np.ndarray, truth: np.ndarray) -> float:
    """Returns the percentage of equal answers; NaN if any output overflowed."""
    return float("nan") if (answers < 0).any() else 100.0 * float(np.mean(answers == truth))
