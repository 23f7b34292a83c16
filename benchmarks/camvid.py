"""CamVid: every arm of a segmentation network under noise, blur, low light and compression, with paired intervals.

    DREP_DATA=… PYTHONPATH=. python benchmarks/camvid.py --cache=DIR
    … --cache=DIR --arms="backbone|measured" --every=1               # all 233 test images
    … --cache=DIR --config=segformer_camvid

What an arm has learned, and its counts under each condition, are kept in DIR. A further call goes on
from there, so the work can be divided: "--arms" names arms by a regular expression. Arms:

- placebo: random maps of the norms of the measured ones;
- BN α × n, image α: BatchNorms with (1 − α)·trained + α·(statistics of a batch of n images of one
  condition, or of each image); nothing is learned;
- closed form, wiener: from clean images only;
- measured, measured mixed: on the noise of the configuration, and on sensor noise, low light, blur
  and compression. Clean share, leading sites and strength are chosen by agreement with the
  backbone's answers on clean validation images;
- distilled: the whole backbone, trained on its own clean answers. labeled: with labels, on all
  training images. The learning rate is chosen on the same validation images, for "distilled" by the
  agreement, for "labeled" by their labels.
"""

import dataclasses
import functools
import importlib
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax.core.closed_form import closed_form, wiener_maps
from drep_jax.core.denoisers import Denoisers
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.core.measured import measuring
from drep_jax.data.collate import read
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import epoch_order
from drep_jax.data.source import Source
from drep_jax.evaluation.intervals import Bootstrap
from drep_jax.evaluation.placebo import placebo_denoisers
from drep_jax.evaluation.selection import Candidate, choose
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.learners.base import direct_maps, leading_counts, noise_predictors, selection_of, with_leading
from drep_jax.learners.streams import CorruptedImages
from drep_jax.metrics.segmentation import METRICS
from drep_jax.run.backbone import read_weights
from drep_jax.run.moments import run_moments
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter
from drep_jax.trees import set_in

SEED = 11
BATCH = 13
MIXED = "gaussian:10..50,gaussian:10..50,low_light:0..4,blur:0..2,jpeg:50..85"
"""Noise of "measured mixed"; each image gets one of them."""
RATES = (3e-5, 1e-4, 3e-4)
"""Learning rates of the trained arms."""


class Job:
    """The network, its images, and the folder of what is kept."""

    def __init__(self, config: Any, cache: str, every: int) -> None:
        self.config, self.cache = config, cache
        os.makedirs(cache, exist_ok=True)
        self.setup = build(config)
        self.run = Run(config, self.setup, cache, MetricWriter(cache))
        self.variables = read_weights(self.run, config.backbone.init_from)
        self.index = np.arange(0, len(self.setup.test), every)
        self.every = every

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns the tree of arrays in the file of that name, which is made if it is not there."""
        path = os.path.join(self.cache, re.sub(r"[^\w.-]+", "_", name) + ".npz")
        if not os.path.exists(path):
            began = time.perf_counter()
            leaves = jax.tree_util.tree_leaves_with_path(make())
            arrays = {"/".join(str(key.key) for key in where): np.asarray(leaf) for where, leaf in leaves}
            with open(path + ".part", "wb") as file:
                np.savez(file, **arrays)
            os.replace(path + ".part", path)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        tree: Any = {}
        with np.load(path) as arrays:
            for where in arrays.files:
                tree = set_in(tree, tuple(where.split("/")), arrays[where])
        return tree

    def fused(self, denoisers: Denoisers) -> Any:
        """Returns the backbone with denoisers fused into it."""
        return fuse_variables_exact(self.variables, denoisers, self.setup.sites, self.setup.schedule)

    def chosen(self, name: str, candidates: dict[str, Any]) -> Any:
        """Returns maps at the leading sites and the strength that agree best on held-out images, see `choose`."""
        sites = self.setup.sites
        counts = leading_counts(len(sites), self.config.select.leading)
        grid = [
            with_leading(Candidate(label, tree), sites, count) for label, tree in candidates.items() for count in counts
        ]

        def make() -> Any:
            choice = choose(self.setup, self.variables, grid, selection_of(self.config))
            for point in choice.points:
                scores = " ".join(f"{condition} {score:.1f}" for condition, score in point.agreement.items())
                print(f"  {point.label}, strength {point.strength:g}: {scores}")
            point = choice.points[choice.chosen]
            return {"candidate": np.array(point.candidate), "strength": np.array(point.strength)}

        point = self.kept(f"{name} chosen", make)
        candidate, strength = grid[int(point["candidate"])], float(point["strength"])
        print(f"{name}: {candidate.label}, strength {strength:g}", flush=True)
        return direct_maps(candidate.denoise).scaled(strength)


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


def measured_maps(job: Job, noise: str = "") -> Denoisers:
    """Returns the chosen maps of measured noise, by default that of the configuration."""
    options, shares, name = job.config.measured, job.config.measured.clean_share, "measured"
    if noise:
        name = "measured mixed"

    @functools.cache
    def solver() -> Any:
        config = job.config.copy_and_resolve_references()
        config.noise = noise or config.noise
        images = CorruptedImages(config, job.setup)
        known = {name: options[name] for name in ("vectors", "shortcut", "chunk", "memory_gib")}
        solve = measuring(
            job.setup.backbone,
            job.variables,
            job.setup.sites,
            images,
            ridge=options.ridge or None,
            outputs=False,
            **known,
        )
        return lambda share: solve([share, *[(1 - share) / images.corrupted] * images.corrupted]).denoise

    solved = {f"clean share {share:g}": job.kept(f"{name} {share:g}", lambda s=share: solver()(s)) for share in shares}
    return job.chosen(name, solved)


def placebo(job: Job) -> Any:
    """Returns the backbone with random maps of the norms of the measured ones."""
    params = {"backbone": job.variables["params"], "denoise": measured_maps(job)}
    maps = placebo_denoisers(params, job.setup.sites, job.setup.schedule, jax.random.key(SEED))
    return job.fused(direct_maps(maps))


def from_clean(job: Job, wiener: bool) -> Any:
    """Returns the backbone with the closed form, or with the chosen Wiener filters."""
    moments, sites = run_moments(job.run, job.variables), job.setup.sites
    if not wiener:
        return job.fused(noise_predictors(job.config, closed_form(moments, sites, job.setup.schedule)))
    ratios = job.config.wiener.ratios
    return job.fused(job.chosen("wiener", {f"power {ratio:g}": wiener_maps(moments, sites, ratio) for ratio in ratios}))


def trained(job: Job, labeled: bool) -> Any:
    """Returns the backbone, trained at the rate whose mIoU is best on validation images, averaged over conditions."""
    config, setup = job.config, job.setup
    count = min(config.select.images or len(setup.held_out), len(setup.held_out))
    index = np.sort(epoch_order(len(setup.held_out), config.seed, 0)[:count])
    score = scorer(job, None, setup.held_out, index, labels=labeled)
    means, networks = [], []
    for rate in RATES:
        name = f"{'labeled' if labeled else 'distilled'} {rate:g}"
        networks.append(job.kept(name, lambda rate=rate: trained_at(job, labeled, rate)))
        scores = [
            100 * float(METRICS["mIoU"](score(networks[-1], condition), np.ones(count)))
            for condition in config.select.conditions
        ]
        means.append(np.mean(scores))
        print(f"{name}, {count} validation images:", *(f"{score:.1f}" for score in scores), flush=True)
    return networks[int(np.argmax(means))]


def trained_at(job: Job, labeled: bool, rate: float) -> Any:
    """Returns the backbone, trained on labels or on its own clean answers; BatchNorm statistics stay.

    Adam with a cosine rate, crops of half the height and width, flipped at random, of which a
    fraction `distilled.clean_share` is left clean.
    """
    options, setup, task = job.config.distilled, job.setup, job.setup.task
    others = {name: tree for name, tree in job.variables.items() if name != "params"}
    tx = optax.adam(optax.cosine_decay_schedule(rate, options.steps))
    count = len(setup.train) if labeled else job.config.measured.images or len(setup.train)
    index = np.sort(epoch_order(len(setup.train), job.config.seed, 0)[:count])
    images = read(setup.train, index, task.columns)

    @jax.jit
    def step(params: Any, state: Any, clean: Any, noisy: Any, labels: Any) -> Any:
        answers = setup.backbone.apply(job.variables, clean)

        def loss(params: Any) -> Any:
            outputs = setup.backbone.apply({**others, "params": params}, noisy)
            if not labeled:
                return task.distillation_loss(outputs, answers)
            logits, classes = task.logits(outputs)
            wide = jax.image.resize(logits, (*labels.shape, logits.shape[-1]), "bilinear", antialias=False)
            known = labels < classes
            each = optax.softmax_cross_entropy_with_integer_labels(wide, jnp.where(known, labels, 0))
            return jnp.sum(jnp.where(known, each, 0.0)) / jnp.maximum(jnp.sum(known), 1)

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = job.variables["params"]
    state, rng = tx.init(params), np.random.default_rng(SEED)
    height, width = (side // 2 for side in images["image"].shape[1:3])
    for number in range(options.steps):
        chosen = rng.choice(len(index), options.batch_size, replace=len(index) < options.batch_size)
        top, left = (rng.integers(0, size + 1) for size in (height, width))
        window = (chosen, slice(top, top + height), slice(left, left + width))
        clean, labels = images["image"][window], images["label"][window]
        if rng.random() < 0.5:
            clean, labels = clean[:, :, ::-1], labels[:, :, ::-1]
        noisy = corrupt(clean, number * len(clean) + np.arange(len(clean)), job.config.noise, SEED)
        kept = rng.random(len(clean)) < options.clean_share
        noisy[kept] = clean[kept]
        both = (np.asarray(setup.inputs({"image": pixels})) for pixels in (clean, noisy))
        params, state = step(params, state, *both, labels.astype(np.int32))
    return {**others, "params": params}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A network, and the statistics that its BatchNorms mix."""

    network: Callable[[Job], Any]
    statistics: Statistics | None = None


def backbone(job: Job) -> Any:
    """Returns the unchanged backbone."""
    return job.variables


def measured(job: Job, noise: str = "") -> Any:
    """Returns the backbone with the measured maps."""
    return job.fused(measured_maps(job, noise))


ARMS: dict[str, Arm] = {
    "backbone": Arm(backbone),
    "placebo": Arm(placebo),
    **{f"BN {alpha:g} × {BATCH}": Arm(backbone, Statistics("batch", alpha)) for alpha in (0.1, 0.25, 1.0)},
    **{f"image {alpha:g}": Arm(backbone, Statistics("image", alpha)) for alpha in (0.1, 0.25)},
    "closed form": Arm(functools.partial(from_clean, wiener=False)),
    "wiener": Arm(functools.partial(from_clean, wiener=True)),
    "measured": Arm(measured),
    "measured, image 0.1": Arm(measured, Statistics("image", 0.1)),
    "measured mixed": Arm(functools.partial(measured, noise=MIXED)),
    "distilled": Arm(functools.partial(trained, labeled=False)),
    "labeled": Arm(functools.partial(trained, labeled=True)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def scorer(
    job: Job, statistics: Statistics | None, source: Source, index: np.ndarray, *, labels: bool = True
) -> Callable[..., Any]:
    """Returns (variables, condition) ↦ pixel counts of the images, without labels against the backbone's clean answers."""
    task = job.setup.task
    net: Any = job.setup.backbone if statistics is None else MixedStatistics(job.setup.backbone, statistics)

    @jax.jit
    def run(variables: Any, images: Any, columns: Any) -> Any:
        return task.statistics(task.predict(net, variables, images, columns), columns)

    @jax.jit
    def answers(images: Any, columns: Any) -> Any:
        return task.pseudo_labels(task.predict(job.setup.backbone, job.variables, images, columns))

    def score(variables: Any, condition: str) -> Any:
        parts = []
        for first in range(0, len(index), BATCH):
            places = np.arange(first, first + BATCH) % len(index)
            batch = read(source, index[places], task.columns)
            columns = {"label": batch["label"]}
            if not labels:
                columns |= answers(np.asarray(job.setup.inputs(batch)), columns)
            pixels = corrupt(batch["image"], index[places], condition, SEED)
            inputs = np.asarray(job.setup.inputs({**batch, "image": pixels}))
            parts.append(jax.device_get(run(variables, inputs, columns)))
        return jax.tree_util.tree_map(lambda *leaves: np.concatenate(leaves)[: len(index)], *parts)

    return score


def scored(job: Job, name: str, conditions: tuple[str, ...]) -> dict[str, Any]:
    """Returns the counts of an arm by condition; its network is made if one of them is not kept."""
    arm = ARMS[name]
    score = scorer(job, arm.statistics, job.setup.test, job.index)

    @functools.cache
    def network() -> Any:
        return job.kept(name, lambda: arm.network(job)) if name in ("distilled", "labeled") else arm.network(job)

    return {
        condition: job.kept(f"{name} {condition} {job.every}", lambda c=condition: score(network(), c))
        for condition in conditions
    }


def tables(job: Job, counts: dict[str, dict[str, Any]], conditions: tuple[str, ...], resamples: int) -> None:
    """Prints each metric of the backbone, and every arm's change in points with its intervals."""
    clusters = np.asarray(job.setup.test.clusters)[job.index]
    ones = np.ones(len(job.index))
    units = {"image": Bootstrap(len(ones), resamples=resamples)}
    units["cluster"] = Bootstrap(len(ones), resamples=resamples, clusters=clusters)
    for name in ("mIoU", "B-IoU"):
        metric = METRICS[name]
        cells: dict[str, list[str]] = {arm: [] for arm in counts}
        ends: dict[tuple[str, str], list[str]] = {(arm, unit): [] for arm in counts for unit in units}
        for condition in conditions:
            stats = {arm: (metric, counts[arm][condition]) for arm in counts}
            whole = {arm: 100 * float(metric(entry, ones)) for arm, (_, entry) in stats.items()}
            drawn = {unit: bootstrap.values(stats) for unit, bootstrap in units.items()}
            for arm in counts:
                gain = whole[arm] - whole["backbone"]
                cells[arm].append(f"{whole[arm]:.1f}" if arm == "backbone" else f"{gain:+.1f}")
                for unit, bootstrap in units.items():
                    change = 100 * (drawn[unit][arm] - drawn[unit]["backbone"])
                    interval = bootstrap.interval(gain, change)
                    ends[arm, unit].append(f"[{interval.low:+.1f}, {interval.high:+.1f}]")
        rows = []
        for arm, values in cells.items():
            rows.append([arm, *values])
            if arm != "backbone":
                rows += [[f"by {unit}", *ends[arm, unit]] for unit in units]
        print(
            f"\n{name}, {len(ones)} test images ({len(set(clusters))} clusters), then changes in points, 95 % intervals"
        )
        print(tabulate(rows, ["", *conditions], tablefmt="github", disable_numparse=True))


def main(command: Any = None) -> None:
    """Learns what is not kept, scores, and prints."""
    parser = Parser(
        __doc__, every=117, images=2, conditions="clean,gaussian:20", arms="backbone|measured", resamples=100
    )
    parser.add_argument("--cache", required=True, help="folder of what is kept")
    parser.add_argument("--config", default="espnet_camvid", help="in configs/")
    parser.add_argument("--arms", default=".*", help="regular expression of the arms")
    parser.add_argument("--every", type=int, default=3, help="score every n-th test image")
    parser.add_argument(
        "--images", type=int, help="training images to learn from; those of the configuration by default"
    )
    parser.add_argument("--conditions", default="", help="with commas between; those of the configuration by default")
    parser.add_argument("--resamples", type=int, default=10_000)
    options = parser.parse_args(command)
    wanted = [name for name in ARMS if re.fullmatch(options.arms, name)]
    if not wanted:
        parser.error(f"--arms={options.arms} matches none of {', '.join(ARMS)}")
    config = importlib.import_module(f"configs.{options.config}").get_config().unlock()
    if options.images:
        config.measured.images = config.denoise.moment_images = options.images
    if options.tiny:
        config.measured.update({"clean_share": (0.8,), "ridge": 0.001})
        config.sites.pattern = "level2_down/.*"
        config.distilled.steps = 2
        config.select.update({"images": 2, "strengths": (1.0,), "leading": (1.0,)})
    conditions = tuple(options.conditions.split(",")) if options.conditions else tuple(config.evaluate.conditions)
    job = Job(config, options.cache, options.every)
    counts = {name: scored(job, name, conditions) for name in wanted}
    job.run.writer.close()
    if "backbone" in counts:
        tables(job, counts, conditions, options.resamples)
    else:
        print(json.dumps({arm: len(entries) for arm, entries in counts.items()}))


if __name__ == "__main__":
    main()
