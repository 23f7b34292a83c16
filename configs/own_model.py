"""A network and images of your own, with every other setting at its default (docs/own_model.md).

    python train.py --config=configs/own_model.py --config.model.name=mynet.py:MyNet --config.model.width=64 \\
        --config.backbone.init_from=net.pth --config.backbone.init_names=names.py \\
        --config.data.source=folder:DIR --config.data.image_size="(176, 176)" --workdir=runs/mine

The learner is the closed form: no training, one pass over the images.
"""

from ml_collections import ConfigDict

from configs.default import get_default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "own_model"
    config.learner = "closed_form"
    return config
