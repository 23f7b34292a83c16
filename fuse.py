"""Fuses the denoisers of a finished run into the plain backbone's weights, certifies, and writes them.

    python fuse.py --workdir=runs/digits
    python fuse.py --workdir=runs/digits --rule=paper --noise=sample --seed=1 --out=weights
    python fuse.py --workdir=runs/digits --resolve --steps=10 --time_scale=5   # other time steps, from the saved moments
    python fuse.py --workdir=runs/digits --sweep                               # the best of a grid, on held-out images

Exit status: 0 if the certificate holds, 3 if it fails, 1 for bad input.
"""

import os
import shlex
import sys

from absl import flags

from drep_jax.cli import absl_main
from drep_jax.errors import ConfigError

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of the run that learned the denoisers.", required=True)
RULE = flags.DEFINE_string(
    "rule", None, "Reverse step: ddpm (Eq. 5), paper (Eq. 7), ddim or ddim:r; default: the run's."
)
STEPS = flags.DEFINE_integer(
    "steps", None, "Reverse steps a site; more than the run's own need --resolve or a closed form; default: the run's."
)
TIME_SCALE = flags.DEFINE_float("time_scale", None, "Every site's t, times this; needs --resolve or a closed form.")
RESOLVE = flags.DEFINE_bool("resolve", False, "Take the closed form of the run's moments in place of its denoisers.")
SWEEP = flags.DEFINE_bool("sweep", False, "Try the configuration's grid on held-out images and fuse the best.")
SWEEP_IMAGES = flags.DEFINE_integer("sweep_images", None, "Held-out images of --sweep; default: select.images.")
NOISE = flags.DEFINE_string("noise", "zero", 'The noise z: "zero", or "sample" to draw it once from --seed.')
SEED = flags.DEFINE_integer("seed", 0, "Seed of --noise=sample.")
OUT = flags.DEFINE_string("out", None, "Where to write; default: WORKDIR/fused, or WORKDIR/sweep.")
DTYPE = flags.DEFINE_string("dtype", None, "Storage type, such as bfloat16; default: the backbone's own.")
ALLOW_ROUNDING = flags.DEFINE_bool("allow_rounding", False, "Write even if the type rounds most of the change away.")


def main(argv: list[str]) -> int:
    """Fuses again; returns the exit status."""
    from drep_jax import experiment

    out = OUT.value or os.path.join(WORKDIR.value, "sweep" if SWEEP.value else "fused")
    options = {
        "rule": RULE.value,
        "steps": STEPS.value,
        "time_scale": TIME_SCALE.value,
        "resolve": RESOLVE.value,
        "noise": NOISE.value,
        "seed": SEED.value,
        "dtype": DTYPE.value,
        "allow_rounding": ALLOW_ROUNDING.value,
    }
    if SWEEP.value:
        given = [name for name in options if flags.FLAGS[name].present]
        if given:
            raise ConfigError(
                f"--sweep chooses by itself; it cannot be given with {', '.join('--' + n for n in given)}."
            )
        certificate = experiment.sweep(WORKDIR.value, out, images=SWEEP_IMAGES.value)
    else:
        certificate = experiment.refuse(WORKDIR.value, out, **options)
    print(certificate)
    print(f"Weights: {os.path.join(out, 'fused.safetensors')} and {os.path.join(out, 'orbax')}")
    return 0 if certificate.passed else 3


if __name__ == "__main__":
    sys.exit(absl_main(main, resume=shlex.join(["python", *sys.argv])))
