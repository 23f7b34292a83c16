"""Yolo-Fastest-1.1-xl with its published weights on 256 pictures of COCO, denoised without labels.

    python train.py --config=configs/yolo_fastest_coco.py  # expects coco256_detseg.npz and weights/ in DREP_DATA

A YOLOv3 of 0.92 million parameters for images of 320 × 320 pixels. Of the 128 training pictures 27 are
held out for choices, which need no label. The 128 pictures of val2017 are the test:
AP 22.0, AP50 43.5 clean (boxes from a score of 0.005, suppression at an IoU of 0.45, areas of the
boxes in the stored pictures). Denoised, it finds 3.9 points more under noise of 20 gray levels, of 9.5
lost, and 0.2 more on clean pictures. benchmarks/coco.py has further arms; results are in
docs/results.md.
"""

import os

from ml_collections import ConfigDict

from configs.default import get_default

DATA = os.environ.get("DREP_DATA", "")
NETWORK = os.path.join(DATA, "weights", "yolo-fastest-1.1-xl")
CONDITIONS = ("clean", "gaussian:10", "gaussian:20", "gaussian:40", "blur:1.5", "low_light:3", "jpeg:80")


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "yolo_fastest_coco"
    config.task = "detection"
    config.learner = "measured"
    config.compare = ("closed_form",)
    config.noise = "gaussian:5..45"
    config.data.update({"source": f"det_npz:{os.path.join(DATA, 'coco256_detseg.npz')}?held_out=0.3"})
    config.data.update({"image_size": (320, 320), "resize": "squash", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    config.model.update({"name": "darknet", "cfg": f"{NETWORK}.cfg"})
    config.backbone.init_from = f"{NETWORK}.weights"
    # The first 43 of 84 convolutions: a network that finds objects is denoised early.
    config.sites.pattern = r"conv_([1-5]?\d|60)"
    config.denoise.update({"moment_images": 90, "moment_tokens": 0.25})
    config.measured.update({"images": 0, "draws": 2, "clean_share": (0.6, 0.75, 0.9)})
    config.distilled.update({"steps": 150, "batch_size": 8, "learning_rate": 3e-4, "clean_share": 0.5})
    config.wiener.ratios = (0.003, 0.03)
    config.select.update({"labels": False, "images": 0, "max_clean_loss": 10.0})
    config.select.strengths, config.select.leading = (0.5, 0.75), (0.3, 0.6, 1.0)
    config.select.conditions = ("clean", "gaussian:20")
    config.evaluate.update({"conditions": CONDITIONS, "batch_size": 16, "resamples": 1000})
    config.evaluate.update({"certificate_images": 2, "latency_batch": 4})
    return config
