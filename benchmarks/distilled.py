"""Distillation tuned on held-out images: each trial is a learner with its learning rate and clean share.

    DREP_DATA=… PYTHONPATH=. python benchmarks/distilled.py --trials distilled_backbone:1e-3:0.25 distilled:1e-4:0.25

A trial is LEARNER:RATE:CLEAN_SHARE. Every trial learns from the same training images in the same
order, flipped and shifted by up to 4 pixels. The table gives changes of accuracy in points on
held-out images, under noise drawn otherwise than in training, for each strength τ: the weights are
(1 − τ) of the backbone's and τ of the learned ones. No test image is read.
"""

import tempfile
import time

import jax
import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from configs import digits, resnet20_cifar10
from drep_jax import learners
from drep_jax.core.fusion import fuse_exact
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import epoch_order, read_images, read_labels
from drep_jax.evaluation.selection import SELECTION_SEED
from drep_jax.run.backbone import fresh_variables, read_weights
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter

CONDITIONS = ("clean", "gaussian:10", "gaussian:20", "gaussian:40")

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
    # The full strength, whatever it loses: the table has the others.
    config.select.update({"images": 50, "conditions": (arguments.noise,), "strengths": (1.0,), "max_clean_loss": 100.0})
    return config


def learned_weights(config, setup, variables, trial):
    """Returns the full-strength weights of a trial, the seconds of training, and the last logged loss."""
    learner, rate, clean_share = trial.split(":")
    config = config.copy_and_resolve_references().unlock()
    config.distilled.update({"learning_rate": float(rate), "clean_share": float(clean_share)})
    with tempfile.TemporaryDirectory() as directory:
        writer = MetricWriter(directory)
        run = Run(config.to_dict(), setup, directory, writer)
        learned = learners.learn(learner, learners.LearnerInputs(run, variables))
        writer.close()
    backbone = learned.variables or variables
    params = {"backbone": backbone["params"], "denoise": learned.denoisers}
    return fuse_exact(params, setup.sites, setup.schedule), learned.section["seconds"], learned.section["loss"][-1][1]


def main(command=None):
    """Runs the trials and prints the table."""
    tiny = {"steps": 2, "batch": 16, "images": 16, "strengths": [1.0]}
    parser = Parser(__doc__, **tiny, trials=["distilled:1e-3:0.25", "distilled_backbone:1e-3:0.25"])
    parser.add_argument("--trials", nargs="+", default=["distilled:1e-4:0.25"], help="LEARNER:RATE:CLEAN_SHARE each")
    parser.add_argument("--noise", default="gaussian:10..50")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=500, help="held-out images")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    arguments = parser.parse_args(command)
    config = configuration(arguments)
    setup = build(config)
    run = Run(config, setup, "")
    path = config.backbone.init_from
    variables = read_weights(run, path) if path else dict(fresh_variables(run))
    index = np.sort(epoch_order(len(setup.held_out), ORDER_SEED, 0)[: arguments.images])
    images, labels = read_images(setup.held_out, index), read_labels(setup.held_out, index)
    apply = jax.jit(setup.backbone.apply)
    noisy = {name: corrupt(images, index, name, config.seed + SELECTION_SEED) for name in CONDITIONS}
    inputs = {name: setup.inputs({"image": pixels}) for name, pixels in noisy.items()}

    def accuracy(params):
        return [
            100 * np.mean(np.argmax(np.asarray(apply({**variables, "params": params}, x)), -1) == labels)
            for x in inputs.values()
        ]

    base = accuracy(variables["params"])
    rows = [["backbone", "", "", "", *(f"{value:.1f}" for value in base)]]
    for trial in arguments.trials:
        began = time.perf_counter()
        params, seconds, loss = learned_weights(config, setup, variables, trial)
        print(f"{trial}: {time.perf_counter() - began:.0f} s", flush=True)
        for tau in arguments.strengths:
            mixed = jax.tree_util.tree_map(lambda a, b, tau=tau: (1 - tau) * a + tau * b, variables["params"], params)
            changes = (f"{value - first:+.1f}" for value, first in zip(accuracy(mixed), base, strict=True))
            rows.append([trial, f"{seconds:.0f}", f"{loss:.3f}", tau, *changes])
    print(f"{arguments.steps} steps of {arguments.batch} images, {len(labels)} held-out images")
    print(tabulate(rows, ["trial", "s", "last loss", "τ", *CONDITIONS], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
