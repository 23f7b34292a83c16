"""DETR against transformers; ATSS, CenterNet-update and YOLOv3 against plain PyTorch: outputs, what is found, and files."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
pytest.importorskip("torchvision", reason="needs torchvision: pip install -r requirements-parity.txt")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-parity.txt")

from scipy.optimize import linear_sum_assignment

from drep_jax import weights
from drep_jax.models import create_model
from tests.models.detectors.networks import abstract
from tests.parity import mmdet_reference
from tests.parity.torch_side import draw_weights, fused, pictures, save_network

pytestmark = pytest.mark.parity

# Padded shape, and the sizes of the two images in it.
SIZES = (((128, 160), ((128, 160), (97, 131))), ((224, 192), ((150, 192), (224, 101))))
REFERENCES = {
    "atss_r50": (mmdet_reference.ATSS, (3, 4, 6, 3)),
    "centernet_r50": (mmdet_reference.CenterNet, (3, 4, 6, 3)),
    "yolov3_d53": (mmdet_reference.YOLOv3, (1, 2, 8, 8, 4)),
}


def to_torch(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def error(got, expected):
    assert got.shape == expected.shape and np.ptp(expected) > 0
    value = float(np.abs(got - expected).max() / np.abs(expected).max())
    print(f"\n{got.shape}: max|Δ| / max|output| = {value:.1e}", end="")
    return value


def padded(shape, sizes):
    images = pictures(len(sizes), shape)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[height:] = 0
        image[:, width:] = 0
    return images


def same_objects(found, expected, side, distinct=True):
    """Boxes, scores and classes of one image, to a ten-thousandth; equal scores may stand in another order."""
    boxes, scores, classes = (a.numpy() for a in expected)
    valid = np.asarray(found.valid)
    assert valid.sum() == len(scores) > 10
    assert not distinct or (np.ptp(scores) > 1e-4 and (scores == scores.max()).sum() < 5)
    np.testing.assert_allclose(np.asarray(found.scores)[valid], scores, atol=1e-4)
    ours = [np.asarray(leaf)[valid] for leaf in (found.boxes, found.scores, found.classes)]
    differences = np.maximum(
        np.abs(ours[0][:, None] - boxes[None]).max(-1) / np.maximum(side, np.abs(boxes).max(-1))[None],
        np.where(ours[2][:, None] == classes[None], np.abs(ours[1][:, None] - scores[None]), np.inf),
    )
    rows, columns = linear_sum_assignment(np.minimum(differences, 1e3))
    print(f"\n{len(scores)} objects: largest difference {differences[rows, columns].max():.1e}", end="")
    assert differences[rows, columns].max() < 1e-4


LAST = re.compile(r".*(convs_pred\.\d|atss_\w+|conv_cls|conv_reg|fc_cls|fc_reg)")


def spread_out(net, run):
    """Scales the last layers such that outputs of a random network differ from place to place, and so do scores."""
    handles, seen = [], {}
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm) and module.weight.abs().mean() < 0.5:
            module.weight.data += 1  # drawn around 0: signals would die out

    def remember(module, _, output):
        places = output.movedim(1, -1) if output.ndim == 4 else output
        seen.setdefault(module, []).append(places.reshape(-1, places.shape[-1]))

    for name, module in net.named_modules():
        if LAST.fullmatch(name):
            handles.append(module.register_forward_hook(remember))
    with torch.no_grad():
        run(to_torch(pictures(2, (128, 160))))
        for module, outputs in seen.items():
            module.weight *= min(1.5 / torch.cat(outputs).std(0).mean().item(), 30.0)
    for handle in handles:
        handle.remove()
    assert seen


@pytest.mark.parametrize("name", REFERENCES)
def test_dense_detectors(name, tmp_path):
    """Outputs of a batch with padding, and the objects of each image."""
    kind, depths = REFERENCES[name]
    torch.manual_seed(0)
    net = kind(depths, 7)
    draw_weights(net)
    net.eval()
    spread_out(net, net)
    module = create_model(name, num_classes=7, image_size=(64, 64))
    found = weights.load_foreign(save_network(net, tmp_path / "net.pth"), module, abstract(module))
    assert found.format.name == "mmdet"
    run = jax.jit(
        lambda v, x, size: (lambda y: (y, module.objects(y, x.shape[1:3], size)))(module.apply(v, x, size=size))
    )
    for shape, sizes in SIZES:
        images = padded(shape, sizes)
        theirs = to_torch(images[..., ::-1] if name == "centernet_r50" else images)  # BGR
        with torch.no_grad():
            expected = net(theirs)
            objects = [net.detect(theirs[i : i + 1], size) for i, size in enumerate(sizes)]
        outputs, ours = run(found.variables, images, jnp.asarray(sizes, jnp.float32))
        # Theirs are levels of parts, ours parts of levels.
        parts = [expected] if isinstance(expected[0], torch.Tensor) else list(zip(*expected, strict=True))
        for got, maps in zip(jax.tree.leaves(outputs), [m for part in parts for m in part], strict=True):
            got, wanted = np.asarray(got), maps.numpy().transpose(0, 2, 3, 1)
            assert error(got, wanted) < 1e-4, (name, wanted.shape)
        for i in range(len(sizes)):
            same_objects(jax.tree.map(lambda leaf, i=i: leaf[i], ours), objects[i], shape[0])


def transformers_detr(own_trunk, queries=30):
    options = {"num_queries": queries, "num_labels": 11, "use_pretrained_backbone": False}
    if own_trunk:
        trunk = transformers.ResNetConfig(depths=[3, 4, 6, 3], out_features=["stage4"])
        options |= {"use_timm_backbone": False, "backbone": None, "backbone_config": trunk}
    else:
        options |= {"use_timm_backbone": True, "backbone": "resnet50", "backbone_config": None}
    return transformers.DetrForObjectDetection(transformers.DetrConfig(**options)).eval()


def detr_pair(own_trunk, folder):
    torch.manual_seed(0)
    net = transformers_detr(own_trunk)
    draw_weights(net)
    module = create_model(
        "detr_r50", num_classes=11, image_size=(64, 64), num_queries=30, implementation="facebookresearch"
    )
    net.save_pretrained(folder / "hub")
    return net, module, weights.load_foreign(str(folder / "hub" / "model.safetensors"), module, abstract(module))


def transformers_outputs(net, images, sizes):
    mask = torch.zeros(images.shape[:3], dtype=torch.long)
    for row, (height, width) in zip(mask, sizes, strict=True):
        row[:height, :width] = 1
    with torch.no_grad():
        outputs = net(pixel_values=to_torch(images), pixel_mask=mask)
    return outputs.logits, outputs.pred_boxes


@pytest.mark.parametrize("own_trunk", [False, True])
def test_detr(own_trunk, tmp_path):
    net, module, found = detr_pair(own_trunk, tmp_path)
    assert found.format.name == "transformers"
    run = jax.jit(
        lambda v, x, size: (lambda y: (y, module.objects(y, x.shape[1:3], size)))(module.apply(v, x, size=size))
    )
    for shape, sizes in SIZES:
        images = padded(shape, sizes)
        logits, boxes = transformers_outputs(net, images, sizes)
        outputs, ours = run(found.variables, images, jnp.asarray(sizes, jnp.float32))
        for got, wanted in ((outputs.logits, logits), (outputs.boxes, boxes)):
            assert error(np.asarray(got)[:, 0], wanted.numpy()) < 1e-4
        for i, (height, width) in enumerate(sizes):
            # As transformers' post-processing: softmax, best class of each query but the last, boxes of the image's size.
            scores, labels = logits[i].softmax(-1)[:, :-1].max(-1)
            cx, cy, w, h = (boxes[i] * torch.tensor([width, height, width, height])).unbind(1)
            corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
            order = scores.argsort(descending=True, stable=True)
            expected = (corners[order], scores[order], labels[order])
            # The queries of a random network predict nearly the same.
            same_objects(jax.tree.map(lambda leaf, i=i: leaf[i], ours), expected, height, distinct=False)


def test_a_fused_file_gives_transformers_our_fused_outputs(tmp_path):
    net, module, found = detr_pair(False, tmp_path)
    after = fused(module, found.variables, (64, 64), r".*(mlp/fc\d|query|key|value|out|class_embed)")
    weights.write_back(found, str(tmp_path / "fused.safetensors"), found.variables, after, {"rule": "ddpm"})
    shape, sizes = SIZES[0]
    images = padded(shape, sizes)
    before = transformers_outputs(net, images, sizes)[0].numpy()
    (tmp_path / "hub" / "model.safetensors").write_bytes((tmp_path / "fused.safetensors").read_bytes())
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "hub").eval()
    expected = transformers_outputs(again, images, sizes)[0].numpy()
    assert error(before, expected) > 0.01
    outputs = jax.jit(lambda v, x, size: module.apply(v, x, size=size))(after, images, jnp.asarray(sizes, jnp.float32))
    assert error(np.asarray(outputs.logits)[:, 0], expected) < 1e-4


@pytest.mark.parametrize("name", [*REFERENCES, "detr_r50"])
def test_files_go_there_and_back_to_the_bit(name, tmp_path):
    if name == "detr_r50":
        net, module, found = detr_pair(False, tmp_path)
    else:
        net = REFERENCES[name][0](REFERENCES[name][1], 7)
        module = create_model(name, num_classes=7, image_size=(64, 64))
        found = weights.load_foreign(save_network(net, tmp_path / "net.pth"), module, abstract(module))
    path = weights.write_new(module, found.variables, found.format.name, str(tmp_path / "back"), {})
    expected = {key: tensor for key, tensor in net.state_dict().items() if "num_batches" not in key}
    if path.endswith(".pth"):
        again = torch.load(path, weights_only=True)
    else:
        (tmp_path / "hub" / "model.safetensors").write_bytes(pathlib.Path(path).read_bytes())
        again = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "hub").state_dict()
    assert again.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(again[key], tensor) and again[key].shape == tensor.shape, key
