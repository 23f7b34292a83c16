"""The paper's training modes on CIFAR-10's published ResNet-20 or ViT, with control arms.

    python train.py --config=configs/cifar10_training.py:label_free       # Algorithm 1
    python train.py --config=configs/cifar10_training.py:label_augmented  # Eq. 12
    python train.py --config=configs/cifar10_training.py:alternating      # appendix A
    python train.py --config=configs/cifar10_training.py:control          # the backbone alone
    python train.py --config=configs/cifar10_training.py:final_only       # DenoiseRep⁻, explicit
    python train.py --config=configs/cifar10_training.py:alternating:vit  # the ViT

`control` takes as many steps as the others. `final_only` is compared with the closed form. Ten
epochs of 64 images (7,030 steps of the 45,000 images for learning) in phases of one epoch; the
paper takes 120 in phases of ten. Convolutions have pointwise denoisers, the paper's. Data and
weights are expected in DREP_DATA, as by configs/resnet20_cifar10.py. `benchmarks/modes.py` repeats
all of them over seeds; the results are in docs/results.md.
"""

from ml_collections import ConfigDict

from configs import resnet20_cifar10, vit_cifar10
from drep_jax.errors import lookup

BACKBONES = {"resnet20": resnet20_cifar10, "vit": vit_cifar10}
MODES = {
    "label_free": {"learner": "algorithm1", "compare": ("closed_form",)},
    "label_augmented": {"learner": "label_augmented", "compare": ("algorithm1",)},
    "alternating": {"learner": "alternating", "compare": ("label_augmented",)},
    "control": {"learner": "continued", "compare": ()},
    "final_only": {"learner": "closed_form", "compare": ("final_only",)},
}
EPOCH = 703
EPOCHS = 10


def get_config(choice: str = "label_augmented:resnet20") -> ConfigDict:
    """Returns the configuration.

    Args:
      choice: MODE or MODE:BACKBONE.
    """
    mode, _, backbone = choice.partition(":")
    chosen = lookup(MODES, mode, "way of training")
    backbone = backbone or "resnet20"
    config = lookup(BACKBONES, backbone, "backbone of this configuration").get_config()
    config.name = f"cifar10_{mode}_{backbone}"
    config.update(chosen)
    config.sites.kind = "pointwise"
    config.data.update({"flip": True, "shift": 4})
    steps = EPOCHS * EPOCH
    config.denoise.update({"train_steps": steps, "batch_size": 64, "learning_rate": 4e-4, "tokens": 1.0, "ema": 0.999})
    config.control.update({"steps": steps, "batch_size": 64, "learning_rate": 1e-4, "warmup": 100})
    config.alternate.update({"steps": steps, "period": EPOCH})
    config.evaluate.conditions = ("clean", "gaussian:20")
    return config
