"""ViT-S/16 at 224 px on ImageNet-1k: label-free denoisers for every MLP (paper, Table 1).

    python -m drep_jax.data.prepare imagenet2012 --data_dir=DIR
    python train.py --config=configs/vit_s_imagenet.py --config.data.data_dir=DIR \\
        --config.backbone.init_from=vit_s.safetensors
    python train.py --config=configs/vit_s_imagenet.py --config.data.source=folder:DIR …
    python train.py --config=configs/vit_s_imagenet.py --config.dry_run=true

The first command is needed once, with TensorFlow and the two tars. The third takes any images in
folders, the last needs no data. Protocol of the field: short side 249, the central 224 px (0.9) for
evaluation, mean and std 0.5, as for the published ViT-S of "How to train your ViT"; random resized
crops and horizontal flips for training. The last 10,000 of the 1,281,167 training images are held
out for choosing; the 50,000 of the validation split are the test.

Weights are read by the names of this project's own ViT (see docs/architecture.md). Without them,
`--config.backbone.steps=375300 --config.backbone.batch_size=1024` trains the backbone from scratch
first, for 300 epochs. The paper reports 83.87 → 84.02 acc@1 for its ViT-S; not yet measured here.
"""

from ml_collections import ConfigDict

from configs.default import get_default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = get_default()
    config.name = "vit_s_imagenet"
    config.data.source = "tfds:imagenet2012"
    config.data.image_size = (224, 224)
    config.data.resize = "crop:0.9"
    config.data.crop_scale = (0.08, 1.0)
    config.data.flip = True

    config.model.name = "vit_s16"
    config.model.num_classes = 1000

    config.backbone.update(
        {"batch_size": 1024, "learning_rate": 1e-3, "warmup": 10_000, "weight_decay": 0.1, "clip": 1.0}
    )
    config.denoise.update({"train_steps": 2000, "batch_size": 64, "learning_rate": 4e-4, "moment_images": 10_000})

    config.evaluate.conditions = ("clean", "gaussian:20", "gaussian:50")
    config.evaluate.batch_size = 256
    config.evaluate.certificate_images = 4
    config.evaluate.latency_batch = 8
    return config
