"""A ViT of two narrow blocks on the digits: the whole job in some seconds, for tests."""

from ml_collections import ConfigDict

from configs.default import get_default

RESNET = {"name": "resnet", "num_classes": 0, "stage_sizes": (1,), "block": "basic", "width": 4, "stem": "cifar"}
"""A model with batch statistics, to be trained instead."""


def get_config() -> ConfigDict:
    """Returns the configuration; batches divide among 8 devices."""
    config = get_default()
    config.name = "tiny"
    config.progress = False
    config.log_every = 7
    config.checkpoint_every = 10
    config.latency_rounds = 3
    config.data.update({"image_size": (8, 8), "mean": (0.3, 0.3, 0.3), "std": (0.38, 0.38, 0.38), "shift": 1})
    config.model.update({"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24})
    config.backbone.update({"steps": 40, "batch_size": 64, "learning_rate": 5e-3, "warmup": 5})
    config.control.update({"steps": 5, "batch_size": 16, "learning_rate": 1e-3})
    config.denoise.update({"train_steps": 30, "batch_size": 32, "learning_rate": 0.1, "steps": 3})
    config.evaluate.update(
        {
            "conditions": ("clean", "gaussian:60"),
            "batch_size": 128,
            "resamples": 200,
            "certificate_images": 4,
            "latency_batch": 8,
        }
    )
    return config
