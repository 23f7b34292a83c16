"""Learns DenoiseRep denoisers for a backbone without labels, fuses them, certifies and reports.

    python train.py                                          # the embedded data set: UCI handwritten digits
    python train.py --config=configs/vit_s_imagenet.py      # ViT-S/16 on ImageNet
    python train.py --config=… --config.data.source=folder:DIR --workdir=runs/mine

A run that was interrupted goes on where it stopped when the same command is given again.
"""

import os
import shlex
import sys

from drep_jax.cli import absl_main, define_config
from drep_jax.training import distributed

CONFIG = define_config(default="configs/digits.py")
HOSTS = distributed.define_flags()


def main(argv: list[str]) -> int:
    """Runs the job of the configuration; returns the exit status."""
    from drep_jax import dry_run, experiment, report

    config = CONFIG.value.to_dict()
    directory = CONFIG.workdir or os.path.join("runs", config["name"])
    with distributed.joined(HOSTS()):
        if config["dry_run"]:
            dry_run.dry_run(config)
            return 0
        content = experiment.run(config, directory)
        if distributed.primary():
            print(report.console_table(content))
            pages = " and ".join(os.path.join(directory, name) for name in ("report.html", "report.md"))
            print(f"\nReport: {pages}   weights: {os.path.join(directory, 'fused')}")
        return 0 if content["certificate"]["passed"] else 3


if __name__ == "__main__":
    sys.exit(distributed.leave(absl_main(main, resume=shlex.join(["python", *sys.argv]))))
