"""A small SegFormer trained from scratch on CamVid at 240 × 180 pixels, denoised in all the paper's ways and ours.

    python train.py --config=configs/segformer_camvid.py             # expects camvid_360x480.npz in DREP_DATA

The network has 0.9 million parameters and is made for comparing ways of learning, not for its
accuracy. After 700 steps it has a mIoU of 33.1 (docs/results.md); longer runs were not measured.
"""

import os

from ml_collections import ConfigDict

from configs.default import get_default
from configs.espnet_camvid import CONDITIONS
from configs.segmentation import IMAGENET

STEPS = 100
"""Of each way of training denoisers, and of the control arm."""


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "segformer_camvid"
    config.task = "segmentation"
    config.learner = "measured"
    config.compare = ("closed_form", "wiener", "algorithm1", "label_augmented", "alternating")
    config.noise = "gaussian:10..50"
    config.data.update({"source": f"camvid:{os.path.join(os.environ.get('DREP_DATA', ''), 'camvid_360x480.npz')}"})
    config.data.update({"image_size": (180, 240), "resize": "squash", "test_resize": "short:180:240", **IMAGENET})
    config.data.update({"flip": True, "scale": (0.75, 1.5), "scale_base": (180, 240), "photometric": True})
    config.model.update({"name": "segformer", "widths": (16, 32, 80, 128), "depths": (2, 2, 2, 2), "head_width": 128})
    config.model.update({"drop_path": 0.0, "dropout": 0.0})
    labeled = {"batch_size": 8, "optimizer": "adamw", "weight_decay": 0.01, "decay": "poly:1"}
    config.backbone.update({**labeled, "steps": 1200, "learning_rate": 1.5e-3, "warmup": 50})
    config.control.update({**labeled, "steps": STEPS, "learning_rate": 1e-4, "warmup": 10})
    config.denoise.update({"train_steps": STEPS, "batch_size": 8, "learning_rate": 4e-4, "tokens": 0.25})
    config.denoise.update({"moment_tokens": 0.5})
    config.alternate.update({"steps": STEPS, "period": 20})
    config.sites.pattern = ".*"
    config.measured.update({"images": 0, "clean_share": (0.8,)})
    config.distilled.update({"steps": 400, "batch_size": 8, "learning_rate": 3e-4, "clean_share": 0.5})
    config.select.update({"labels": False, "images": 0, "max_clean_loss": 15.0, "leading": (0.3, 0.6, 1.0)})
    config.select.strengths = (0.75, 1.0)
    config.select.conditions = ("clean", "gaussian:10", "gaussian:20")
    config.evaluate.update({"conditions": CONDITIONS, "batch_size": 16})
    config.evaluate.update({"certificate_images": 4, "latency_batch": 8})
    return config
