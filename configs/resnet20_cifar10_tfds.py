"""ResNet-20 on CIFAR-10 of the TFDS catalog: `configs/resnet20_cifar10.py` with other files.

    python -m drep_jax.data.prepare cifar10 --data_dir=DIR     # once; this alone needs TensorFlow
    python train.py --config=configs/resnet20_cifar10_tfds.py --config.data.data_dir=DIR

Protocol of the field: 32 px, unscaled; horizontal flips and shifts of up to 4 pixels for training;
mean and std of the published weights, which are expected in the directory DREP_DATA. 50,000
training images, of which the last tenth is held out for choosing; 10,000 test images. Training from
scratch is `--config.backbone.init_from= --config.backbone.steps=70400
--config.backbone.batch_size=128 --config.backbone.optimizer=sgd
--config.backbone.learning_rate=0.1`, 200 epochs.
"""

from ml_collections import ConfigDict

from configs import resnet20_cifar10


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = resnet20_cifar10.get_config()
    config.name = "resnet20_cifar10_tfds"
    config.data.source = "tfds:cifar10"
    config.data.resize = "exact"
    config.data.flip = True
    config.data.shift = 4
    return config
