"""VMamba against its authors' PyTorch code; needs torch and VMAMBA_REFERENCE (see `tests.parity.vmamba_reference`)."""

import os

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from drep_jax.models import create_model
from drep_jax.weights import load_foreign, write_back
from drep_jax.weights.formats.vmamba import VMAMBA
from drep_jax.weights.translation import account, find_pieces, put_back
from tests.named_weights import named_weights

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
if "VMAMBA_REFERENCE" not in os.environ:
    pytest.skip("needs a checkout of github.com/MzeroMiko/VMamba in VMAMBA_REFERENCE", allow_module_level=True)

from tests.parity import vmamba_reference as reference

pytestmark = pytest.mark.parity
CONFIG = {"depths": (1, 2), "width": 16, "ssm_ratio": 2.0, "num_classes": 5}
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


class CfgNode(dict):
    """Stands for the configuration that the authors' training script pickles into its checkpoints."""


def test_a_training_checkpoint_is_read_and_written_back_for_the_authors_code(tmp_path):
    net = reference.make_reference(reference.load_reference(os.environ["VMAMBA_REFERENCE"]), **CONFIG)
    net.load_state_dict({n: torch.from_numpy(a) for n, a in named_weights(reference.shapes_of(net)).items()})
    config = CfgNode(MODEL=CfgNode(TYPE="vssm"))
    config.frozen = True
    torch.save({"model": net.state_dict(), "epoch": 264, "config": config}, tmp_path / "ckpt_epoch_264.pth")

    module = create_model("vmamba", image_size=(40, 40), **CONFIG)
    images = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    like = jax.eval_shape(module.init, jax.random.key(0), images)
    foreign = load_foreign(str(tmp_path / "ckpt_epoch_264.pth"), module, like)
    changed = flatten_dict(foreign.variables, sep="/")
    for name in ("layer1_0/ss2d/x_proj/kernel", "layer2_1/ss2d/dt_proj_2/bias", "layer2_0/mlp/fc1/kernel"):
        changed[f"params/{name}"] = np.float32(1.25) * changed[f"params/{name}"]
    after = unflatten_dict(changed, sep="/")
    written = write_back(foreign, str(tmp_path / "fused.pth"), foreign.variables, after, {})
    assert written == (
        "layers.0.blocks.0.op.x_proj_weight",
        "layers.1.blocks.0.mlp.fc1.weight",
        "layers.1.blocks.1.op.dt_projs_bias",
    )

    file = torch.load(tmp_path / "fused.pth", weights_only=False)
    assert (file["epoch"], file["config"], file["config"].frozen) == (264, config, True)
    tensors = {name: tensor.numpy() for name, tensor in file["model"].items()}
    _, expected = reference.run_reference(net, tensors, images)
    got = np.asarray(jax.jit(module.apply)(after, images))
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(got - np.asarray(jax.jit(module.apply)(foreign.variables, images))).max() > 1e-3
