"""FCN against torchvision and SegFormer against transformers, with random weights and statistics, and files there and back."""

import pathlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install -r requirements-parity.txt")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-parity.txt")

from drep_jax import weights
from drep_jax.models import create_model, resize_bilinear
from tests.parity.mmseg_reference import MmsegFCN, MmsegSegFormer
from tests.parity.torch_side import draw_weights, fused, pictures, save_network
from tests.pixel_classifiers import abstract

pytestmark = pytest.mark.parity

SIZES = ((1, (64, 64)), (2, (97, 131)))


def torchvision_fcn():
    return torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=7, aux_loss=True
    )


def transformers_segformer(depths=(2, 2, 2, 2), widths=(32, 64, 160, 256)):
    options = {"depths": list(depths), "hidden_sizes": list(widths), "num_labels": 7}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**options))


# name: (their network, our model and its options, their logits at the head's own resolution, what is at most different)
NETWORKS = {
    "torchvision fcn_resnet50": (
        torchvision_fcn,
        ("fcn_resnet50", {}),
        lambda net, x: net.classifier(net.backbone(x)["out"]),
    ),
    "mmseg FCN R50": (lambda: MmsegFCN((3, 4, 6, 3), 7), ("fcn_r50", {}), lambda net, x: net(x)[0]),
    "transformers SegFormer b0": (
        transformers_segformer,
        ("segformer_b0", {"implementation": "transformers"}),
        lambda net, x: net(x).logits,
    ),
    "mmseg SegFormer b0": (lambda: MmsegSegFormer(7), ("segformer_b0", {}), lambda net, x: net(x)),
}


def pair(name, folder):
    make, (ours, options), logits = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    draw_weights(net)
    module = create_model(ours, num_classes=7, image_size=(64, 64), **options)
    path = save_network(net, folder / "net.pth")
    return net.eval(), module, weights.load_foreign(path, module, abstract(module)), logits


def run(net, logits, images):
    with torch.no_grad():
        maps = logits(net, torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    return maps.numpy().transpose(0, 2, 3, 1)


def check(name, got, expected, bound=1e-4):
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    print(f"\n{name} {got.shape}: max|Δ| / max|output| = {error:.1e}", end="")
    assert (
        got.shape == expected.shape and np.ptp(expected, axis=(1, 2)).min() > 0.01 * np.ptp(expected) and error < bound
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_logits(name, tmp_path):
    net, module, found, logits = pair(name, tmp_path)
    assert found.format.name == name.split()[0]
    for batch, size in SIZES:
        images = pictures(batch, size)
        check(name, np.asarray(jax.jit(module.apply)(found.variables, images)), run(net, logits, images))


def test_the_auxiliary_heads_of_fcn(tmp_path):
    """In training mode, where batch norms take the statistics of four images; in float64, since they amplify rounding."""
    makers = {"torchvision fcn_resnet50": ("aux_classifier", None), "mmseg FCN R50": (None, 1)}
    for name, (attribute, index) in makers.items():
        net, module, found, _ = pair(name, tmp_path)
        net.double().train()
        for part in net.modules():
            if isinstance(part, torch.nn.Dropout | torch.nn.Dropout2d):
                part.p = 0.0
        images = pictures(4, (64, 64)).astype(np.float64)

        def auxiliary(net, x, attribute=attribute, index=index):
            return net(x)[index] if attribute is None else getattr(net, attribute)(net.backbone(x)["aux"])

        expected = run(net, auxiliary, images)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found.variables)
            plain = module.clone(dropout=0.0, dtype="float64", param_dtype="float64")
            outputs, _ = jax.jit(lambda v, x, m=plain: m.apply(v, x, train=True, mutable=["batch_stats"]))(wide, images)
        check(f"{name}, auxiliary", np.asarray(outputs[1]), expected, 1e-9)


def test_files_go_there_and_back_to_the_bit(tmp_path):
    for name in ("torchvision fcn_resnet50", "mmseg FCN R50", "mmseg SegFormer b0", "transformers SegFormer b0"):
        net, module, found, _ = pair(name, tmp_path)
        path = weights.write_new(module, found.variables, found.format.name, str(tmp_path / "back"), {})
        expected = {key: tensor for key, tensor in net.state_dict().items() if "num_batches" not in key}
        if path.endswith(".pth"):
            again = torch.load(path, weights_only=True)
            assert again.keys() == expected.keys()
        else:
            again = transformers_segformer()
            again.load_state_dict(net.state_dict())
            folder = tmp_path / "hub"
            again.config.save_pretrained(folder)
            (folder / "model.safetensors").write_bytes(pathlib.Path(path).read_bytes())
            again = transformers.SegformerForSemanticSegmentation.from_pretrained(folder).state_dict()
        for key, tensor in expected.items():
            assert torch.equal(again[key], tensor), key


def test_files_of_transformers_with_old_and_new_names(tmp_path):
    net, module, found, _ = pair("transformers SegFormer b0", tmp_path)
    net.save_pretrained(tmp_path / "hub")
    saved = weights.load_foreign(str(tmp_path / "hub" / "model.safetensors"), module, abstract(module))
    assert saved.source.tensors.keys() != found.source.tensors.keys()  # old names there, those in memory here
    for one, other in zip(jax.tree.leaves(saved.variables), jax.tree.leaves(found.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_fused_file_gives_transformers_our_fused_outputs(tmp_path):
    net, module, _, logits = pair("transformers SegFormer b0", tmp_path)
    net.save_pretrained(tmp_path / "hub")
    path = str(tmp_path / "hub" / "model.safetensors")
    found = weights.load_foreign(path, module, abstract(module))
    after = fused(module, found.variables, (64, 64), r".*(mlp/fc\d|query|key|value|sr|patch_embed\d|classifier)")
    weights.write_back(found, str(tmp_path / "fused.safetensors"), found.variables, after, {"rule": "ddpm"})
    images = pictures(2, (97, 131))
    before = run(net, logits, images)
    (tmp_path / "hub" / "model.safetensors").write_bytes((tmp_path / "fused.safetensors").read_bytes())
    again = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "hub").eval()
    expected = run(again, logits, images)
    assert np.abs(expected - before).max() > 0.01 * np.abs(before).max()
    check("SegFormer b0 fused", np.asarray(jax.jit(module.apply)(after, images)), expected)


@pytest.mark.parametrize("size", [(12, 20), (13, 7), (5, 9), (3, 4), (29, 31)])
def test_resizing_is_pytorch_s(size):
    images = pictures(2, (6, 10))
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), size=size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resize_bilinear(images, size), theirs.numpy().transpose(0, 2, 3, 1), atol=3e-6)
