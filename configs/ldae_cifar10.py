"""l-DAE on CIFAR-10, sized for two cores in 20 minutes: pre-training without labels, a probe, measured denoisers.

    python train.py --config=configs/ldae_cifar10.py

Patches of 4×4 pixels, 16 of 48 components with whitened noise, two blocks of width 96 and a decoder
as large. Gates start open, since in so short a training gates of zero leave the encoder its patch
embedding for long. Data are expected in the directory DREP_DATA: cifar10_train.npz, cifar10_test.npz
(see docs/results.md for their form, and for the measured figures).
"""

from ml_collections import ConfigDict

from configs.default import get_default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "ldae_cifar10"
    config.learner = "measured"
    config.compare = ("closed_form",)
    config.noise = "pca_latent:0..0.6"
    config.data.source = "npz:cifar10"
    config.data.image_size = (32, 32)
    config.data.flip = True
    config.data.shift = 2

    config.model.name = "vit"
    config.model.update({"patch_size": 4, "width": 96, "depth": 2, "num_heads": 3, "mlp_dim": 384})
    config.model.update({"class_token": False, "pool": "mean", "final_norm": False})
    config.model.activation = "gelu_tanh"

    config.pretrain.update({"steps": 2000, "batch_size": 64, "learning_rate": 2e-3, "warmup": 100})
    config.pretrain.update({"components": 16, "scale": "whiten", "whiten_loss": True, "gate": 1.0})
    config.pretrain.update({"sweep": (0, 40, 80), "probe_every": 500, "probe_images": 20_000})

    config.denoise.update({"train_steps": 0, "batch_size": 32, "moment_images": 1536})
    config.evaluate.conditions = ("clean", "pca_latent:0.3", "pca_latent:0.6", "gaussian:20")
    config.evaluate.batch_size = 500
    config.latency_rounds = 10
    return config
