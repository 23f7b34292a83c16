"""Small SwinV2s as timm and as we call them: default tests compare with stored outputs of timm, parity tests with timm."""

import jax
import numpy as np

from drep_jax.models import create_model
from drep_jax.weights.native import names_of
from drep_jax.weights.translation import find_pieces, put_back
from tests.named_weights import named_weights

SIZE = (16, 24)
COMMON = {"patch_size": 2, "width": 8, "depths": (2, 2), "num_heads": (2, 4)}
TIMM_COMMON = {"img_size": SIZE, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
# name: (our options, timm's options). The feature maps are 8×12 and 4×6.
CASES = {
    "shifted": ({"window_size": (4, 6)}, {"window_size": (4, 6)}),
    "one_side_shifted": ({"window_size": (8, 3)}, {"window_size": (8, 3)}),
    "whole": (
        {"window_size": 12, "pretrained_window_sizes": (6, 3), "qkv_bias": False, "mlp_ratio": 2.0},
        {"window_size": 12, "pretrained_window_sizes": (6, 3), "qkv_bias": False, "mlp_ratio": 2.0},
    ),
}
# Logits of timm 1.0.31 for two images; `pytest -m parity tests/parity/test_swinv2.py` compares timm with them.
GOLDEN = {
    "shifted": [[-0.12985, -0.15024, 0.21954, -0.82984, 0.10494], [-0.19783, 0.41552, 0.34818, -0.77757, 0.35381]],
    "one_side_shifted": [
        [0.01401, 0.22692, 0.31914, -0.80032, -0.02259],
        [-0.07227, 0.08689, 0.51815, -0.82145, 0.23756],
    ],
    "whole": [[-0.36907, 0.2501, 0.27576, -0.35738, 0.72648], [-0.69056, 0.20398, 0.4256, 0.1239, 0.51852]],
}


def images(size=SIZE, batch=2):
    return np.random.default_rng(7).normal(size=(batch, *size, 3)).astype(np.float32)


def tiny(num_classes=5, size=SIZE, **options):
    return create_model(
        "swinv2", num_classes=num_classes, image_size=size, **{**COMMON, "window_size": (4, 6), **options}
    )


def abstract(module):
    """Shapes of a module's variables."""
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *module.image_size, 3), np.float32))


def foreign_shapes(fmt, module):
    """{foreign name: shape} that a file of this module has."""
    zeros = {name: np.zeros(leaf.shape, np.float32) for name, leaf in names_of(abstract(module)).items()}
    pieces = find_pieces(fmt, module, {name: array.shape for name, array in zeros.items()})
    return {name: array.shape for name, array in put_back(pieces, zeros).items()}


def swin_weights(shapes):
    """{foreign name: array} at random, by timm's names; scales of the scores below and above their bound of 100."""
    drawn = named_weights(shapes, spread="fan_in")
    return {n: 3.5 + 10 * a if n.endswith("logit_scale") else a for n, a in drawn.items()}
