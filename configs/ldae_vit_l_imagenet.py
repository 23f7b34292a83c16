"""l-DAE's published recipe on ImageNet-1k, encoder ViT-L/16 and a decoder as large. Not measured here.

    python train.py --config=configs/ldae_vit_l_imagenet.py         # 400 epochs, center crops
    python train.py --config=configs/ldae_vit_l_imagenet.py:1600    # 1,600 epochs, random resized crops

As configs/ldae_vit_b_imagenet.py, whose text says what the paper leaves open. Its linear probe reaches
70.9 % after 400 epochs and 75.0 % after 1,600; fine-tuned 84.7 %. The encoder of the paper's ablations,
half a ViT-L with 65.0 %, is `--config.model.depth=12`.
"""

from ml_collections import ConfigDict

from configs.ldae_vit_b_imagenet import recipe


def get_config(epochs: str = "400") -> ConfigDict:
    """Returns the configuration for that many epochs of pre-training."""
    return recipe("ldae_vit_l_imagenet", "vit_l16", epochs)
