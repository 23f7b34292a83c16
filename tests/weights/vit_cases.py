"""Small ViTs as timm and as we call them: default tests compare ours with stored outputs of timm, parity tests make these."""

import jax
import numpy as np
import safetensors.numpy

from drep_jax.models import create_model
from drep_jax.weights import load_foreign
from drep_jax.weights.native import names_of
from drep_jax.weights.translation import find_pieces, put_back
from tests.named_weights import named_weights

SIZE = (16, 24)
COMMON = {"patch_size": 8, "width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 24}
TIMM_COMMON = {"img_size": SIZE, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
# name: (our options, timm's options)
CASES = {
    "class_token": ({}, {}),
    "mean": ({"pool": "mean"}, {"global_pool": "avg"}),
    "gap": (
        {"pool": "gap", "class_token": False, "qkv_bias": False},
        {"global_pool": "avg", "fc_norm": False, "class_token": False, "qkv_bias": False},
    ),
    "registers": (
        {"registers": 4, "position_class_token": False, "layer_scale": True},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    ),
}
# Logits of timm 1.0.31 for two images; `pytest -m parity tests/parity/test_vit.py` compares timm with them.
GOLDEN = {
    "class_token": [[1.25337, 1.5693, -2.12137, 0.82273, 0.38502], [2.45072, 1.43047, -1.63503, 0.58295, 0.62645]],
    "mean": [[0.66421, 2.59609, -0.72048, -1.45993, 1.06853], [-0.13751, 1.26305, -0.12053, -0.20068, 0.07828]],
    "gap": [[0.3938, 1.43944, 0.12351, -0.67022, 0.31282], [0.01395, 0.54362, 0.30173, 0.00883, -0.38515]],
    "registers": [[0.67998, 1.60608, -0.05646, -0.67163, -0.51038], [-0.12962, 1.16606, 1.00108, -1.02194, -0.58371]],
}


def images(size=SIZE, batch=2):
    return np.random.default_rng(7).normal(size=(batch, *size, 3)).astype(np.float32)


def tiny(num_classes=5, size=SIZE, **options):
    return create_model("vit", num_classes=num_classes, image_size=size, **{**COMMON, **options})


def abstract(module, size=SIZE):
    """Shapes of a module's variables."""
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *size, 3), np.float32))


def foreign_shapes(fmt, module, size=SIZE):
    """{foreign name: shape} that a file of this module has."""
    zeros = {name: np.zeros(leaf.shape, np.float32) for name, leaf in names_of(abstract(module, size)).items()}
    pieces = find_pieces(fmt, module, {name: array.shape for name, array in zeros.items()})
    return {name: array.shape for name, array in put_back(pieces, zeros).items()}


def foreign_weights(fmt, module, size=SIZE):
    """{foreign name: array} at random, by the names."""
    return named_weights(foreign_shapes(fmt, module, size), spread=0.5)


def load(path, module, size=SIZE, **options):
    return load_foreign(str(path), module, abstract(module, size), **options)


def save(path, tensors):
    """A file as others write it, by its suffix .safetensors or .npz."""
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    if str(path).endswith(".npz"):
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, str(path))
    return path
