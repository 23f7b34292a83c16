"""MCUNet on photographs with ImageNet's labels: the noise of real cameras measured on 200 unlabeled ones.

    python train.py --config=configs/mcunet_imagenet.py
    python train.py --config=configs/mcunet_imagenet.py --config.noise=gaussian:0..40

Data and weights are expected in the directory DREP_DATA: imagenet_nips17.npz (1,000 photographs: of
every ten, two are learned from, two are chosen on, six are tested on), noise_polyu100.npz (pairs of
five cameras: the noise of three is learned, that of the two others tested) and
weights/mcunet-320kb-1mb_imagenet.pth with its architecture, the .json beside it. Results are in
docs/results.md.
"""

import os

from ml_collections import ConfigDict

from configs.default import get_default

LEARNED = "NikonD800+Sony+Canon80D"
TESTED = "Canon5D2+Canon600D"


def get_config() -> ConfigDict:
    """Returns the configuration."""
    directory = os.environ.get("DREP_DATA", "")
    bank = f"bank:{os.path.join(directory, 'noise_polyu100.npz')}"
    weights = os.path.join(directory, "weights", "mcunet-320kb-1mb_imagenet")
    config = get_default()
    config.name = "mcunet_imagenet"
    config.learner = "measured"
    config.noise = f"{bank}?camera={LEARNED}&strength=0..3"
    config.data.source = f"npz:{os.path.join(directory, 'imagenet_nips17.npz')}?tenths=2+2+6"
    config.data.image_size = (176, 176)
    config.data.resize = f"crop:{176 / 201}"  # short side 201, then the center

    config.model.name = "mcunet"
    config.model.update({"num_classes": 1000, "architecture": f"{weights}.json"})
    config.backbone.init_from = f"{weights}.pth"

    config.measured.clean_share = (0.65, 0.8, 0.9)
    config.select.update({"conditions": (f"{bank}?camera={LEARNED}&strength=2",), "images": 0})
    config.select.update({"labels": False, "weighted": True, "strengths": (1.0, 1.5, 2.0), "leading": (0.5, 1.0)})
    config.checkpoint_every = 20
    config.distilled.update({"batch_size": 16, "steps": 100, "learning_rate": 2e-4})

    tested = (f"{bank}?camera={TESTED}&strength={strength}" for strength in (1, 2, 3))
    config.evaluate.conditions = ("clean", *tested, "gaussian:10", "gaussian:20", "gaussian:40", "blur:1", "jpeg:80")
    config.evaluate.batch_size = 100
    config.latency_batch = 8
    return config
