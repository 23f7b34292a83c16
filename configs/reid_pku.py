"""Persons in front of two cameras: a small ResNet trained from scratch, denoised label-free.

    python train.py --config=configs/reid_pku.py                  # expects reid_pku74.npz in DREP_DATA
    python train.py --config=configs/reid_pku.py:transreid        # a small TransReID instead

The corruptions are noise, blur, low light and compression. The set has 74 persons with eight views
in each of two cameras. A number behind the backbone (`resnet:3`) is the seed, which splits the
persons anew: 40 % are tested, queries from camera 1 and gallery from camera 2, and 15 % of the
others are held out for choosing, without labels. `benchmarks/reid.py` repeats this over seeds, with
every training mode; the results are in docs/results.md.
"""

from ml_collections import ConfigDict

from configs.default import get_default
from drep_jax.errors import lookup

BACKBONES = {
    "resnet": {"name": "resnet_reid", "stage_sizes": (1, 1, 1, 1), "block": "basic", "width": 32},
    "transreid": {
        "name": "transreid",
        "patch_size": 8,
        "width": 128,
        "depth": 6,
        "num_heads": 4,
        "mlp_dim": 256,
        "drop_path": 0.0,
    },
}
CONDITIONS = ("clean", "gaussian:40", "gaussian:80", "blur:2", "low_light:3", "jpeg:95")


def get_config(choice: str = "resnet:0") -> ConfigDict:
    """Returns the configuration.

    Args:
      choice: BACKBONE:SEED, of the division of the persons.
    """
    name, _, seed = choice.partition(":")
    config = get_default()
    config.name = f"reid_pku_{name}_{seed or 0}"
    config.seed = int(seed or 0)
    config.task = "retrieval"
    config.learner = "measured"
    config.compare = ("algorithm1", "closed_form", "wiener")
    config.noise = "gaussian:20..90,gaussian:20..90,blur:0..3,low_light:0..4,jpeg:50..97"
    config.data.update({"source": f"reid_npz:reid_pku74.npz?test=0.4&held_out=0.15&seed={seed or 0}"})
    config.data.update({"image_size": (128, 48), "resize": "exact", "flip": True, "shift": 6, "erase": 0.3})
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.model.update(lookup(BACKBONES, name, "backbone of this configuration"))
    labeled = {"batch_size": 64, "optimizer": "adamw", "weight_decay": 0.05, "label_smoothing": 0.1}
    config.backbone.update({**labeled, "steps": 400, "learning_rate": 2e-3, "warmup": 50})
    config.control.update({**labeled, "steps": 100, "learning_rate": 2e-4, "warmup": 10})
    config.denoise.update({"train_steps": 100, "batch_size": 64, "learning_rate": 4e-4, "tokens": 0.25})
    config.alternate.update({"steps": 100, "period": 10})
    config.measured.update({"images": 0, "draws": 2, "clean_share": (0.75, 0.9, 0.97)})
    config.retrieval.update({"margin": 0.3, "attributed": 10})
    config.select.update({"labels": False, "images": 0, "max_clean_loss": 1.0})
    config.evaluate.update({"conditions": CONDITIONS, "batch_size": 240})
    return config
