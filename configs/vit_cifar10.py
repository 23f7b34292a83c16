"""Small post-norm ViT on CIFAR-10 (published weights, 73.72 %): noise measured without labels.

    python train.py --config=configs/vit_cifar10.py --config.noise=gaussian:0..40
    python train.py --config=configs/vit_cifar10.py --config.learner=wiener

It takes 1,500 unlabeled images. The second command knows no noise, only clean images. Data and
weights are expected in the directory DREP_DATA: cifar10_train.npz, cifar10_test.npz (see
docs/results.md for their form) and weights/vit_d128_l6_cifar10.npz. Results are in docs/results.md.
"""

import os

from ml_collections import ConfigDict

from configs.default import get_default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "vit_cifar10"
    config.learner = "measured"
    config.noise = "gaussian:10..50"
    config.data.source = "npz:cifar10"
    config.data.image_size = (32, 32)
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2023, 0.1994, 0.2010)

    config.model.name = "vit"
    config.model.update({"patch_size": 4, "width": 128, "depth": 6, "num_heads": 8, "mlp_dim": 256})
    config.model.update({"post_norm": True, "activation": "relu", "norm_eps": 1e-5})
    config.sites.pattern = ".*"
    config.backbone.init_from = os.path.join(os.environ.get("DREP_DATA", ""), "weights", "vit_d128_l6_cifar10.npz")
    config.denoise.update({"train_steps": 300, "learning_rate": 0.05, "batch_size": 32, "moment_images": 1536})
    config.denoise.tokens = 0.1
    config.measured.clean_share = (0.5, 0.65, 0.8)
    config.select.update({"images": 1000, "max_clean_loss": 2.0})

    config.evaluate.conditions = ("clean", "gaussian:10", "gaussian:20", "gaussian:40")
    config.evaluate.batch_size = 500
    config.latency_rounds = 10
    return config
