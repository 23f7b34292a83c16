"""ResNet-20 on CIFAR-10 of the TFDS catalog: `configs/resnet20_cifar10.py` with other files.

    python -m drep_jax.data.prepare cifar10 --data_dir=DIR         # once; this alone needs TensorFlow
    python train.py --config=configs/resnet20_cifar10_tfds.py --config.data.data_dir=DIR

The protocol is the field's: images of 32 px; horizontal flips and shifts by up to 4 pixels in
training; mean and std of the published weights, which are read from the directory DREP_DATA. There
are 50,000 training images, of which the last tenth is held out for selection, and 10,000 test
images. Training from scratch for 200 epochs: `--config.backbone.init_from=
--config.backbone.steps=70400 --config.backbone.batch_size=128 --config.backbone.optimizer=sgd
--config.backbone.learning_rate=0.1`.
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
