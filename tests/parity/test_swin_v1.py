"""Swin, first version, against timm with every parameter at random: features, logits, and files there and back."""

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
timm = pytest.importorskip("timm", reason="needs timm: pip install -r requirements-parity.txt")

import jax
import numpy as np

from drep_jax import weights
from drep_jax.models import create_model
from tests.models.detectors.networks import abstract
from tests.parity.torch_side import draw_weights, pictures, save_network

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # what PyTorch warns of is not ours to mend


@pytest.mark.parametrize(("name", "size"), [("t", (224, 224)), ("t", (224, 448)), ("s", (224, 224))])
def test_features_logits_and_files(name, size, tmp_path):
    theirs = {"t": "swin_tiny_patch4_window7_224", "s": "swin_small_patch4_window7_224"}[name]
    net = timm.create_model(theirs, img_size=size, num_classes=9).eval()
    draw_weights(net)
    module = create_model(f"swin_{name}", num_classes=9, image_size=size)
    found = weights.load_foreign(save_network(net, tmp_path / "net.pth"), module, abstract(module, size))
    assert found.format.name == "timm"
    images = pictures(2, size)
    with torch.inference_mode():
        maps = net.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected = [net.forward_head(maps, pre_logits=True).numpy(), net.forward_head(maps).numpy()]
    headless = {"params": {key: leaf for key, leaf in found.variables["params"].items() if key != "head"}}
    got = [
        jax.jit(module.clone(num_classes=0).apply)(headless, images),
        jax.jit(module.apply)(found.variables, images),
    ]
    for kind, one, other in zip(("features", "logits"), got, expected, strict=True):
        error = float(np.abs(one - other).max() / np.abs(other).max())
        print(f"\nswin_{name} {size} {kind}: max|Δ| / max|output| = {error:.1e}", end="")
        assert np.ptp(other) > 0.1 and error < 1e-4
    path = weights.write_new(module, found.variables, "timm", str(tmp_path / "back"), {})
    again = torch.load(path, weights_only=True)
    kept = {key: tensor for key, tensor in net.state_dict().items() if not key.endswith("relative_position_index")}
    assert again.keys() == kept.keys()
    for key, tensor in kept.items():
        assert torch.equal(again[key], tensor), key
