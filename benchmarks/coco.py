"""COCO pictures: every arm of a network that finds objects under noise, blur, low light and compression.

    DREP_DATA=… PYTHONPATH=. python benchmarks/coco.py --cache=DIR
    … --cache=DIR --arms="backbone|measured" --every=4                # every fourth test image

What an arm has learned, its statistics under each condition, and the points of each choice are kept
in DIR. A further call goes on from there, so the work can be divided: "--arms" names arms by a
regular expression. "--minutes" ends a call after that time, with exit status 3 if work is left.
Arms:

- placebo: random maps of the norms of the measured ones;
- BN α × n: BatchNorms with (1 − α)·trained + α·(statistics of a batch of n images of one condition);
  nothing is learned;
- closed form, wiener: from clean images only;
- measured, measured mixed: on the noise of the configuration, and on sensor noise, low light, blur
  and compression. Clean share, leading sites and strength are chosen by agreement with the network's
  confident boxes on clean held-out training images;
- distilled: the whole network, trained on its own clean answers, flipped at random.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.arms import (
    SEED,
    Arm,
    Job,
    Results,
    backbone,
    changes,
    command_line,
    configuration,
    from_clean,
    measured,
    named,
    placebo,
    scored,
)
from drep_jax.data.collate import read
from drep_jax.data.corruptions import CLEAN, corrupt
from drep_jax.evaluation.intervals import Bootstrap
from drep_jax.evaluation.selection import AGREEMENT, Candidate, Point, best_point, choose
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.learners.base import selection_of

BATCH = 16
MIXED = "gaussian:5..45,gaussian:5..45,low_light:0..4,blur:0..2,jpeg:50..85"
"""Noise of "measured mixed"; each image gets one of them."""

METRICS = ("AP", "AP50", "APs", "APm", "APl")


class Pictures(Job):
    """A job that keeps the scores of all points, and chooses from them in every call."""

    def best(self, name: str, grid: Sequence[Candidate]) -> tuple[int, float]:
        """Returns the candidate and strength that agree best on held-out images, see `best_point`.

        AP by the labels of these images is printed beside the agreement. It chooses nothing.
        """
        selection = selection_of(self.config, labels=True)
        conditions = tuple(dict.fromkeys((CLEAN, *selection.conditions)))

        def make() -> Any:
            points = choose(self.setup, self.variables, grid, selection).points
            rows = {key: [getattr(point, key) for point in points] for key in ("candidate", "strength", "change")}
            for key in ("agreement", "accuracy"):
                rows[key] = [[getattr(point, key)[condition] for condition in conditions] for point in points]
            return {key: np.array(values) for key, values in rows.items()}

        kept = self.kept(f"{name} points", make)
        points = [
            Point(
                grid[int(kept["candidate"][row])].label if row else "backbone",
                int(kept["candidate"][row]),
                float(kept["strength"][row]),
                float(kept["change"][row]),
                dict(zip(conditions, kept["accuracy"][row].tolist(), strict=True)),
                dict(zip(conditions, kept["agreement"][row].tolist(), strict=True)),
            )
            for row in range(len(kept["strength"]))
        ]
        best = best_point(points, AGREEMENT, self.config.select.max_clean_loss)
        for row, point in enumerate(points):
            scores = "  ".join(f"{c} {point.agreement[c]:.1f} ({(point.accuracy or {})[c]:.1f})" for c in conditions)
            print(f"{'>' if row == best else ' '} {point.label}, strength {point.strength:g}: {scores}")
        return points[best].candidate, points[best].strength


def distilled(job: Job) -> Any:
    """Returns the whole network trained on its own clean answers; BatchNorm statistics stay.

    Adam with a cosine rate on whole images, flipped at random, of which a fraction
    `distilled.clean_share` is left clean.
    """
    options, setup, task = job.config.distilled, job.setup, job.setup.task
    others = {name: tree for name, tree in job.variables.items() if name != "params"}
    tx = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    images = read(setup.train, np.arange(len(setup.train)), task.columns)["image"]

    @jax.jit
    def step(params: Any, state: Any, clean: Any, noisy: Any) -> Any:
        answers = task.predict(setup.backbone, job.variables, clean, {})

        def loss(params: Any) -> Any:
            outputs = task.predict(setup.backbone, {**others, "params": params}, noisy, {})
            return task.distillation_loss(outputs, answers)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    params = job.variables["params"]
    state, rng = tx.init(params), np.random.default_rng(SEED)
    for number in range(options.steps):
        clean = images[rng.choice(len(images), options.batch_size, replace=len(images) < options.batch_size)]
        clean = clean[:, :, ::-1] if rng.random() < 0.5 else clean
        noisy = corrupt(clean, number * len(clean) + np.arange(len(clean)), job.config.noise, SEED)
        left = rng.random(len(clean)) < options.clean_share
        noisy[left] = clean[left]
        both = (np.asarray(setup.inputs({"image": pixels})) for pixels in (clean, noisy))
        params, state, value = step(params, state, *both)
        if number % 50 == 0:
            print(f"  step {number}: {float(value):.4f}", flush=True)
    return {**others, "params": params}


ARMS: dict[str, Arm] = {
    "backbone": Arm(backbone),
    "measured": Arm(measured),
    "placebo": Arm(placebo),
    "measured mixed": Arm(functools.partial(measured, noise=MIXED)),
    **{f"BN {alpha:g} × {BATCH}": Arm(backbone, Statistics("batch", alpha)) for alpha in (0.1, 0.25)},
    "closed form": Arm(functools.partial(from_clean, wiener=False)),
    "distilled": Arm(distilled, keep=True),
    "wiener": Arm(functools.partial(from_clean, wiener=True)),
}


class Scorer:
    """(variables, condition) ↦ statistics of every test image, compiled once for each kind of arm."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._programs: dict[Any, Callable[..., Any]] = {}

    def pixels(self, images: np.ndarray, index: np.ndarray, condition: str) -> np.ndarray:
        """Returns test images under a condition, applied to what the network gets."""
        return corrupt(images, index, condition, SEED)

    def __call__(self, statistics: Statistics | None, variables: Any, condition: str) -> Any:
        """Returns the statistics of an arm whose BatchNorms mix `statistics`."""
        job, task = self.job, self.job.setup.task
        run = self._programs.get(statistics)
        if run is None:
            net: Any = job.setup.backbone if statistics is None else MixedStatistics(job.setup.backbone, statistics)
            run = jax.jit(lambda v, x, columns: task.statistics(task.predict(net, v, x, columns), columns))
            self._programs[statistics] = run
        parts = []
        for first in range(0, len(job.index), BATCH):
            places = np.arange(first, first + BATCH) % len(job.index)
            batch = read(job.setup.test, job.index[places], with_room(task.columns))
            inputs = np.asarray(
                job.setup.inputs({**batch, "image": self.pixels(batch["image"], job.index[places], condition)})
            )
            columns = {name: column for name, column in batch.items() if name != "image"}
            parts.append(jax.device_get(run(variables, inputs, columns)))
        return jax.tree_util.tree_map(lambda *leaves: np.concatenate(leaves)[: len(job.index)], *parts)


def with_room(columns: Any) -> Any:
    """Returns label columns with room for as many objects as any image of COCO has, so that one program serves all."""
    return tuple(dataclasses.replace(column, capacity=128) if column.ragged else column for column in columns)


def tables(job: Job, results: Results, conditions: tuple[str, ...], resamples: int) -> None:
    """Prints the metrics of the backbone, and every arm's changes in points, that of AP with its interval over images."""
    ones = np.ones(len(job.index))
    units = {"": Bootstrap(len(ones), resamples=resamples)}
    for name in METRICS:
        intervals = ", 95 % intervals over images" if units else ""
        print(f"\n{name}, {len(ones)} test images, then changes in points{intervals}")
        print(changes(job.setup.task.metrics[name], results, conditions, ones, units))
        units = {}


def main(command: Any = None) -> None:
    """Learns what is not kept, scores, and prints."""
    tiny = {"every": 64, "images": 2, "conditions": "clean,gaussian:20", "arms": "backbone|measured"}
    parser = command_line(__doc__, {**tiny, "resamples": 100}, config="yolo_fastest_coco", every=1, resamples=1000)
    parser.add_argument(
        "--images", type=int, help="training images to learn from; all that are not held out by default"
    )
    parser.add_argument("--conditions", default="", help="with commas between; those of the configuration by default")
    options = parser.parse_args(command)
    deadline = time.monotonic() + 60 * options.minutes
    names = named(parser, options, ARMS)
    config = configuration(options.config)
    config.progress = False
    if options.images:
        config.measured.images = config.denoise.moment_images = options.images
    if options.tiny:
        config.measured.update({"clean_share": (0.8,), "ridge": 0.001, "draws": 1})
        config.sites.pattern = "conv_[0-3]"
        config.select.update({"images": 2, "strengths": (1.0,), "leading": (1.0,)})
    conditions = tuple(options.conditions.split(",")) if options.conditions else tuple(config.evaluate.conditions)
    job = Pictures(config, options.cache, options.every)
    score = Scorer(job)
    results = {}
    for name in names:
        of_arm = functools.partial(score, ARMS[name].statistics)
        results[name] = scored(job, name, ARMS[name], of_arm, conditions, deadline)
    job.run.writer.close()
    if "backbone" in results:
        tables(job, results, conditions, options.resamples)
    else:
        print(f"Kept: {', '.join(results)}. The table needs the backbone.")


if __name__ == "__main__":
    main()
