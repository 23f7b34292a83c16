"""l-DAE on the built-in digits in a minute: pre-training without labels, a linear probe, then measured denoisers.

    python train.py --config=configs/ldae_digits.py

Only the probe sees labels, and only clean images. The noise of pre-training, `pca_latent`, is one of
the conditions. To fine-tune the encoder with labels as well: --config.backbone.steps=500.
"""

from ml_collections import ConfigDict

from configs.default import get_default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "ldae_digits"
    config.learner = "measured"
    config.compare = ("closed_form",)
    config.noise = "pca_latent:0..1.4"
    config.data.source = "digits"
    config.data.image_size = (8, 8)
    config.data.mean = (0.3, 0.3, 0.3)
    config.data.std = (0.38, 0.38, 0.38)
    config.data.shift = 1

    config.model.name = "vit"
    config.model.update({"patch_size": 2, "width": 64, "depth": 2, "num_heads": 4, "mlp_dim": 256})
    config.model.update({"class_token": False, "pool": "mean", "final_norm": False})
    config.model.activation = "gelu_tanh"

    config.pretrain.update({"steps": 600, "batch_size": 64, "learning_rate": 2e-3, "warmup": 60})
    config.pretrain.update({"components": 4, "scale": "whiten", "sweep": (100,), "probe_every": 200})
    config.pretrain.gate = 1.0

    config.evaluate.conditions = ("clean", "pca_latent:0.7", "pca_latent:1.4", "gaussian:80")
    config.evaluate.batch_size = 200
    return config
