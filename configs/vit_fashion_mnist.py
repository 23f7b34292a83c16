"""Small ViT on Fashion-MNIST, trained from scratch: label-free denoisers for unseen noise.

    python train.py --config=configs/vit_fashion_mnist.py --config.data.data_dir=DIR
    python train.py --config=configs/vit_fashion_mnist.py --config.data.source=tfds:fashion_mnist

DIR/fashion-mnist holds the four usual files (train-images-idx3-ubyte.gz, …). The Debian package
dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist, which is the default. Results
are in docs/results.md.
"""

from ml_collections import ConfigDict

from configs.default import get_default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "vit_fashion_mnist"
    config.learner = "measured"
    config.noise = "gaussian:0..80"
    config.data.source = "idx:fashion-mnist"
    config.data.data_dir = "/usr/share/datasets"
    config.data.image_size = (28, 28)
    config.data.mean = (0.286,)
    config.data.std = (0.353,)

    config.model.name = "vit"
    config.model.update({"patch_size": 4, "width": 64, "depth": 4, "num_heads": 4, "mlp_dim": 128})
    config.sites.pattern = ".*"
    config.backbone.update(
        {"steps": 1500, "batch_size": 64, "learning_rate": 1e-3, "warmup": 100, "weight_decay": 0.05}
    )
    config.denoise.update({"train_steps": 500, "learning_rate": 0.2, "moment_images": 2000})
    config.measured.clean_share = (0.3, 0.5, 0.7)

    config.evaluate.conditions = ("clean", "gaussian:20", "gaussian:50", "gaussian:80")
    config.evaluate.batch_size = 500
    return config
