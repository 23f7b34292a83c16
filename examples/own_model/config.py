"""`MyNet` on the embedded digits, its weights from a PyTorch file; README.md has the commands."""

import os

from ml_collections import ConfigDict

from configs.default import get_default

HERE = os.path.dirname(os.path.abspath(__file__))


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "own_model"
    config.learner = "measured"
    config.noise = "gaussian:20..80"
    config.data.update({"image_size": (8, 8), "mean": (0.3, 0.3, 0.3), "std": (0.38, 0.38, 0.38)})
    config.model.name = os.path.join(HERE, "mynet.py:MyNet")  # or mypackage.mymodule:MyNet
    config.model.update({"width": 16, "depth": 2})  # fields of MyNet; a flag does it too: --config.model.width=16
    config.backbone.init_names = os.path.join(HERE, "names.py")
    config.measured.update({"images": 500})
    config.evaluate.conditions = ("clean", "gaussian:60")
    return config
