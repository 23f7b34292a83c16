"""Distillation tuned on held-out images: each trial is a learner with its learning rate and clean share.

    DREP_DATA=… PYTHONPATH=. python benchmarks/distilled.py --trials distilled_backbone:1e-3:0.25 distilled:1e-4:0.25
    … --trials distilled:3e-5:0.5:0.8 --out=runs/distilled [--test=2500]

A trial is LEARNER:RATE:CLEAN_SHARE, with :SHARE behind it to start from the noise measured with
that share of clean images, which is a row of its own. Every trial learns from the same training
images in the same order, flipped and shifted by up to 4 pixels. The table gives changes of accuracy
in points with the paired 95 % interval on held-out images, under noise drawn otherwise than in
training, for each strength τ: the weights are (1 − τ) of the backbone's and τ of the learned ones.
--out keeps what was learned. No test image is read, but with --test, which scores the trials and
strengths that were chosen before on that many test images instead.
"""

import argparse
import os
import re
import shutil
import tempfile

import jax
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from benchmarks.keeping import kept
from configs import digits, resnet20_cifar10
from drep_jax import learners
from drep_jax.core.fusion import fuse_exact
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import epoch_order, read_images, read_labels
from drep_jax.evaluation.intervals import paired_interval
from drep_jax.evaluation.selection import SELECTION_SEED
from drep_jax.run.backbone import fresh_variables, read_weights
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter

LEARNERS = ("distilled", "distilled_backbone")
CONDITIONS = ("clean", "gaussian:10", "gaussian:20", "gaussian:40")

BATCH = 500
"""Images of a pass of scoring."""

ORDER_SEED = 7
"""Of the choice of held-out images, which is not that of the learners."""


def configuration(arguments):
    """Returns the settings that all trials share."""
    config = (digits if arguments.tiny else resnet20_cifar10).get_config().unlock()
    if arguments.tiny:
        config.model.update({"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24})
    config.progress = False
    config.log_every = max(1, arguments.steps // 10)
    config.noise = arguments.noise
    config.data.update({"flip": not arguments.tiny, "shift": 1 if arguments.tiny else 4})
    config.distilled.update({"steps": arguments.steps, "batch_size": arguments.batch})
    config.measured.images = arguments.measured
    # The full strength, whatever it loses: the table has the others.
    config.select.update({"images": 50, "conditions": (arguments.noise,), "strengths": (1.0,), "max_clean_loss": 100.0})
    return config


def learned(config, setup, variables, directory, learner, name, out, **sections):
    """Returns the full-strength weights that a learner gives, the seconds it took, and its last logged loss.

    Args:
      config, setup, variables: of the run.
      directory: of the run; distillation finds there the solution that it starts from.
      learner: its name.
      name: of the file that keeps the weights.
      out: folder of that file; "" to keep none.
      **sections: changes of sections of the configuration.
    """

    def learn():
        changed = config.copy_and_resolve_references().unlock()
        for section, values in sections.items():
            changed[section].update(values)
        writer = MetricWriter(directory)
        run = Run(changed.to_dict(), setup, directory, writer)
        result = learners.learn(learner, learners.LearnerInputs(run, variables))
        writer.close()
        params = {"backbone": (result.variables or variables)["params"], "denoise": result.denoisers}
        weights, loss = fuse_exact(params, setup.sites, setup.schedule), result.section["loss"]
        return {"weights": weights, "seconds": result.section["seconds"], "loss": loss[-1][1] if loss else np.nan}

    found = kept(os.path.join(out, name.replace(":", "_") + ".npz") if out else "", learn)
    print(f"{name}: learned in {found['seconds']:.0f} s", flush=True)
    return found["weights"], float(found["seconds"]), float(found["loss"])


def parts(trial):
    """Returns learner, rate, clean share and, if there is one, the share of the start of LEARNER:RATE:SHARE[:SHARE]."""
    learner, *numbers = trial.split(":")
    if learner not in LEARNERS or not 2 <= len(numbers) <= 3:
        raise argparse.ArgumentTypeError(
            f"{trial}: expected LEARNER:RATE:CLEAN_SHARE[:SHARE], LEARNER one of {', '.join(LEARNERS)}"
        )
    try:
        return [learner, *map(float, numbers)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{trial}: {error}; expected numbers behind the learner") from error


def trial_name(text):
    """Returns a trial as it was written, once it can be read."""
    parts(text)
    return text


def trained(config, setup, variables, trial, arguments):
    """Returns {row: (weights, seconds, last loss)} of a trial and of what it starts from."""
    learner, rate, clean_share, *start = parts(trial)
    distilled = {"learning_rate": rate, "clean_share": clean_share}
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        if start:
            name = f"measured:{start[0]:g}"
            directory = os.path.join(arguments.out, name.replace(":", "_")) if arguments.out else scratch
            shares = {"clean_share": (start[0],)}
            rows[name] = learned(config, setup, variables, directory, "measured", name, arguments.out, measured=shares)
            distilled["init_from"] = "measured"
            scratch = shutil.copytree(directory, os.path.join(scratch, "run")) if arguments.out else directory
        rows[trial] = learned(config, setup, variables, scratch, learner, trial, arguments.out, distilled=distilled)
    return rows


def main(command=None):
    """Runs the trials and prints the table."""
    tiny = {"steps": 2, "batch": 16, "images": 16, "strengths": [1.0], "measured": 30}
    parser = Parser(__doc__, **tiny, trials=["distilled:1e-3:0.25:0.8", "distilled_backbone:1e-3:0.25"])
    parser.add_argument(
        "--trials",
        nargs="+",
        type=trial_name,
        default=["distilled:1e-4:0.25"],
        help="LEARNER:RATE:CLEAN_SHARE[:SHARE] each",
    )
    parser.add_argument("--noise", default="gaussian:10..50")
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS, help="of the table")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--measured", type=int, default=1500, help="images from which noise is measured")
    parser.add_argument("--images", type=int, default=500, help="held-out images")
    parser.add_argument("--test", type=int, default=0, help="test images in place of held-out ones")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--out", default="", help="folder to keep what was learned in")
    arguments = parser.parse_args(command)
    if arguments.out:  # what was learned otherwise is another thing
        settings = f"{arguments.noise} {arguments.measured} {arguments.steps} x {arguments.batch}"
        arguments.out = os.path.join(arguments.out, re.sub(r"[^\w.-]+", "_", settings))
    config = configuration(arguments)
    setup = build(config)
    run = Run(config, setup, "")
    path = config.backbone.init_from
    variables = read_weights(run, path) if path else dict(fresh_variables(run))
    if arguments.test:
        source, index = setup.test, np.arange(min(arguments.test, len(setup.test)))
    else:
        source = setup.held_out
        index = np.sort(epoch_order(len(source), ORDER_SEED, 0)[: arguments.images])
    images, labels = read_images(source, index), read_labels(source, index)
    apply = jax.jit(setup.backbone.apply)
    seed = config.seed + SELECTION_SEED
    inputs = [np.asarray(setup.inputs({"image": corrupt(images, index, name, seed)})) for name in arguments.conditions]

    def hits(params):
        network = {**variables, "params": params}
        answers = [
            np.concatenate(
                [np.argmax(np.asarray(apply(network, x[i : i + BATCH])), -1) for i in range(0, len(x), BATCH)]
            )
            for x in inputs
        ]
        return [100.0 * (answer == labels) for answer in answers]

    base = hits(variables["params"])
    rows = {"backbone": [["backbone", "", "", "", *(f"{value.mean():.1f}" for value in base)]]}
    for trial in arguments.trials:
        for name, (params, seconds, loss) in trained(config, setup, variables, trial, arguments).items():
            if name in rows:
                continue
            rows[name] = []
            for tau in arguments.strengths:
                mixed = jax.tree_util.tree_map(
                    lambda a, b, tau=tau: (1 - tau) * a + tau * b, variables["params"], params
                )
                found = [
                    paired_interval(value, first, resamples=2000)
                    for value, first in zip(hits(mixed), base, strict=True)
                ]
                rows[name] += [
                    [
                        name,
                        f"{seconds:.0f}",
                        "" if np.isnan(loss) else f"{loss:.3f}",
                        tau,
                        *(f"{each.difference:+.1f}" for each in found),
                    ],
                    ["", "", "", "", *(f"[{each.low:+.1f}, {each.high:+.1f}]" for each in found)],
                ]
                print(*rows[name][-2], flush=True)
    print(
        f"{arguments.steps} steps of {arguments.batch} images, {len(labels)} {'test' if arguments.test else 'held-out'} images"
    )
    headers = ["trial", "s", "last loss", "τ", *arguments.conditions]
    print(tabulate([row for each in rows.values() for row in each], headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
