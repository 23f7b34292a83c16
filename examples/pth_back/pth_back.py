"""Your .pth back: a PyTorch checkpoint with timm's names in, a fused one with the same names out.

PYTHONPATH=. python examples/pth_back/pth_back.py [vit.pth]

PyTorch is not needed. Without a file the script makes one with random weights to work on. The command
line does the same, with the comparison on test images:

    python train.py --config.model.name=vit_s16 --config.backbone.init_from=vit.pth --workdir=runs/mine ...
    python fuse.py --workdir=runs/mine --export=same
"""

import os
import sys
import tempfile

import jax
import numpy as np

import drep_jax
from drep_jax import weights
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import normalize
from drep_jax.models import create_model
from examples.own_model.make_checkpoint import MEAN, STD, digits

SIZE = (8, 8)
MODEL = create_model("vit", num_classes=10, image_size=SIZE, patch_size=2, width=32, depth=2, num_heads=4, mlp_dim=64)


def stand_in(path: str) -> None:
    """Writes a file as timm does, with random weights."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), np.zeros((1, *SIZE, 3), np.float32))
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    weights.write_new(MODEL, variables, "timm", os.path.splitext(path)[0], {})


def main(path: str) -> str:
    """Returns the path of the fused file."""
    # 1. From the file to the variables of the Flax module.
    checkpoint = weights.read(path, MODEL, SIZE)
    print("\n".join(checkpoint.notes))

    # 2. Denoisers for the noise that you expect, from some images without labels.
    clean, _ = digits("train")
    clean = clean[:200]
    noisy = corrupt(clean, np.arange(len(clean)), "gaussian:40", seed=0)
    streams = np.stack([np.asarray(normalize(images, MEAN, STD)) for images in (clean, clean, noisy)])
    sites = drep_jax.find_sites(MODEL, streams[0, :1])
    measured = drep_jax.measure(MODEL, checkpoint.variables, sites, streams, [0.5, 0.5])

    # 3. Fused into the layers' weights, and checked against the explicit denoisers.
    schedule, how = drep_jax.Schedule(), {"rule": "affine", "steps": 1}
    params = {"backbone": checkpoint.variables["params"], "denoise": measured.denoise}
    fused = drep_jax.fuse_exact(params, sites, schedule, **how)
    certificate = drep_jax.certify(
        MODEL, checkpoint.variables, measured.denoise, sites, schedule, streams[0, :4], fused=fused, **how
    )
    print(certificate)

    # 4. Back to a file of the same names, shapes and types.
    stem, suffix = os.path.splitext(path)
    target = weights.write(
        f"{stem}_fused{suffix}", {**checkpoint.variables, "params": fused}, checkpoint, fusion={"noise": "gaussian:40"}
    )
    print(f"Written: {target}")
    return target


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:]:
            main(sys.argv[1])
        else:
            stand_in(os.path.join(folder, "vit.pth"))
            main(os.path.join(folder, "vit.pth"))
