"""The results of every training mode: several seeds, all arms of equal budgets, same test images.

    PYTHONPATH=. python benchmarks/modes.py --config=configs/resnet20_cifar10.py --workdir=runs/modes

Each seed is one run of the main job (images, order, noise and dropout drawn anew; the given
backbone is the same) with the learners `algorithm1` and `closed_form` (label-free),
`label_augmented` (Eq. 12), `alternating` (appendix A), `final_only` (DenoiseRep⁻), and the control
arms: placebo, and the backbone trained on with labels for the same steps on the same images
(`continued`). Differences are in points of accuracy: their mean over the seeds with Student's 95 %
interval, and the number of seeds in which the paired test of that run (interval and McNemar) is
significant. A stopped run is resumed.
"""

import importlib.util
import os
import sys

import numpy as np
import scipy.stats
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax.evaluation.summary import arms_of
from drep_jax.jobs import train
from drep_jax.report.comparisons import compare

ARMS = ("placebo", "algorithm1", "closed_form", "final_only", "continued", "label_augmented", "alternating")


def configuration(arguments, seed):
    """Returns the settings of one seed's run."""
    spec = importlib.util.spec_from_file_location("configuration", arguments.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.seed = seed
    config.learner = "label_augmented"
    config.compare = ("algorithm1", "closed_form", "alternating", "final_only")
    config.sites.kind = arguments.kind
    config.data.update({"flip": True, "shift": 4})
    config.denoise.update({"train_steps": arguments.steps, "batch_size": arguments.batch, "tokens": 1.0})
    config.denoise.update({"learning_rate": arguments.denoiser_rate, "label_lambda": arguments.label_lambda})
    config.control.update({"steps": arguments.steps, "batch_size": arguments.batch, "learning_rate": arguments.rate})
    config.alternate.update({"steps": arguments.steps, "period": max(1, arguments.steps // 10)})
    config.evaluate.conditions = tuple(arguments.conditions)
    config.log_every = config.checkpoint_every = arguments.steps
    config.progress = False
    if arguments.tiny:
        config.model.update({"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24})
        config.backbone.update({"steps": arguments.steps, "warmup": 0})
        config.evaluate.update({"resamples": 100, "certificate_images": 2, "latency_batch": 8, "batch_size": 200})
        config.latency_rounds = 1
    return config.to_dict()


def interval(values):
    """Returns the mean and Student's 95 % interval as text."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def table(reports, condition):
    """Returns the rows of one condition."""
    entries = [report["metrics"][condition] for report in reports]
    rows = [["baseline", f"{np.mean([entry['baseline']['acc@1'] for entry in entries]):.2f}"]]
    for arm in ARMS:
        row = [arm, f"{np.mean([arms_of(entry)[arm]['acc@1'] for entry in entries]):.2f}"]
        for other in ("baseline", "continued"):
            comparisons = [c for e in entries for c in compare(e, arm) if c.theirs == other and c.metric == "acc@1"]
            if not comparisons:
                row.append("")
                continue
            up, down = (sum(c.direction == word for c in comparisons) for word in ("higher", "lower"))
            row.append(f"{interval([c.interval.difference for c in comparisons])} ({up}↑ {down}↓)")
        rows.append(row)
    return rows


def main(command=None):
    command = sys.argv[1:] if command is None else list(command)
    parser = Parser(__doc__, config="configs/digits.py", seeds=1, steps=8, batch=32, conditions=["clean"])
    parser.add_argument("--config", required="--tiny" not in command)
    parser.add_argument("--workdir", default="runs/modes")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kind", default="pointwise", help="of the denoisers of convolutions")
    parser.add_argument("--rate", type=float, default=1e-4, help="peak learning rate of the backbone, AdamW")
    parser.add_argument("--denoiser_rate", type=float, default=4e-4, help="peak learning rate of the denoisers, Adam")
    parser.add_argument("--label_lambda", type=float, default=0.01, help="λ of Eq. 12")
    parser.add_argument("--conditions", nargs="+", default=["clean"])
    arguments = parser.parse_args(command)
    reports = []
    for seed in range(arguments.seeds):
        config = configuration(arguments, seed)
        reports.append(train.run(config, os.path.join(arguments.workdir, f"{config['name']}_{seed}")))
        print(f"seed {seed} done", flush=True)
    latency = {name: np.median([r["cost"]["latency_ratio"][name] for r in reports]) for name in ("fused", "final_only")}
    print(
        f"{config['name']}: {arguments.seeds} seeds, {arguments.steps} steps of {arguments.batch} images, denoisers "
        f"{arguments.kind} at rate {arguments.denoiser_rate:g}, backbone at {arguments.rate:g}, λ = {arguments.label_lambda:g}"
    )
    headers = ["arm", "acc@1", "− baseline (seeds ↑ ↓)", "− continued (seeds ↑ ↓)"]
    for condition in arguments.conditions:
        print(f"\n{condition}, {reports[0]['metrics'][condition]['n']} test images")
        print(tabulate(table(reports, condition), headers, disable_numparse=True))
    print(f"\nLatency against the baseline: fused {latency['fused']:.2f}×, DenoiseRep⁻ {latency['final_only']:.2f}×")


if __name__ == "__main__":
    main()
