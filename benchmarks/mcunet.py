"""Real photographs, published ImageNet weights, the noise of real cameras: MCUNet, all arms, paired intervals.

    DREP_DATA=… PYTHONPATH=. python benchmarks/mcunet.py [--out=runs/mcunet]
    … --arms="measured.*"                              # some of the arms beside the backbone

Of 1,000 photographs with ImageNet's labels, every second block of tenths is fixed: 200 to learn
from, 200 to choose on, 600 to test, without labels but for the arm "labeled". The noise of a camera
is the residuals of its PolyU pairs, laid on the photographs with regard to their brightness, as
they are and two and three times as strong. The arms that learn it have the residuals of three
cameras, the test those of the two others. What was learned and scored is kept in --out, so that the
script goes on where it was ended; other steps or rates take another folder.

Arms: placebo (random maps of the same norm); BatchNorms that mix the statistics of the images, of
a batch of 100 of one condition ("BN α") or of each image ("image α"); Wiener filters from clean
images; noise measured on white noise and on the cameras; distilled (the denoisers, from zero or,
as "measured, distilled", from the measured ones, or the backbone, trained on the backbone's clean
answers under the cameras' noise); labeled (the backbone fine-tuned on the 400 photographs with
labels under the cameras' noise, clean ones among them).
"""

import dataclasses
import os
import re
import resource
import tempfile
import time

import jax
import numpy as np
import optax
from tabulate import tabulate

from benchmarks.adaptation import Adaptation, predict
from benchmarks.common import Parser
from benchmarks.keeping import kept
from configs import digits, mcunet_imagenet
from drep_jax import learners
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import normalize, read_images, read_labels
from drep_jax.evaluation.intervals import paired_interval
from drep_jax.evaluation.placebo import placebo_denoisers
from drep_jax.exporting.statistics import Statistics
from drep_jax.learners.base import Learned, direct_maps, keep
from drep_jax.run.backbone import fresh_variables, read_weights
from drep_jax.run.moments import run_moments
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter

SEED = 11
WHITE = "gaussian:0..40"
BATCH = 100
MEASURED = "measured cameras"
CONTINUED = "measured, distilled"
RATES = {"distilled": 2e-5, CONTINUED: 2e-5, "distilled backbone": 5e-5, "labeled": 5e-5}
"""Learning rates of the arms that are trained."""

MIXTURES = (0.25, 0.5, 0.75, 1.0)
"""Strengths of what was distilled, among which is chosen."""

STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)
"""Strengths of the filters that were not made for the cameras."""

MAPS = "measured_maps.npz"
"""File of the denoisers of "measured cameras", of whose size the placebo is."""
ADAPTED = {
    "BN 0.1": ("backbone", Statistics("batch", 0.1)),
    "BN 0.25": ("backbone", Statistics("batch", 0.25)),
    "BN 1": ("backbone", Statistics("batch", 1.0)),
    "image 0.1": ("backbone", Statistics("image", 0.1)),
    f"{MEASURED} + image 0.1": (MEASURED, Statistics("image", 0.1)),
    f"{MEASURED} + BN 0.1": (MEASURED, Statistics("batch", 0.1)),
}
"""Arm ↦ the network that it adapts, and how."""


@dataclasses.dataclass
class Experiment:
    """The setup, and what the arms need of it."""

    config: object
    setup: object
    run: Run
    variables: dict
    out: str

    def learn(self, learner, noise=None, start=None, **sections):
        """Returns a learner's fused variables and facts; start: the measured solution that distillation starts from."""
        config = self.config.copy_and_resolve_references().unlock()
        config.noise = noise or config.noise
        for section, values in sections.items():
            config[section].update(values)
        config.distilled.init_from = "" if start is None else "measured"
        run = dataclasses.replace(self.run, config=config.to_dict())
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            if start is not None:
                run = dataclasses.replace(run, directory=scratch)
                keep("measured", learners.LearnerInputs(run, self.variables), Learned(direct_maps(start), {}))
            learned = learners.learn(learner, learners.LearnerInputs(run, self.variables))
        seconds = time.perf_counter() - began
        for number, point in enumerate(learned.choice.points if learned.choice else ()):
            print(point.label, point.strength, learned.choice.scores(number), flush=True)
        backbone = learned.variables or self.variables
        fused = fuse_variables_exact(backbone, learned.denoisers, self.setup.sites, self.setup.schedule)
        chosen = learned.section.get("chosen") or {}
        text = f"{chosen.get('label', '')}, strength {chosen.get('strength', 0):g}" if chosen else ""
        return fused, learned.denoisers, {"images": learned.section["images"], "seconds": seconds, "chosen": text}


def experiment(options):
    """Builds the network and the images."""
    if options.tiny:
        config = digits.get_config().unlock()
        config.model.update({"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24})
        config.noise, config.evaluate.conditions = "gaussian:0..90", ("clean", "gaussian:40")
        config.measured.images, config.distilled.steps = 40, 2
        config.select.update({"images": 20, "conditions": ("gaussian:40",)})
    else:
        config = mcunet_imagenet.get_config().unlock()
    config.progress = False
    os.makedirs(options.out, exist_ok=True)
    setup = build(config)
    run = Run(config, setup, options.out, MetricWriter(options.out))
    path = config.backbone.init_from
    return Experiment(config, setup, run, read_weights(run, path) if path else dict(fresh_variables(run)), options.out)


def learned_arm(name, known, steps, rate):
    """Returns the variables of an arm that learns, and what it took."""
    rate = rate or RATES.get(name, 0.0)
    distilled = {"steps": steps, "learning_rate": rate}
    if name in ("placebo", CONTINUED):
        denoisers, took = kept_arm(os.path.join(known.out, MAPS), lambda: maps_of(known.learn("measured")))
    if name == CONTINUED:
        fused, _, facts = known.learn("distilled", start=denoisers, distilled=distilled, select={"strengths": MIXTURES})
        return fused, {**facts, "seconds": facts["seconds"] + took["seconds"]}
    if name == "placebo":
        params = {"backbone": known.variables["params"], "denoise": denoisers}
        maps = placebo_denoisers(
            params, known.setup.sites, known.setup.schedule, jax.random.key(3), rule="affine", steps=1
        )
        fused = fuse_variables_exact(
            known.variables, maps, known.setup.sites, known.setup.schedule, rule="affine", steps=1
        )
        return fused, {"images": 0, "seconds": 0.0, "chosen": ""}
    if name == "labeled":
        return fine_tuned(known, steps, rate)
    if name == "wiener":
        run_moments(known.run, known.variables)
    arguments, more = {
        "wiener": (("wiener",), {"select": {"strengths": STRENGTHS}}),
        "measured white": (("measured", WHITE), {"select": {"strengths": STRENGTHS}}),
        MEASURED: (("measured",), {}),
        "distilled": (("distilled",), {"distilled": distilled, "select": {"strengths": MIXTURES}}),
        "distilled backbone": (("distilled_backbone",), {"distilled": distilled}),
    }[name]
    fused, _, facts = learned = known.learn(*arguments, **more)
    if name == MEASURED:
        kept_arm(os.path.join(known.out, MAPS), lambda: maps_of(learned))
    return fused, facts


def maps_of(learned):
    """Returns the denoise subtree and the facts of what `Experiment.learn` returned."""
    return learned[1].tree, learned[2]


def fine_tuned(known, steps, rate, batch=16):
    """Returns the backbone trained with labels on the images to learn from and to choose on, half of them clean."""
    setup = known.setup
    sources = (setup.train, setup.held_out)
    images = np.concatenate([read_images(source, np.arange(len(source))) for source in sources])
    labels = np.concatenate([read_labels(source, np.arange(len(source))) for source in sources])
    others = {name: tree for name, tree in known.variables.items() if name != "params"}
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params, state, x, y):
        def loss(p):
            logits = setup.backbone.apply({**others, "params": p}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    began, rng = time.perf_counter(), np.random.default_rng(SEED)
    params = known.variables["params"]
    state = tx.init(params)
    for number in range(steps):
        index = rng.choice(len(images), batch, replace=False)
        x = corrupt(images[index], index, known.config.noise, SEED + number)
        x[: batch // 2] = images[index[: batch // 2]]
        params, state = step(params, state, np.asarray(normalize(x, setup.mean, setup.std)), labels[index])
    jax.block_until_ready(params)
    facts = {"images": len(images), "seconds": time.perf_counter() - began, "chosen": f"{steps} steps of {batch}"}
    return {**others, "params": params}, facts


def kept_arm(path, make):
    """Returns a tree and facts, and keeps them with the peak of the process, see `kept`."""

    def both():
        tree, facts = make()
        facts["GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(path, facts, flush=True)
        return {"v": tree, "f": facts}

    saved = kept(path, both)
    return saved["v"], {name: value.item() for name, value in saved["f"].items()}


def score(known, name, variables, adaptation, conditions, count):
    """Returns {condition: hits of every test image} of an arm, and keeps them."""
    setup = known.setup
    index = np.arange(min(count or len(setup.test), len(setup.test)))
    rows = {}
    for condition in conditions:
        path = os.path.join(known.out, re.sub(r"\W+", "_", f"hits {name} {condition.rpartition('/')[2]}") + ".npy")
        if not os.path.exists(path):
            labels = read_labels(setup.test, index)
            pixels = np.rint(corrupt(read_images(setup.test, index), index, condition, SEED)).astype(np.uint8)
            prepare = lambda x: np.asarray(normalize(x, setup.mean, setup.std))  # noqa: E731
            logits = predict(setup.backbone, variables, {condition: pixels}, prepare, adaptation)[condition]
            np.save(path, np.argmax(logits, -1) == labels)
        rows[condition] = np.load(path)
    return rows


def main(command=None):
    """Learns and scores what is wanted and not there yet, and prints the tables."""
    tiny = {"arms": "wiener|measured cameras", "images": 20}
    parser = Parser(__doc__, **tiny)
    parser.add_argument("--arms", default=".*", help="regular expression of the arms beside the backbone")
    parser.add_argument("--images", type=int, default=0, help="test images; 0 for all")
    parser.add_argument("--steps", type=int, default=100, help="of the arms distilled and labeled")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="learning rate of an arm that is trained; 0 for its own"
    )
    parser.add_argument("--out", default="runs/mcunet")
    options = parser.parse_args(command)
    known = experiment(options)
    conditions = tuple(known.config.evaluate.conditions)
    learned = ["placebo", "wiener", "measured white", MEASURED, "distilled", "distilled backbone", CONTINUED, "labeled"]
    names = ["backbone", *(name for name in (*ADAPTED, *learned) if re.fullmatch(options.arms, name))]
    table, cost = {}, []
    for name in names:
        network, statistics = ADAPTED.get(name, (name, None))
        variables, facts = known.variables, {"images": 0, "seconds": 0.0, "chosen": "", "GiB": 0.0}
        if network != "backbone":
            path = os.path.join(known.out, re.sub(r"\W+", "_", network) + ".npz")
            variables, facts = kept_arm(
                path, lambda network=network: learned_arm(network, known, options.steps, options.rate)
            )
        adaptation = Adaptation(statistics, BATCH)
        table[name] = score(known, name, variables, adaptation, conditions, options.images)
        cost.append([name, facts["images"], f"{facts['seconds']:.0f}", f"{facts['GiB']:.1f}", facts["chosen"]])
        print(name, {c[-24:]: f"{100 * hits.mean():.1f}" for c, hits in table[name].items()}, flush=True)
    known.run.writer.close()
    rows = []
    for name, scores in table.items():
        cells, intervals = [name], [""]
        for condition in conditions:
            hits, base = 100.0 * scores[condition], 100.0 * table["backbone"][condition]
            if name == "backbone":
                cells.append(f"{hits.mean():.1f}")
                continue
            interval = paired_interval(hits, base, resamples=2000, seed=0)
            cells.append(f"{interval.difference:+.1f}")
            intervals.append(f"[{interval.low:+.1f}, {interval.high:+.1f}]")
        rows += [cells] if name == "backbone" else [cells, intervals]
    headers = ["", *(re.sub(r".*\?camera=([^&]*)&strength=", r"cameras ×", condition) for condition in conditions)]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    print(tabulate(cost, ["arm", "images", "seconds", "peak GiB", "chosen"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
