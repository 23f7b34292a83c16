"""Learns DenoiseRep denoisers for a backbone without labels, fuses them, certifies and reports.

    python train.py                                      # the embedded data set: UCI digits
    python train.py --config=configs/vit_s_imagenet.py   # ViT-S/16 on ImageNet
    python train.py --config=… --config.data.source=folder:DIR --workdir=runs/mine
    python train.py --eval_only --workdir=runs/mine      # only evaluate the arms of that run
    python train.py --eval_only --weights=plain.safetensors,fused.safetensors

The same command resumes an interrupted run.
Exit status: 0; 1 for bad input or a full disk; 3 if the certificate fails; 75 after SIGTERM and 130
after Ctrl-C, both after saving; 4 if another process of the run is gone (docs/scaling.md).
"""

import os
import shlex
import sys

from absl import flags

from drep_jax.cli.app import absl_main, define_config
from drep_jax.parallel import processes
from drep_jax.parallel.hosts import define_flags

CONFIG = define_config(default="configs/digits.py")
EVAL_ONLY = flags.DEFINE_bool(
    "eval_only",
    False,
    "Evaluate the networks in the work directory, finished or not, and those of --weights; train nothing.",
)
WEIGHTS = flags.DEFINE_list(
    "weights", [], "With --eval_only: files of weights of the same backbone, plain or fused, each FILE or NAME=FILE."
)
HOSTS = define_flags()


def main(argv: list[str]) -> int:
    """Runs the job of the configuration; returns the exit status."""
    from drep_jax import report
    from drep_jax.jobs import dry_run, evaluate, train

    config = CONFIG.value.to_dict()
    directory = CONFIG.workdir or os.path.join("runs", config["name"])
    if WEIGHTS.value and not EVAL_ONLY.value:
        raise flags.Error(
            "--weights goes with --eval_only; the backbone of a run is given by --config.backbone.init_from."
        )
    with processes.joined(HOSTS()):
        if EVAL_ONLY.value:
            options = {"overrides": CONFIG.overrides, "explicit": CONFIG.explicit}
            content, folder = evaluate.evaluate(
                evaluate.configuration(config, directory, **options), directory, WEIGHTS.value
            )
            print(f"{report.evaluation_text(content)}\n\nEvaluation: {os.path.join(folder, 'evaluation.md')}")
            return 0
        if config["dry_run"]:
            dry_run.dry_run(config)
            return 0
        content = train.run(config, directory)
        if processes.primary():
            print(report.console_table(content))
            pages = " and ".join(os.path.join(directory, name) for name in ("report.html", "report.md"))
            print(f"\nReport: {pages}   weights: {os.path.join(directory, 'fused')}")
        return 0 if content["certificate"]["passed"] else 3


if __name__ == "__main__":
    sys.exit(processes.leave(absl_main(main, resume=shlex.join(["python", *sys.argv]), config=CONFIG)))
