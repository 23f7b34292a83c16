"""Layers that PyTorch stores in parts (pruned, normalized): read as it computes them, and fused files run there."""

import flax.linen as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")

from torch.nn.utils import prune

from drep_jax import weights
from drep_jax.errors import CheckpointError

pytestmark = pytest.mark.parity


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=1, name="conv")(x).mean((1, 2))
        return nn.Dense(5, name="head")(x)


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)


KINDS = {
    "pruned": (pruned, True),
    "weight norm": (torch.nn.utils.weight_norm, True),
    "weight norm over all": (lambda layer: torch.nn.utils.weight_norm(layer, dim=None), True),
    "weight norm of the inputs": (lambda layer: torch.nn.utils.weight_norm(layer, dim=1), True),
    "new weight norm": (torch.nn.utils.parametrizations.weight_norm, True),
    "spectral norm": (torch.nn.utils.spectral_norm, False),
    "new spectral norm": (torch.nn.utils.parametrizations.spectral_norm, False),
}
IMAGES = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)


def run(net, images):
    with torch.no_grad():
        return net.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_parts(kind, tmp_path):
    change, can_write = KINDS[kind]
    torch.manual_seed(0)
    net = TorchNet()
    for layer in (net.conv, net.head):
        change(layer)
    net.train()(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))  # spectral norm moves its vectors
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    checkpoint = weights.read(str(path), Net(), (6, 7))
    np.testing.assert_allclose(Net().apply(checkpoint.variables, IMAGES), run(net, IMAGES), rtol=1e-5, atol=1e-6)
    fused = {"params": {name: {**layer} for name, layer in checkpoint.variables["params"].items()}}
    rng = np.random.default_rng(1)
    fused["params"]["head"]["kernel"] = rng.normal(size=(4, 5)).astype(np.float32)
    fused["params"]["conv"]["kernel"] = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    out = str(tmp_path / "net_fused.pth")
    if not can_write:
        with pytest.raises(CheckpointError, match="spectral norm"):
            weights.write(out, fused, checkpoint)
        return
    weights.write(out, fused, checkpoint)
    net.load_state_dict(torch.load(out, weights_only=True))
    np.testing.assert_allclose(run(net, IMAGES), Net().apply(fused, IMAGES), rtol=1e-5, atol=1e-5)
