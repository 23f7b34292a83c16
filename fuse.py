"""Fuses the denoisers of a finished run into the plain backbone's weights, certifies, and writes them.

    python fuse.py --workdir=runs/digits
    python fuse.py --workdir=runs/digits --rule=paper --noise=sample --seed=1 --out=weights

Exit status: 0 if the certificate holds, 3 if it fails, 1 for bad input.
"""

import os
import shlex
import sys

from absl import flags

from drep_jax.cli import absl_main

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of the run that learned the denoisers.", required=True)
RULE = flags.DEFINE_string(
    "rule", None, "Reverse step: ddpm (Eq. 5), paper (Eq. 7), ddim or ddim:r; default: the run's."
)
STEPS = flags.DEFINE_integer("steps", None, "Reverse steps a site, at most the run's own; default: the run's.")
NOISE = flags.DEFINE_string("noise", "zero", 'The noise z: "zero", or "sample" to draw it once from --seed.')
SEED = flags.DEFINE_integer("seed", 0, "Seed of --noise=sample.")
OUT = flags.DEFINE_string("out", None, "Where to write; default: WORKDIR/fused.")
DTYPE = flags.DEFINE_string("dtype", None, "Storage type, such as bfloat16; default: the backbone's own.")
ALLOW_ROUNDING = flags.DEFINE_bool("allow_rounding", False, "Write even if the type rounds most of the change away.")


def main(argv: list[str]) -> int:
    """Fuses again; returns the exit status."""
    from drep_jax import experiment

    out = OUT.value or os.path.join(WORKDIR.value, "fused")
    certificate = experiment.refuse(
        WORKDIR.value,
        out,
        rule=RULE.value,
        steps=STEPS.value,
        noise=NOISE.value,
        seed=SEED.value,
        dtype=DTYPE.value,
        allow_rounding=ALLOW_ROUNDING.value,
    )
    print(certificate)
    print(f"Weights: {os.path.join(out, 'fused.safetensors')} and {os.path.join(out, 'orbax')}")
    return 0 if certificate.passed else 3


if __name__ == "__main__":
    sys.exit(absl_main(main, resume=shlex.join(["python", *sys.argv])))
