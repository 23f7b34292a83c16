"""Fuses the denoisers of a finished run into its backbone, certifies and writes the weights.

    python fuse.py --workdir=runs/digits
    python fuse.py --workdir=runs/digits --rule=paper --noise=sample --seed=1 --out=weights
    python fuse.py --workdir=runs/digits --resolve --steps=10 --time_scale=10   # without training
    python fuse.py --workdir=runs/digits --sweep                  # the best on held-out images
    python fuse.py --workdir=runs/resnet50 --export=same          # in the backbone's file format
    python fuse.py --workdir=runs/resnet50 --export=onnx --statistics=image:0.1   # BatchNorms that adapt

Exit status: 0 if the certificate holds, 3 if it fails, 1 for bad input.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from absl import flags

from drep_jax.cli.app import absl_main
from drep_jax.files import expanded
from drep_jax.parallel import processes
from drep_jax.parallel.hosts import define_flags
from drep_jax.run import lock

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of the run that learned the denoisers.", required=True)
RULE = flags.DEFINE_string(
    "rule", None, "Reverse step: ddpm (Eq. 5), paper (Eq. 7), ddim or ddim:r, or wiener:r; default: the run's."
)
STEPS = flags.DEFINE_integer("steps", None, "Reverse steps a site; default: the run's.")
TIME_SCALE = flags.DEFINE_float("time_scale", None, "Scale of the time steps; default: the run's.")
BETA_END = flags.DEFINE_float("beta_end", None, "End of the noise schedule; default: the run's.")
STRENGTH = flags.DEFINE_float("strength", None, "Strength of fusion: 0 gives the backbone, 1 full fusion; default: 1.")
RESOLVE = flags.DEFINE_bool(
    "resolve", False, "Use Algorithm 1's minimum, from the run's moments, instead of the learned denoisers."
)
SWEEP = flags.DEFINE_bool("sweep", False, "Choose from the run's grid of rules, steps, scales and strengths.")
SWEEP_IMAGES = flags.DEFINE_integer("sweep_images", None, "Held-out images of --sweep, 0 for all; default: the run's.")
NOISE = flags.DEFINE_string("noise", "zero", 'The noise z: "zero", or "sample" to draw it once from --seed.')
SEED = flags.DEFINE_integer("seed", 0, "Seed of --noise=sample.")
OUT = flags.DEFINE_string("out", None, "Where to write; default: WORKDIR/fused, or WORKDIR/sweep.")
DTYPE = flags.DEFINE_string("dtype", None, "Storage type, such as bfloat16; default: the backbone's own.")
ALLOW_ROUNDING = flags.DEFINE_bool("allow_rounding", False, "Write even if the type rounds away most of the change.")
EXPORT = flags.DEFINE_list(
    "export",
    [],
    'Further files: "same" for the kind that the backbone came in, a format\'s name, "stablehlo" or "onnx".',
)
INIT_FROM = flags.DEFINE_string("init_from", None, "The backbone's file for --export; default: where the run read it.")
INIT_NAMES = flags.DEFINE_string("init_names", None, "Its name table for --export; default: where the run read it.")
FOLD_BATCHNORM = flags.DEFINE_bool(
    "fold_batchnorm", False, "Make BatchNorms constants, folded into the layers before them."
)
STATISTICS = flags.DEFINE_string(
    "statistics",
    None,
    "What BatchNorms of exported programs mix with their trained statistics: image:α or batch:α, such as image:0.1.",
)
HOSTS = define_flags()


def main(argv: list[str]) -> int:
    """Fuses a run; returns the exit status."""
    workdir = expanded(WORKDIR.value)
    with processes.joined(HOSTS()), lock.reading(workdir) if processes.primary() else nullcontext():
        return fuse_again(workdir)


def fuse_again(workdir: str) -> int:
    """Fuses the run in `workdir`, prints the certificate and returns the exit status."""
    from drep_jax.exporting.statistics import Statistics
    from drep_jax.run.export import Output

    output = Output(
        expanded(OUT.value or os.path.join(workdir, "sweep" if SWEEP.value else "fused")),
        dtype=DTYPE.value,
        allow_rounding=ALLOW_ROUNDING.value,
        forms=tuple(EXPORT.value),
        init_from=INIT_FROM.value,
        init_names=INIT_NAMES.value,
        fold_batchnorm=FOLD_BATCHNORM.value,
        statistics=None if STATISTICS.value is None else Statistics.parse(STATISTICS.value),
    )
    options = {
        "rule": RULE.value,
        "steps": STEPS.value,
        "time_scale": TIME_SCALE.value,
        "beta_end": BETA_END.value,
    }
    certificate, paths = fused(workdir, output, options)
    print(certificate)
    print(f"Weights: {', '.join(paths)}")
    return 0 if certificate.passed else 3


def fused(workdir: str, output: Any, options: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Fuses a run as the flags say; returns the certificate and the paths of the files."""
    from drep_jax.jobs import fuse, sweep

    if SWEEP.value:
        if NOISE.value != "zero":
            raise flags.Error("--sweep compares without noise, so --noise does not go with it.")
        best = sweep.sweep(workdir, output, strength=STRENGTH.value, images=SWEEP_IMAGES.value, **options)
        return best.certificate, best.paths
    if SWEEP_IMAGES.value is not None:
        raise flags.Error("--sweep_images goes with --sweep only.")
    strength = 1.0 if STRENGTH.value is None else STRENGTH.value
    again = {"resolve": RESOLVE.value, "noise": NOISE.value, "seed": SEED.value}
    return fuse.fuse_run(workdir, output, strength=strength, **again, **options)


if __name__ == "__main__":
    sys.exit(processes.leave(absl_main(main, resume=shlex.join(["python", *sys.argv]))))
