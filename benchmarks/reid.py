"""Every training mode on the real set of two cameras: several seeds, each with other test persons.

    PYTHONPATH=. python benchmarks/reid.py --workdir=runs/reid          # DREP_DATA has reid_pku74.npz
    PYTHONPATH=. python benchmarks/reid.py --workdir=runs/reid_t --backbone=transreid
    … --learners measured wiener --control_steps=0                      # some of the arms only

Each seed is one run of configs/reid_pku.py: a backbone is trained from scratch on 38 persons, then
every learner learns from it, the label-free ones without labels even for the choice of their
strength. Differences are in points: their mean over the seeds with Student's 95 % interval, and the
number of seeds in which the paired interval over that run's queries excludes zero. A stopped run is
resumed. Latency corresponds to the paper's Table 4: baseline, fused, and DenoiseRep⁻, interleaved
in one run.
"""

import json
import os

import numpy as np
from tabulate import tabulate

from benchmarks.common import Parser
from benchmarks.modes import interval
from configs.reid_pku import get_config
from drep_jax.evaluation.summary import arms_of
from drep_jax.jobs import train
from drep_jax.report.comparisons import compare
from drep_jax.run import workdir

LEARNERS = ("measured", "wiener", "closed_form", "algorithm1", "final_only", "label_augmented", "alternating")
ARMS = ("placebo", "continued", *LEARNERS)
METRICS = ("mAP", "rank1")


def run(arguments, seed):
    """Returns the report of one seed."""
    config = get_config(f"{arguments.backbone}:{seed}")
    config.compare = tuple(name for name in arguments.learners if name != config.learner)
    config.progress = False
    for name in ("backbone", "control"):
        config[name].update({"steps": getattr(arguments, f"{name}_steps")})
    config.denoise.train_steps = config.alternate.steps = arguments.control_steps
    if arguments.tiny:
        config.model.update({"width": 4})
        config.backbone.warmup = config.control.warmup = 0
        config.evaluate.update({"conditions": ("clean",), "resamples": 100, "certificate_images": 2})
        config.measured.update({"images": 64, "vectors": 4, "clean_share": (0.5,)})
        config.select.update({"images": 32, "conditions": (), "strengths": (0.0, 1.0)})
        config.wiener.ratios = (0.01,)
        config.latency_rounds = 1
    directory = os.path.join(arguments.workdir, f"{arguments.backbone}_{seed}")
    finished = os.path.join(directory, "report.json")
    if os.path.exists(finished):
        with open(finished) as file:
            report = json.load(file)
        if not workdir.differences(report["config"], config.to_dict()):
            return report
    return train.run(config.to_dict(), directory)


def rows(reports, condition):
    """Returns the table of one condition."""
    entries = [report["metrics"][condition] for report in reports]
    table = []
    for arm in (name for name in ("baseline", *ARMS) if name in arms_of(entries[0])):
        scores = [arms_of(entry)[arm] for entry in entries]
        row = [arm, *(f"{np.mean([score[metric] for score in scores]):.1f}" for metric in METRICS)]
        for metric in METRICS if arm != "baseline" else ():
            for other in ("baseline", "continued"):
                comparisons = [c for e in entries for c in compare(e, arm) if c.theirs == other and c.metric == metric]
                up, down = (sum(c.direction == word for c in comparisons) for word in ("higher", "lower"))
                text = (
                    f"{interval([c.interval.difference for c in comparisons])} ({up}↑ {down}↓)" if comparisons else ""
                )
                row += [text] if (metric, other) != ("rank1", "continued") else []
        table.append(row)
    return table


def main(command=None):
    parser = Parser(__doc__, seeds=[0], backbone_steps=2, control_steps=2)
    parser.add_argument("--backbone", default="resnet", help="resnet or transreid")
    parser.add_argument("--workdir", default="runs/reid")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--backbone_steps", type=int, default=400)
    parser.add_argument("--control_steps", type=int, default=60, help="of every arm that is trained")
    parser.add_argument("--learners", nargs="+", default=LEARNERS, choices=LEARNERS, help="beside the exported one")
    arguments = parser.parse_args(command)
    reports = []
    for seed in arguments.seeds:
        reports.append(run(arguments, seed))
        print(f"seed {seed} done", flush=True)
    queries = [report["metrics"]["clean"]["n"] for report in reports]
    print(f"{arguments.backbone}, {len(reports)} seeds, {queries} queries")
    headers = ["arm", *METRICS, "mAP − baseline (seeds ↑ ↓)", "mAP − continued", "rank1 − baseline"]
    for condition in reports[0]["metrics"]:
        print(f"\n{condition}")
        print(tabulate(rows(reports, condition), headers, disable_numparse=True))
    for name in reports[0]["cost"]["latency_ratio"]:
        latency = np.median([report["cost"]["latency_ratio"][name] for report in reports])
        flops = np.median([report["cost"]["flop_ratio"][name] for report in reports])
        print(f"{name}: latency {latency:.3f}×, FLOPs {flops:.4f}× of the baseline's")
    worst = max(report["certificate"]["results"]["float64"]["error"] for report in reports)
    print(
        f"certificates: all passed: {all(r['certificate']['passed'] for r in reports)}, worst error float64 {worst:.1e}"
    )


if __name__ == "__main__":
    main()
