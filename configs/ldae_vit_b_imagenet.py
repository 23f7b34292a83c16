"""l-DAE's published recipe on ImageNet-1k, encoder ViT-B/16 and a decoder as large. Not measured here.

    python train.py --config=configs/ldae_vit_b_imagenet.py         # 400 epochs, center crops
    python train.py --config=configs/ldae_vit_b_imagenet.py:1600    # 1,600 epochs, random resized crops

Chen, Liu, Xie & He 2024, "Deconstructing Denoising Diffusion Models for Self-Supervised Learning"
(arXiv 2401.14404): 256×256 pixels, patches of 16×16, d = 32 components, σ uniform on [0, √2], AdamW
without weight decay, batches of 2,048, learning rate 8e-4, 100 epochs of warm-up, a cosine; the probe
reads the averaged tokens at t = 10. Their linear probe reaches 60.3 % after 400 epochs and 66.6 % after
1,600; fine-tuned 83.7 %. They do not say whether images are flipped, nor which scale the latents have:
here both are the defaults (no flip; one global scale).

An epoch has 1,271,167 images: 10,000 of the training split are held out. The data set is prepared with
`python -m drep_jax.data.prepare imagenet2012`.
"""

from ml_collections import ConfigDict

from configs.default import get_default
from drep_jax.errors import ConfigError

EPOCHS = ("400", "1600")
BATCH = 2048
EPOCH = 1_271_167 // BATCH
"""Steps."""


def get_config(epochs: str = "400") -> ConfigDict:
    """Returns the configuration for that many epochs of pre-training."""
    return recipe("ldae_vit_b_imagenet", "vit_b16", epochs)


def recipe(name: str, model: str, epochs: str) -> ConfigDict:
    """Returns the recipe with an encoder of the registry.

    Raises:
      ConfigError: for other epochs than the paper's.
    """
    if epochs not in EPOCHS:
        raise ConfigError(f'"{epochs}" epochs of pre-training: the paper has {" and ".join(EPOCHS)}.')
    config = get_default()
    config.name = name
    config.learner = "measured"
    config.compare = ("closed_form",)
    config.noise = "pca_latent:0..0.6"
    config.data.source = "tfds:imagenet2012"
    config.data.image_size = (256, 256)
    if epochs == "1600":
        config.data.crop_scale = (0.2, 1.0)

    config.model.name = model
    config.model.update({"class_token": False, "pool": "mean", "final_norm": False, "positions": "sincos2d"})
    config.model.activation = "gelu_tanh"

    config.pretrain.update({"steps": int(epochs) * EPOCH, "warmup": 100 * EPOCH, "batch_size": BATCH})
    config.pretrain.update({"learning_rate": 1e-4 * BATCH / 256, "compute": "bfloat16", "components": 32})
    config.pretrain.update({"sweep": (0, 20, 40, 80), "probe_images": 200_000, "probe_every": 20 * EPOCH})

    config.denoise.update({"train_steps": 0, "batch_size": 256, "moment_images": 20_480, "moment_tokens": 0.25})
    config.checkpoint_every = 5 * EPOCH
    config.evaluate.conditions = ("clean", "pca_latent:0.3", "pca_latent:0.6", "gaussian:40")
    config.evaluate.batch_size = 256
    return config
