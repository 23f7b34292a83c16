"""The built-in data set, UCI handwritten digits (8×8 pixels): a small ViT, label-free denoisers.

python train.py --config=configs/digits.py        # or just: python train.py
"""

from ml_collections import ConfigDict

from configs.default import get_default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "digits"
    config.learner = "measured"
    config.compare = ("algorithm1", "closed_form")
    config.noise = "gaussian:0..80"
    config.data.source = "digits"
    config.data.image_size = (8, 8)
    config.data.mean = (0.3, 0.3, 0.3)
    config.data.std = (0.38, 0.38, 0.38)
    config.data.shift = 1

    config.model.name = "vit"
    config.model.update({"patch_size": 2, "width": 64, "depth": 4, "num_heads": 4, "mlp_dim": 128})

    config.backbone.update(
        {"steps": 1500, "batch_size": 64, "learning_rate": 2e-3, "warmup": 100, "weight_decay": 0.05}
    )
    config.control.update({"steps": 500, "batch_size": 64, "learning_rate": 2e-4})
    # The minimizer has entries up to 1/√(1−ᾱ_t), 100 at t = 1, and Adam moves an entry by at most its rate
    # per step. At the paper's 4e-4, hundreds of steps stay near the start (see the report's gap to the optimum).
    config.denoise.update({"train_steps": 500, "batch_size": 64, "learning_rate": 0.2})

    config.evaluate.conditions = ("clean", "gaussian:40", "gaussian:80")
    config.evaluate.batch_size = 200
    return config
