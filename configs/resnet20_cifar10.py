"""ResNet-20 on CIFAR-10 (Idelbayev's published weights, 91.73 %): noise measured without labels.

    python train.py --config=configs/resnet20_cifar10.py --config.noise=gaussian:0..40
    python train.py --config=configs/resnet20_cifar10.py --config.learner=wiener

It takes 1,500 unlabeled images. The second command knows no noise, only clean images. Data and
weights are expected in the directory DREP_DATA: cifar10_train.npz, cifar10_test.npz (see
docs/results.md for their form) and weights/resnet20_cifar10.npz. Results are in docs/results.md.
"""

import os

from ml_collections import ConfigDict

from configs.default import get_default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "resnet20_cifar10"
    config.learner = "measured"
    config.noise = "gaussian:10..50"
    config.data.source = "npz:cifar10"
    config.data.image_size = (32, 32)
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.model.name = "resnet20_cifar"
    config.backbone.init_from = os.path.join(os.environ.get("DREP_DATA", ""), "weights", "resnet20_cifar10.npz")
    config.denoise.update({"train_steps": 300, "learning_rate": 0.05, "batch_size": 32, "moment_images": 1536})
    config.denoise.tokens = 0.1
    config.measured.clean_share = (0.5, 0.65, 0.8)
    config.select.update({"images": 2000, "max_clean_loss": 2.0})

    config.evaluate.conditions = ("clean", "gaussian:10", "gaussian:20", "gaussian:40")
    config.evaluate.batch_size = 500
    config.latency_rounds = 10
    return config
