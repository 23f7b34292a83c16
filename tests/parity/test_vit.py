"""ViTs against timm, with random weights: outputs, resized positions, files there and back, Google's .npz as timm reads it."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
timm = pytest.importorskip("timm", reason="needs timm: pip install -r requirements-parity.txt")

from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from drep_jax import weights
from drep_jax.models import create_model
from drep_jax.weights import positions
from drep_jax.weights.formats.timm_vit import TIMM_VIT
from drep_jax.weights.formats.vision_transformer import BIG_VISION, VISION_TRANSFORMER
from tests.named_weights import named_weights
from tests.parity.torch_side import check_outputs, draw_weights, fused, outputs, save_network
from tests.weights.vit_cases import CASES, GOLDEN, TIMM_COMMON, foreign_shapes, images, load, save, tiny

pytestmark = pytest.mark.parity

REGISTERS = {"position_class_token": False}
AVERAGE = {"global_pool": "avg"}
# name: (timm's network, its options, our model, its options, image sizes)
NETWORKS = {
    "ViT-S/16": ("vit_small_patch16_224", {}, "vit_s16", {}, ((224, 224), (256, 128))),
    "ViT-B/16": ("vit_base_patch16_224", {}, "vit_b16", {}, ((224, 224), (256, 128))),
    "ViT-S/16, mean": ("vit_small_patch16_224", AVERAGE, "vit_s16", {"pool": "mean"}, ((224, 224), (64, 96))),
    "DINOv2 S/14": ("vit_small_patch14_dinov2", {}, "dinov2_s14", {}, ((224, 224), (56, 112))),
    "DINOv2 S/14, registers": (
        "vit_small_patch14_reg4_dinov2",
        {},
        "dinov2_s14_reg",
        REGISTERS,
        ((224, 224), (56, 112)),
    ),
}


def pair(name, size, folder):
    """timm's network, our module, and what was read of timm's file."""
    theirs, their_options, ours, our_options, _ = NETWORKS[name]
    net = timm.create_model(theirs, img_size=size, num_classes=1000, **their_options)
    draw_weights(net)
    module = create_model(ours, num_classes=1000, image_size=size, **our_options)
    return net, module, load(save_network(net, folder / "net.pth"), module, size)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("which", [0, 1])
def test_features_and_logits(name, which, tmp_path):
    size = NETWORKS[name][-1][which]
    net, module, found = pair(name, size, tmp_path)
    for batch in (1, 3):
        check_outputs(name, module, found.variables, net, batch, size)


def test_positions_of_224_pixels_resized_to_256_by_128(tmp_path):
    source, _, _ = pair("ViT-S/16", (224, 224), tmp_path)
    size = (256, 128)
    net = timm.create_model("vit_small_patch16_224", img_size=size, num_classes=1000)
    net.load_state_dict(checkpoint_filter_fn(source.state_dict(), net))
    module = create_model("vit_s16", num_classes=1000, image_size=size)
    found = load(tmp_path / "net.pth", module, size, grid=(14, 14))
    assert any("from 14×14 to 16×8" in note for note in found.notes)
    np.testing.assert_allclose(
        found.variables["params"]["pos_embedding"], net.state_dict()["pos_embed"].numpy(), atol=1e-6
    )
    check_outputs("ViT-S/16 resized", module, found.variables, net, 3, size)


@pytest.mark.parametrize("old", [(37, 37), (14, 14), (16, 8)])
@pytest.mark.parametrize("new", [(16, 16), (16, 8), (21, 10), (24, 40)])
def test_interpolations_are_those_of_torch(old, new):
    given = np.random.default_rng(0).normal(size=(1, old[0] * old[1], 5))
    grid = torch.from_numpy(given.reshape(1, *old, 5).transpose(0, 3, 1, 2).copy())
    interpolate = torch.nn.functional.interpolate
    scale = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
    for ours, theirs in (
        (positions.TIMM, interpolate(grid, size=new, mode="bicubic", antialias=True)),
        (positions.DINOV2, interpolate(grid, scale_factor=scale, mode="bicubic")),
        (positions.TRANSREID, interpolate(grid, size=new, mode="bilinear", align_corners=False)),
    ):
        got = positions.resize(positions.Positions("p", 0, new, ours), given, old)
        expected = theirs.numpy()[0].transpose(1, 2, 0).reshape(got.shape)
        np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=ours.name)


def test_files_go_there_and_back_to_the_bit(tmp_path):
    net, module, found = pair("DINOv2 S/14, registers", (56, 112), tmp_path)
    path = weights.write_new(module, found.variables, "timm", str(tmp_path / "back"), {})
    again = torch.load(path, weights_only=True)
    assert again.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_a_fused_file_gives_timm_our_fused_outputs(tmp_path):
    size = (64, 96)
    net, module, found = pair("ViT-S/16, mean", size, tmp_path)
    after = fused(module, found.variables, size, r".*/(attn/(query|key|value)|mlp/fc[12])")
    changed = weights.write_back(found, str(tmp_path / "fused.pth"), found.variables, after, {"rule": "ddpm"})
    assert len(changed) == 12 * 3 * 2
    before = outputs(net, images(size))[1]
    net.load_state_dict(torch.load(tmp_path / "fused.pth", weights_only=True)["state_dict"])
    assert np.abs(outputs(net, images(size))[1] - before).max() > 0.01
    check_outputs("ViT-S/16 fused", module, after, net, 3, size)


@pytest.mark.parametrize("name", CASES)
def test_stored_outputs_are_those_of_timm(name):
    net = VisionTransformer(**TIMM_COMMON, num_classes=5, **CASES[name][1]).eval()
    shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    assert shapes == foreign_shapes(TIMM_VIT, tiny(**CASES[name][0]))
    net.load_state_dict({key: torch.from_numpy(array) for key, array in named_weights(shapes, spread=0.5).items()})
    _, logits = outputs(net, images())
    print("\n", name, [[round(float(x), 5) for x in row] for row in logits])
    np.testing.assert_allclose(logits, GOLDEN[name], atol=2e-5)


@pytest.mark.parametrize(
    ("fmt", "ours", "theirs"),
    [
        (VISION_TRANSFORMER, {}, {}),
        (
            BIG_VISION,
            {"pool": "gap", "class_token": False},
            {"global_pool": "avg", "fc_norm": False, "class_token": False},
        ),
    ],
    ids=["vision_transformer", "big_vision"],
)
def test_npz_of_google_is_read_as_timm_reads_it(fmt, ours, theirs, tmp_path):
    module = tiny(activation="gelu_tanh", **ours)
    path = save(tmp_path / "net.npz", named_weights(foreign_shapes(fmt, module), spread=0.5))
    net = VisionTransformer(**TIMM_COMMON, num_classes=5, act_layer="gelu_tanh", **theirs)
    net.load_pretrained(str(path))
    found = load(path, module)
    _, expected = outputs(net, images())
    np.testing.assert_allclose(jax.jit(module.apply)(found.variables, images()), expected, atol=2e-5)
