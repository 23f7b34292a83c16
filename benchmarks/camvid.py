"""CamVid: every arm of a segmentation network under noise, blur, low light and compression, with paired intervals.

    DREP_DATA=… PYTHONPATH=. python benchmarks/camvid.py --cache=DIR
    … --cache=DIR --arms="backbone|measured" --every=1               # all 233 test images
    … --cache=DIR --config=segformer_camvid

What an arm has learned, and its counts under each condition, are kept in DIR. A further call goes on
from there, so the work can be divided: "--arms" names arms by a regular expression. "--minutes" ends
a call after that time, with exit status 3 if work is left. Arms:

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

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import epoch_order
from drep_jax.data.source import Source
from drep_jax.evaluation.intervals import Bootstrap
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.metrics.segmentation import METRICS

BATCH = 13
MIXED = "gaussian:10..50,gaussian:10..50,low_light:0..4,blur:0..2,jpeg:50..85"
"""Noise of "measured mixed"; each image gets one of them."""
RATES = (3e-5, 1e-4, 3e-4)
"""Learning rates of the trained arms."""


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
    "distilled": Arm(functools.partial(trained, labeled=False), keep=True),
    "labeled": Arm(functools.partial(trained, labeled=True), keep=True),
}


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


def tables(job: Job, counts: Results, conditions: tuple[str, ...], resamples: int) -> None:
    """Prints each metric of the backbone, and every arm's change in points with its intervals."""
    clusters = np.asarray(job.setup.test.clusters)[job.index]
    ones = np.ones(len(job.index))
    units = {
        "by image": Bootstrap(len(ones), resamples=resamples),
        "by cluster": Bootstrap(len(ones), resamples=resamples, clusters=clusters),
    }
    for name in ("mIoU", "B-IoU"):
        print(
            f"\n{name}, {len(ones)} test images ({len(set(clusters))} clusters), then changes in points, 95 % intervals"
        )
        print(changes(METRICS[name], counts, conditions, ones, units))


def main(command: Any = None) -> None:
    """Learns what is not kept, scores, and prints."""
    tiny = {"every": 117, "images": 2, "conditions": "clean,gaussian:20", "arms": "backbone|measured"}
    parser = command_line(__doc__, {**tiny, "resamples": 100}, config="espnet_camvid", every=3, resamples=10_000)
    parser.add_argument(
        "--images", type=int, help="training images to learn from; those of the configuration by default"
    )
    parser.add_argument("--conditions", default="", help="with commas between; those of the configuration by default")
    options = parser.parse_args(command)
    deadline = time.monotonic() + 60 * options.minutes
    names = named(parser, options, ARMS)
    config = configuration(options.config)
    if options.images:
        config.measured.images = config.denoise.moment_images = options.images
    if options.tiny:
        config.measured.update({"clean_share": (0.8,), "ridge": 0.001})
        config.sites.pattern = "level2_down/.*"
        config.distilled.steps = 2
        config.select.update({"images": 2, "strengths": (1.0,), "leading": (1.0,)})
    conditions = tuple(options.conditions.split(",")) if options.conditions else tuple(config.evaluate.conditions)
    job = Job(config, options.cache, options.every)
    counts = {}
    for name in names:
        score = scorer(job, ARMS[name].statistics, job.setup.test, job.index)
        counts[name] = scored(job, name, ARMS[name], score, conditions, deadline)
    job.run.writer.close()
    if "backbone" in counts:
        tables(job, counts, conditions, options.resamples)
    else:
        print(f"Kept: {', '.join(counts)}. The table needs the backbone.")


if __name__ == "__main__":
    main()
