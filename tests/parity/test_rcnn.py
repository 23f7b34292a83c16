"""R-CNNs against torchvision's with random weights: raw heads, proposals, final detections and masks, losses, files."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install -r requirements-parity.txt")

from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss

from drep_jax import weights
from drep_jax.models import create_model
from drep_jax.models.detectors.base import Targets
from tests.models.detectors.networks import abstract
from tests.parity.torch_side import draw_weights, save_network

pytestmark = pytest.mark.parity

SIZE = (128, 160)
UNPADDED = ((120, 160), (128, 131))
MAKERS = {"fasterrcnn_resnet50_fpn": fasterrcnn_resnet50_fpn, "maskrcnn_resnet50_fpn": maskrcnn_resnet50_fpn}


def pair(name, folder, **options):
    torch.manual_seed(0)
    net = MAKERS[name](weights=None, weights_backbone=None, num_classes=8, **options).eval()
    draw_weights(net)
    with torch.no_grad():
        # Boxes that move and scores that differ: at random weights nothing would be above a threshold.
        net.rpn.head.bbox_pred.weight *= 0.2
        net.roi_heads.box_predictor.cls_score.weight *= 4
        net.roi_heads.box_predictor.bbox_pred.weight *= 2
    module = create_model(name, num_classes=7, image_size=SIZE, norm_eps=1e-5)
    path = save_network(net, folder / "net.pth")
    return net, module, weights.load_foreign(path, module, abstract(module))


def batch():
    images = np.random.default_rng(0).normal(size=(2, *SIZE, 3)).astype(np.float32)
    for image, (height, width) in zip(images, UNPADDED, strict=True):
        image[height:], image[:, width:] = 0, 0
    return images, np.asarray(UNPADDED, np.float32)


def to_torch(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@torch.no_grad()
def theirs(net, images):
    """Everything that their network computes on images that are normalized and padded already."""
    listed = ImageList(to_torch(images), list(UNPADDED))
    features = net.backbone(listed.tensors)
    objectness, deltas = net.rpn.head(list(features.values()))
    proposals, _ = net.rpn(listed, features)
    heads = net.roi_heads
    read = heads.box_head(heads.box_roi_pool(features, proposals, listed.image_sizes))
    logits, boxes = heads.box_predictor(read)
    found, _ = heads(features, proposals, listed.image_sizes)
    flat = [x.permute(0, 2, 3, 1).reshape(len(images), -1) for x in objectness]
    rows = [x.permute(0, 2, 3, 1).reshape(len(images), -1, 4) for x in deltas]
    return torch.cat(flat, 1), torch.cat(rows, 1), proposals, logits, boxes, found


def close(name, got, expected, bound=1e-4):
    got, expected = np.asarray(got), np.asarray(expected)
    error = np.abs(got - expected).max() / np.abs(expected).max()
    print(f"\n{name} {got.shape}: max|Δ| / max|output| = {error:.1e}", end="")
    assert got.shape == expected.shape and error < bound


@pytest.mark.parametrize("name", MAKERS)
def test_heads_proposals_and_detections(name, tmp_path):
    net, module, found = pair(name, tmp_path)
    assert found.format.name == "torchvision"
    images, size = batch()
    outputs = jax.jit(module.apply)(found.variables, images, size=size)
    objects = jax.jit(module.objects, static_argnums=1)(outputs, SIZE, size)
    objectness, deltas, proposals, logits, boxes, expected = theirs(net, images)
    close("objectness", outputs.objectness, objectness)
    close("deltas", outputs.anchor_deltas, deltas)
    start = 0
    for i, theirs_i in enumerate(proposals):
        count = len(theirs_i)
        assert np.asarray(outputs.valid[i]).sum() == count > 50
        # Equal scores aside, the order is theirs.
        close("proposals", outputs.boxes[i, :count], theirs_i, 1e-4)
        close("logits", outputs.logits[i, :count], logits[start : start + count])
        close("box deltas", outputs.deltas[i, :count].reshape(count, -1), boxes[start : start + count])
        start += count
        kept = np.asarray(objects.valid[i])
        assert kept.sum() == len(expected[i]["boxes"]) > 20 and objects.left_out[i] == 0
        np.testing.assert_array_equal(np.asarray(objects.classes[i])[kept] + 1, expected[i]["labels"])
        close("scores", objects.scores[i][kept], expected[i]["scores"])
        close("boxes", objects.boxes[i][kept], expected[i]["boxes"])
        if module.masks:
            close("masks", objects.masks[i][kept], expected[i]["masks"][:, 0])
    assert len(set(np.asarray(objects.classes[0])[np.asarray(objects.valid[0])])) > 3


def labeled(masks):
    """Two objects in the first image, one and a place of padding in the second."""
    boxes = np.array([[[10, 20, 70, 90], [60, 30, 150, 110]], [[5, 5, 100, 120], [0, 0, 0, 0]]], np.float32)
    classes = np.array([[2, 5], [0, -1]], np.int32)
    drawn = np.zeros((2, 2, *SIZE), bool)
    for i, image in enumerate(boxes):
        for j, (x0, y0, x1, y1) in enumerate(image.astype(int)):
            drawn[i, j, y0:y1, x0 : (x0 + x1) // 2] = True
    return Targets(boxes, classes, np.zeros((2, 2), bool), drawn if masks else None)


def test_losses_of_the_same_samples(tmp_path):
    """Their assigners and losses, on the anchors and proposals that were drawn here."""
    net, module, found = pair("maskrcnn_resnet50_fpn", tmp_path)
    images, size = batch()
    targets = labeled(True)
    outputs = jax.jit(module.apply)(found.variables, images, size=size, targets=targets)
    losses = module.losses(outputs, targets, SIZE, size)
    there = targets.classes >= 0
    truths = [
        {
            "boxes": torch.from_numpy(targets.boxes[i][there[i]]),
            "labels": torch.from_numpy(targets.classes[i][there[i]].astype(np.int64) + 1),
            "masks": torch.from_numpy(targets.masks[i][there[i]].astype(np.uint8)),
        }
        for i in (0, 1)
    ]
    to = {name: torch.from_numpy(np.array(getattr(outputs, name))) for name in ("objectness", "anchor_deltas", "boxes")}
    features = net.backbone(to_torch(images))
    anchors = net.rpn.anchor_generator(ImageList(to_torch(images), list(UNPADDED)), list(features.values()))
    labels, matched = net.rpn.assign_targets_to_anchors(anchors, truths)
    owner = np.array(outputs.anchor_objects)
    drawn = owner > -2
    for i in (0, 1):
        np.testing.assert_array_equal((owner[i] >= 0)[drawn[i]], labels[i].numpy()[drawn[i]])
        assert drawn[i].sum() == 256 and 0 < (owner[i] >= 0).sum() <= 128
    masks = [torch.from_numpy(owner >= 0).unbind(), torch.from_numpy(owner == -1).unbind()]
    net.rpn.fg_bg_sampler = lambda labels: masks
    encoded = net.rpn.box_coder.encode(matched, anchors)
    expected = dict(
        zip(
            ("rpn_class", "rpn_box"),
            net.rpn.compute_loss(to["objectness"].reshape(-1, 1), to["anchor_deltas"].reshape(-1, 4), labels, encoded),
            strict=True,
        )
    )

    heads, samples = net.roi_heads, outputs.samples
    valid = np.array(samples.valid)
    boxes = [to["boxes"][i][valid[i]] for i in (0, 1)]
    owners, labels = heads.assign_targets_to_proposals(
        boxes, [t["boxes"] for t in truths], [t["labels"] for t in truths]
    )
    for i in (0, 1):
        got = np.array(samples.matched[i])[valid[i]]
        np.testing.assert_array_equal(got >= 0, labels[i].numpy() > 0)
        np.testing.assert_array_equal(got[got >= 0], owners[i].numpy()[got >= 0])
        assert 0 < (got >= 0).sum() <= 128
    rows = [torch.from_numpy(np.array(outputs.logits[i])[valid[i]]) for i in (0, 1)]
    deltas = [torch.from_numpy(np.array(outputs.deltas[i])[valid[i]]).flatten(1) for i in (0, 1)]
    regression = heads.box_coder.encode([t["boxes"][o] for t, o in zip(truths, owners, strict=True)], boxes)
    expected["class"], expected["box"] = fastrcnn_loss(torch.cat(rows), torch.cat(deltas), labels, regression)
    positive = [np.array(samples.matched[i, :128]) >= 0 for i in (0, 1)]
    chosen = [torch.from_numpy(np.array(outputs.mask_logits[i])[positive[i]]) for i in (0, 1)]
    every = torch.cat(chosen)[:, None].repeat(1, 8, 1, 1)
    expected["mask"] = maskrcnn_loss(
        every,
        [boxes[i][: positive[i].sum()] for i in (0, 1)],
        [t["masks"] for t in truths],
        [t["labels"] for t in truths],
        [owners[i][: positive[i].sum()] for i in (0, 1)],
    )
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        print(f"\n{name}: {float(losses[name]):.6f} against {float(value):.6f}", end="")
        np.testing.assert_allclose(float(losses[name]), float(value), rtol=1e-4)


def test_files_go_there_and_back_to_the_bit(tmp_path):
    for name in MAKERS:
        net, module, found = pair(name, tmp_path)
        path = weights.write_new(module, found.variables, "torchvision", str(tmp_path / "back"), {})
        again = torch.load(path, weights_only=True)
        expected = {key: tensor for key, tensor in net.state_dict().items() if "num_batches" not in key}
        assert again.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(again[key], tensor), key
