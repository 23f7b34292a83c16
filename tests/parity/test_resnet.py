"""ResNets against timm and torchvision, with random weights and running statistics: outputs, files there and back."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
timm = pytest.importorskip("timm", reason="needs timm: pip install -r requirements-parity.txt")
torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install -r requirements-parity.txt")

from drep_jax import weights
from drep_jax.models import create_model
from tests.parity.torch_side import check_outputs, draw_weights, fused, outputs, pictures, save_network
from tests.weights.vit_cases import load

pytestmark = pytest.mark.parity


def last_stride_1():
    """torchvision's ResNet-50 as person re-identification changes it."""
    net = torchvision.models.resnet50()
    net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (1, 1)
    return net


# name: (their network, our model, its options)
NETWORKS = {
    "timm resnet50": (lambda: timm.create_model("resnet50"), "resnet50", {}),
    "timm resnet101": (lambda: timm.create_model("resnet101"), "resnet101", {}),
    "torchvision resnet50": (torchvision.models.resnet50, "resnet50", {}),
    "torchvision resnet18": (torchvision.models.resnet18, "resnet18", {}),
    "torchvision resnet50, last stride 1": (last_stride_1, "resnet50", {"last_stride": 1}),
}


def pair(name, size, folder):
    make, ours, options = NETWORKS[name]
    net = make()
    draw_weights(net)
    module = create_model(ours, num_classes=1000, image_size=size, **options)
    return net, module, load(save_network(net, folder / "net.pth"), module, size)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_and_logits(name, tmp_path):
    for batch, size in ((1, (224, 224)), (3, (160, 96))):
        net, module, found = pair(name, size, tmp_path)
        assert found.format.name == "torchvision"
        check_outputs(name, module, found.variables, net, batch, size)


def test_files_go_there_and_back_to_the_bit(tmp_path):
    net, module, found = pair("timm resnet50", (64, 64), tmp_path)
    path = weights.write_new(module, found.variables, "timm", str(tmp_path / "back"), {})
    again = torch.load(path, weights_only=True)
    expected = {name: tensor for name, tensor in net.state_dict().items() if "num_batches" not in name}
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name


def test_a_fused_file_gives_torchvision_our_fused_outputs(tmp_path):
    size = (64, 96)
    net, module, found = pair("torchvision resnet50", size, tmp_path)
    # Batch norm takes no constant of a convolution without bias, so these denoisers have none.
    after = fused(module, found.variables, size, r"conv1|layer[12]_\d/conv[12]|fc")
    weights.write_back(found, str(tmp_path / "fused.pth"), found.variables, after, {"rule": "ddpm"})
    before = outputs(net, pictures(3, size))[1]
    net.load_state_dict(torch.load(tmp_path / "fused.pth", weights_only=True)["state_dict"])
    assert np.abs(outputs(net, pictures(3, size))[1] - before).max() > 0.01
    check_outputs("ResNet-50 fused", module, after, net, 3, size)
