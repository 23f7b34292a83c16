"""ESPNet with its published weights on CamVid: street scenes under noise, blur, low light and compression.

    python train.py --config=configs/espnet_camvid.py       # expects camvid_360x480.npz and weights/ in DREP_DATA

No label is learned from or chosen by. All 233 test images: mIoU 55.8 clean and 17.3 under noise of 20
gray levels; denoised −0.7 and +25.5. `--config.noise=gaussian:10..50,low_light:0..4,blur:0..2,jpeg:50..85`
learns for several corruptions. benchmarks/camvid.py has further arms; results are in docs/results.md.
"""

import os

from ml_collections import ConfigDict

from configs.default import get_default

EXAMPLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples", "espnet")
DATA = os.environ.get("DREP_DATA", "")
CONDITIONS = ("clean", "gaussian:10", "gaussian:20", "gaussian:40", "blur:1.5", "low_light:3", "jpeg:80")


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "espnet_camvid"
    config.task = "segmentation"
    config.learner = "measured"
    config.compare = ("closed_form", "wiener")
    config.noise = "gaussian:10..50"
    config.data.update({"source": f"camvid:{os.path.join(DATA, 'camvid_360x480.npz')}"})
    config.data.update({"image_size": (360, 480), "resize": "exact"})
    # (x - mean) / std / 255 with x from 0 to 255, in the order of red, green, blue
    config.data.mean = (105.03 / 255, 108.41 / 255, 110.33 / 255)
    config.data.std = (69.90, 72.69, 72.13)
    config.model.name = os.path.join(EXAMPLE, "espnet.py:ESPNet")
    config.model.num_classes = 12
    config.segmentation.void_outputs = (11,)
    config.backbone.init_from = os.path.join(DATA, "weights", "espnet_p_2_q_8_camvid.pth")
    config.backbone.init_names = os.path.join(EXAMPLE, "names.py")
    # Up to the fourth block of level 3. Sites behind it add nothing.
    config.sites.pattern = r"level1|level2_(down|0|1)/.*|level3_(down|0|1|2|3)/.*"
    config.denoise.update({"moment_images": 60, "moment_tokens": 0.25})
    config.measured.update({"images": 50, "clean_share": (0.8,)})
    config.distilled.update({"steps": 250, "batch_size": 4, "learning_rate": 5e-4, "clean_share": 0.5})
    # Agreement falls by more than accuracy does, since a pixel that changes was often wrong before.
    config.select.update({"labels": False, "images": 17, "max_clean_loss": 15.0})
    config.select.strengths, config.select.leading = (0.75, 1.0), (0.5, 1.0)
    config.select.conditions = ("clean", "gaussian:10", "gaussian:20")
    config.evaluate.update({"conditions": CONDITIONS, "batch_size": 12})
    config.evaluate.update({"certificate_images": 2, "latency_batch": 4})
    return config
