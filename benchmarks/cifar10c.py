"""The corruption benchmark: ResNet-20 on the CIFAR-10-C protocol, all arms in one run.

    DREP_DATA=… PYTHONPATH=. python benchmarks/cifar10c.py [--images=1000] [--out=cifar10c.json]
    … --arms="BN .*|TENT.*|image 0.1|measured mixed.*"           # some of the arms only

The protocol has 15 corruptions × 5 severities. Arms: the backbone; a placebo (random maps of the
same norm as the measured ones); Algorithm 1 and its closed form at the paper's settings; the Wiener
filter (clean images only); noise measured on Gaussian noise alone ("gaussian": every other
corruption is unseen) and on a mixture of sensor noise, blur and compression ("mixed"); the
denoisers of that mixture, trained on by distillation; self-distillation (the whole backbone learns
its own clean answers on noisy images: same images, same wall time, no labels); and, as the upper
bound, the backbone fine-tuned with labels on the same Gaussian noise.

Arms that adapt while they are tested (benchmarks/adaptation.py), of the backbone: BatchNorms with
(1 − α)·trained + α·batch statistics, "BN α × images a batch", one image's statistics ("image α"),
and TENT; of the two networks of the mixture: "+ BN" and "+ image". Their batches hold one
corruption, or, with ", mixed" in the name, all corruptions shuffled image by image.
"""

import dataclasses
import json
import re
import tempfile
import time

import jax
import numpy as np
import optax
from tabulate import tabulate

from benchmarks.adaptation import MIXED as MIXED_STREAM
from benchmarks.adaptation import Adaptation, baselines, predict
from benchmarks.common import Parser
from configs import resnet20_cifar10
from drep_jax import learners
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.data.corruptions import CIFAR10C, corrupt
from drep_jax.data.loader import epoch_order, normalize, read_images, read_labels
from drep_jax.evaluation.intervals import paired_interval
from drep_jax.evaluation.placebo import placebo_denoisers
from drep_jax.exporting.statistics import Statistics
from drep_jax.run.backbone import read_weights
from drep_jax.run.moments import run_moments
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter

FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
GAUSSIAN = "gaussian:10..50"
MIXED = "gaussian:0..50,shot:0..60,blur:0..2,motion:0..6,jpeg:0..80,impulse:0..10"
SEED = 11
MEASURED, CONTINUED = "measured mixed", "measured mixed, distilled"
ADAPTED = {
    "image 0.1": Adaptation(Statistics("image", 0.1)),
    "BN 0.25 × 200": Adaptation(Statistics("batch", 0.25), 200),
    "BN 0.25 × 200, mixed": Adaptation(Statistics("batch", 0.25), 200, MIXED_STREAM),
}
"""How the networks learned from the mixture adapt, too."""

DISTILLED = {
    "distilled": {"init_from": "measured", "learning_rate": 5e-5, "clean_share": 0.75, "steps": 2000},
    "data": {"flip": True, "shift": 4},
    "select": {"conditions": (MIXED,), "max_clean_loss": 1.0},
}
"""How the measured mixture is trained on; rates and shares were compared on held-out images (docs/results.md)."""


@dataclasses.dataclass
class Arm:
    """A network, and what it cost."""

    variables: object
    images: int
    seconds: float
    adaptation: Adaptation = dataclasses.field(default_factory=Adaptation)


def fine_tune(setup, variables, images, targets, *, seconds=None, epochs=None, clean_share=0.5, rate=5e-4, batch=128):
    """Trains the whole backbone on clean and Gaussian-noise images, with frozen batch norm."""
    tx = optax.adam(rate)
    others = {name: tree for name, tree in variables.items() if name != "params"}

    @jax.jit
    def step(params, state, x, t):
        def loss(p):
            logits = setup.backbone.apply({**others, "params": p}, x)
            return optax.softmax_cross_entropy(logits, t).mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, state = variables["params"], tx.init(variables["params"])
    began, done = time.perf_counter(), 0
    rng = np.random.default_rng(SEED)
    while epochs is None or done < epochs * len(images):
        pick = rng.permutation(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            chosen = pick[start : start + batch]
            noisy = corrupt(images[chosen], chosen, GAUSSIAN, SEED + done)
            keep = rng.random(batch) < clean_share
            noisy[keep] = images[chosen][keep]
            params, state = step(params, state, normalize(noisy, setup.mean, setup.std), targets[chosen])
            done += batch
            if seconds is not None:
                jax.block_until_ready(params)
                if time.perf_counter() - began > seconds:
                    return {**others, "params": params}, time.perf_counter() - began
    jax.block_until_ready(params)
    return {**others, "params": params}, time.perf_counter() - began


def make_arms(directory, wanted):
    """Returns the setup and all wanted arms by name, the backbone first.

    Args:
      directory: for what the learners save.
      wanted: name ↦ whether the arm is to be there.
    """
    config = resnet20_cifar10.get_config().unlock()
    config.progress = False
    config.measured.clean_share = (0.8,)
    config.select.images = 1000
    setup = build(config)
    writer = MetricWriter(directory)
    run = Run(config, setup, directory, writer)
    variables = read_weights(run, config.backbone.init_from)
    arms = {"backbone": Arm(variables, 0, 0.0)}
    for name, adaptation in baselines().items():
        if wanted(name):
            arms[name] = Arm(variables, 1 if name.startswith("image") else adaptation.batch, 0.0, adaptation)

    moment_seconds = 0.0
    if any(map(wanted, ("algorithm 1", "closed form", "wiener"))):
        began = time.perf_counter()
        run_moments(run, variables)  # saved in the directory, where the learners read them
        moment_seconds = time.perf_counter() - began

    def learn(arm, name, **changes):
        changed = config.copy_and_resolve_references().unlock()
        changed.update(changes)
        if name == "wiener":
            changed.select.max_clean_loss = 0.4
        learned = learners.learn(name, learners.LearnerInputs(dataclasses.replace(run, config=changed), variables))
        seconds = learned.section["seconds"] + (moment_seconds if name in ("closed_form", "wiener") else 0.0)
        fused = fuse_variables_exact(variables, learned.denoisers, setup.sites, setup.schedule)
        arms[arm] = Arm(fused, learned.section["images"], seconds)
        print(f"{arm}: {seconds:.0f} s {learned.section.get('chosen', '')}", flush=True)
        return {"backbone": variables["params"], "denoise": learned.denoisers}

    for name, learner in (("algorithm 1", "algorithm1"), ("closed form", "closed_form"), ("wiener", "wiener")):
        if wanted(name):
            learn(name, learner)
    gaussian = any(map(wanted, ("measured gaussian", "placebo", "distilled")))  # these follow it
    params = learn("measured gaussian", "measured", noise=GAUSSIAN) if gaussian else None
    adapted = {arm: {f"{arm} + {name}": how for name, how in ADAPTED.items()} for arm in (MEASURED, CONTINUED)}
    mixed = [arm for arm, names in adapted.items() if any(map(wanted, (arm, *names)))]
    if mixed:
        learn(MEASURED, "measured", noise=MIXED)
    if CONTINUED in mixed:
        learn(CONTINUED, "distilled", noise=MIXED, **DISTILLED)
        arms[CONTINUED].seconds += arms[MEASURED].seconds
    for arm in mixed:
        arms |= {name: dataclasses.replace(arms[arm], adaptation=how) for name, how in adapted[arm].items()}
    writer.close()

    if wanted("placebo"):
        maps = placebo_denoisers(params, setup.sites, setup.schedule, jax.random.key(3), rule="affine", steps=1)
        fused = fuse_variables_exact(variables, maps, setup.sites, setup.schedule, rule="affine", steps=1)
        arms["placebo"] = Arm(fused, 0, 0.0)
    if wanted("distilled"):
        add_distilled(config, setup, arms, variables)
    if wanted("labeled"):
        index = np.sort(epoch_order(len(setup.train), config.seed, 1)[:20_000])
        labels = np.eye(10, dtype=np.float32)[read_labels(setup.train, index)]
        new, seconds = fine_tune(setup, variables, read_images(setup.train, index), labels, epochs=3)
        arms["labeled"] = Arm(new, len(index), seconds)
        print(f"labeled: {seconds:.0f} s", flush=True)
    return setup, {name: arm for name, arm in arms.items() if name == "backbone" or wanted(name)}


def add_distilled(config, setup, arms, variables):
    """Adds the backbone trained on its own clean answers, with the images and the time of "measured gaussian"."""
    index = np.sort(epoch_order(len(setup.train), config.seed, 0)[: config.measured.images])
    images = read_images(setup.train, index)
    apply = jax.jit(setup.backbone.apply)
    outputs = [
        apply(variables, normalize(images[i : i + 500], setup.mean, setup.std)) for i in range(0, len(images), 500)
    ]
    targets = np.asarray(jax.nn.softmax(np.concatenate(outputs)))
    budget = arms["measured gaussian"].seconds
    new, seconds = fine_tune(setup, variables, images, targets, seconds=budget)
    arms["distilled"] = Arm(new, len(images), seconds)
    print(f"distilled: {seconds:.0f} s", flush=True)


def evaluate(setup, arms, count, severities):
    """Returns {condition: {arm: hits of every image}}, "clean" first, then corruption:severity."""
    index = np.arange(count)
    images, labels = read_images(setup.test, index), read_labels(setup.test, index)
    names = ("clean", *(f"cifar10c:{name}:{severity}" for name in CIFAR10C for severity in severities))
    seen = {name: np.rint(corrupt(images, index, name, SEED)).astype(np.uint8) for name in names}
    hits = {name: {} for name in names}
    for arm, known in arms.items():
        began = time.perf_counter()
        logits = predict(
            setup.backbone,
            known.variables,
            seen,
            lambda x: np.asarray(normalize(x, setup.mean, setup.std)),
            known.adaptation,
            seed=SEED,
        )
        for name in names:
            hits[name][arm] = np.argmax(logits[name], -1) == labels
        print(f"{arm}: scored in {time.perf_counter() - began:.0f} s", flush=True)
    return hits


def main(command=None):
    """Runs and prints everything."""
    parser = Parser(__doc__, images=8, severities="3", arms=r"BN 0\.25 × 20|image 0\.1")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument(
        "--severities", default="1,2,3,4,5", help="of every corruption; 3 alone takes a fifth of the time"
    )
    parser.add_argument("--arms", default=".*", help="regular expression of the arms beside the backbone")
    parser.add_argument("--out", default="cifar10c.json")
    options = parser.parse_args(command)
    severities = [int(severity) for severity in options.severities.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        setup, arms = make_arms(directory, lambda name: re.fullmatch(options.arms, name) is not None)
    hits = evaluate(setup, arms, options.images, severities)

    def of(names, arm):  # hits of every image, averaged over what is in the row
        return np.mean([hits[f"cifar10c:{n}:{s}"][arm] for n in names for s in severities], axis=0)

    rows = {"clean": {arm: hits["clean"][arm].astype(float) for arm in arms}}
    rows |= {name: {arm: of((name,), arm) for arm in arms} for name in CIFAR10C}
    rows |= {f"mean {family}": {arm: of(names, arm) for arm in arms} for family, names in FAMILIES.items()}
    rows["mean of all 15"] = {arm: of(CIFAR10C, arm) for arm in arms}

    base = {row: 100 * scores["backbone"].mean() for row, scores in rows.items()}
    table, content = [], {}
    for row, scores in rows.items():
        cells = [row, f"{base[row]:.1f}"]
        content[row] = {"backbone": base[row]}
        gain = 100 * scores["labeled"].mean() - base[row] if "labeled" in arms else 0.0
        for arm in list(arms)[1:]:
            interval = paired_interval(scores[arm], scores["backbone"], resamples=2000, seed=0)
            mark = "" if interval.significant else " ns"
            cells.append(f"{100 * interval.difference:+.1f}{mark}")
            content[row][arm] = [100 * v for v in (interval.difference, interval.low, interval.high)]
            content[row].setdefault("recovery", {})[arm] = 1e4 * interval.difference / gain if gain > 1 else None
        table.append(cells)
    print(
        f"\nAccuracy of the backbone, and change in points, {options.images} test images, severities {options.severities}; "
        "ns: the paired 95 % interval has 0"
    )
    print(tabulate(table, ["", *arms], tablefmt="github", disable_numparse=True))
    print()
    for row in ("mean noise", "mean of all 15") if "labeled" in arms else ():
        fractions = {arm: value for arm, value in content[row]["recovery"].items() if value is not None}
        listing = ", ".join(f"{arm} {value:.0f} %" for arm, value in fractions.items())
        print(f"Fraction of the labeled fine-tuning's recovery, {row}: {listing}")
    cost = [[arm, known.images, f"{known.seconds:.0f}"] for arm, known in arms.items()]
    print()
    print(tabulate(cost, ["arm", "images", "seconds"], tablefmt="github"))
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump({"table": content, "cost": cost, "images": options.images, "severities": severities}, file, indent=1)


if __name__ == "__main__":
    main()
