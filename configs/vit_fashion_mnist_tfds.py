"""Small ViT on Fashion-MNIST of the TFDS catalog: `configs/vit_fashion_mnist.py` with other files.

    python -m drep_jax.data.prepare fashion_mnist --data_dir=DIR  # once; this alone needs TensorFlow
    python train.py --config=configs/vit_fashion_mnist_tfds.py --config.data.data_dir=DIR

Protocol of the field: 28 px, unscaled, gray as three equal channels; mean and std of the training
images. 60,000 training images, of which the last tenth is held out for choosing; 10,000 test
images. The backbone is trained from scratch first: 1,500 steps of batch 64, which is 1.8 epochs.
"""

from ml_collections import ConfigDict

from configs import vit_fashion_mnist


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = vit_fashion_mnist.get_config()
    config.name = "vit_fashion_mnist_tfds"
    config.data.source = "tfds:fashion_mnist"
    config.data.data_dir = ""
    config.data.resize = "exact"
    return config
