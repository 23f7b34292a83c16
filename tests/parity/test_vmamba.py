"""VMamba against its authors' PyTorch code; needs torch and VMAMBA_REFERENCE (see `tests.parity.vmamba_reference`)."""

import os

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from drep_jax.models import create_model
from drep_jax.weights.formats.vmamba import VMAMBA
from drep_jax.weights.translation import account, find_pieces, put_back
from tests.named_weights import named_weights

pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
if "VMAMBA_REFERENCE" not in os.environ:
    pytest.skip("needs a checkout of github.com/MzeroMiko/VMamba in VMAMBA_REFERENCE", allow_module_level=True)

from tests.parity import vmamba_reference as reference

pytestmark = pytest.mark.parity
FACTORIES = {"vmamba_t": "vmamba_tiny_s1l8", "vmamba_s": "vmamba_small_s2l15", "vmamba_b": "vmamba_base_s2l15"}


@pytest.fixture(scope="module")
def pair():
    """name ↦ (their network, their tensors at random), made once."""
    module, made = reference.load_reference(os.environ["VMAMBA_REFERENCE"]), {}

    def make(name):
        if name not in made:
            net = getattr(module, FACTORIES[name])().eval()
            made.clear()
            made[name] = net, named_weights(reference.shapes_of(net), spread=0.1)
        return made[name]

    return make


def read(name, num_classes, size, tensors):
    """Our module, its variables read from theirs, and the places of these."""
    module = create_model(name, num_classes=num_classes, image_size=size)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *size, 3), np.float32))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}
    pieces = find_pieces(VMAMBA, module, shapes)
    found = account(pieces, shapes, tensors, VMAMBA.ignored)
    assert not found.missing and not found.shaped
    assert not found.unexpected or num_classes == 0
    return module, unflatten_dict(found.arrays, sep="/"), pieces, found.arrays


@pytest.mark.parametrize(
    ("name", "batch", "size"),
    [(name, *case) for name in FACTORIES for case in ((1, (64, 64)), (3, (96, 64)))] + [("vmamba_t", 1, (224, 224))],
)
def test_features_and_logits(pair, name, batch, size):
    net, tensors = pair(name)
    images = np.random.default_rng(batch).normal(size=(batch, *size, 3)).astype(np.float32)
    for num_classes, expected in zip((0, 1000), reference.run_reference(net, tensors, images), strict=True):
        module, variables, _, _ = read(name, num_classes, size, tensors)
        got = np.asarray(jax.jit(module.apply)(variables, images))
        error = np.abs(got - expected).max() / np.abs(expected).max()
        print(f"{name} {batch} {size} classes {num_classes}: max|Δ| / max|output| = {error:.1e}")
        assert np.ptp(expected) > 0.1 and error < 1e-4


@pytest.mark.parametrize("name", FACTORIES)
def test_import_then_export_is_the_same_to_the_bit(pair, name):
    _, tensors = pair(name)
    _, _, pieces, arrays = read(name, 1000, (64, 64), tensors)
    back = put_back(pieces, arrays)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, strict=True, err_msg=key)
