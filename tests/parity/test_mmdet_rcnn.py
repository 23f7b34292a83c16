"""R-CNNs against mmdetection's with random weights: raw heads, proposals, final detections and masks, losses, files."""

import pathlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
pytest.importorskip("torchvision", reason="needs torchvision: pip install -r requirements-parity.txt")

from tests.parity.mmdet_side import mmdet as find_mmdet

mmdet = find_mmdet()

from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData

from drep_jax import weights
from drep_jax.models import create_model
from tests.models.detectors.networks import abstract
from tests.parity.test_rcnn import SIZE, UNPADDED, batch, close, labeled, to_torch
from tests.parity.torch_side import draw_weights, save_network

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

CONFIGS = pathlib.Path(mmdet.__file__).parent / ".mim/configs"
CASES = {
    "faster_rcnn_r50": "_base_/models/faster-rcnn_r50_fpn.py",
    "mask_rcnn_r50": "_base_/models/mask-rcnn_r50_fpn.py",
    "mask_rcnn_swin_t": "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
}
METAS = [
    {"img_shape": s, "ori_shape": s, "pad_shape": SIZE, "batch_input_shape": SIZE, "scale_factor": (1.0, 1.0)}
    for s in UNPADDED
]


def pair(name, folder):
    torch.manual_seed(0)
    config = Config.fromfile(CONFIGS / CASES[name])
    config = config.get("model", config)
    config.backbone.init_cfg = None
    config.roi_head.bbox_head.num_classes = 7
    if "mask_head" in config.roi_head:
        config.roi_head.mask_head.num_classes = 7
    net = MODELS.build(config).eval()
    draw_weights(net)
    with torch.no_grad():
        net.rpn_head.rpn_reg.weight *= 0.2
        net.roi_head.bbox_head.fc_cls.weight *= 4
        net.roi_head.bbox_head.fc_reg.weight *= 2
    module = create_model(name, num_classes=7, image_size=SIZE, candidates=5000)
    path = save_network(net, folder / "net.pth")
    return net, module, weights.load_foreign(path, module, abstract(module))


def flat(maps, last):
    rows = [x.permute(0, 2, 3, 1).reshape(len(x), -1, last) for x in maps]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_heads_proposals_and_detections(name, tmp_path):
    net, module, found = pair(name, tmp_path)
    assert found.format.name == "mmdet"
    images, size = batch()
    outputs = jax.jit(module.apply)(found.variables, images, size=size)
    objects = jax.jit(module.objects, static_argnums=1)(outputs, SIZE, size)
    features = net.extract_feat(to_torch(images))
    objectness, deltas = net.rpn_head(features)
    close("objectness", outputs.objectness, flat(objectness, 1)[..., 0])
    close("deltas", outputs.anchor_deltas, flat(deltas, 4))
    proposals = net.rpn_head.predict_by_feat(objectness, deltas, batch_img_metas=METAS, cfg=net.test_cfg.rpn)
    heads = net.roi_head._bbox_forward(features, bbox2roi([p.bboxes for p in proposals]))
    expected = net.roi_head.predict_bbox(features, METAS, proposals, net.test_cfg.rcnn)
    start = 0
    for i, proposal in enumerate(proposals):
        count = len(proposal.bboxes)
        assert np.asarray(outputs.valid[i]).sum() == count > 50
        close("proposals", outputs.boxes[i, :count], proposal.bboxes)
        close("logits", outputs.logits[i, :count], heads["cls_score"][start : start + count])
        close("box deltas", outputs.deltas[i, :count].reshape(count, -1), heads["bbox_pred"][start : start + count])
        start += count
        kept = np.asarray(objects.valid[i])
        assert kept.sum() == len(expected[i].bboxes) > 20 and objects.left_out[i] == 0
        np.testing.assert_array_equal(np.asarray(objects.classes[i])[kept], expected[i].labels)
        close("scores", objects.scores[i][kept], expected[i].scores)
        close("boxes", objects.boxes[i][kept], expected[i].bboxes)
    if module.masks:
        logits = net.roi_head._mask_forward(features, bbox2roi([e.bboxes for e in expected]))["mask_preds"]
        labels = torch.cat([e.labels for e in expected])
        masks = logits[torch.arange(len(labels)), labels].sigmoid()
        close("masks", np.asarray(objects.masks)[np.asarray(objects.valid)], masks)


@pytest.mark.parametrize("name", ["faster_rcnn_r50", "mask_rcnn_r50"])
def test_losses_of_the_same_samples(name, tmp_path):
    """Their assigners and losses, on the anchors and proposals that were drawn here."""
    net, module, found = pair(name, tmp_path)
    images, size = batch()
    targets = labeled(module.masks)
    outputs = jax.jit(module.apply)(found.variables, images, size=size, targets=targets)
    losses = module.losses(outputs, targets, SIZE, size)
    there = targets.classes >= 0
    truths = []
    for i in (0, 1):
        given = {
            "bboxes": torch.from_numpy(targets.boxes[i][there[i]]),
            "labels": torch.from_numpy(targets.classes[i][there[i]].astype(np.int64)),
        }
        if module.masks:
            given["masks"] = BitmapMasks(targets.masks[i][there[i]].astype(np.uint8), *SIZE)
        truths.append(InstanceData(**given))
    with torch.no_grad():
        features = net.extract_feat(to_torch(images))
    owner = np.array(outputs.anchor_objects)

    class Drawn:
        """Samples what was sampled here, image by image, and compares the assignment."""

        image = 0

        def sample(self, assigned, pred_instances, gt_instances, **_):
            mine = owner[Drawn.image]
            Drawn.image += 1
            assert len(mine) == len(pred_instances.priors)
            gt = assigned.gt_inds.numpy()
            drawn = mine > -2
            np.testing.assert_array_equal(gt[drawn], np.where(mine >= 0, mine + 1, 0)[drawn])
            assert drawn.sum() == 256 and 0 < (mine >= 0).sum() <= 128
            positive, negative = (torch.from_numpy(np.flatnonzero(x)) for x in (mine >= 0, mine == -1))
            flags = torch.zeros(len(mine), dtype=torch.uint8)
            return SamplingResult(positive, negative, pred_instances.priors, gt_instances.bboxes, assigned, flags)

    net.rpn_head.sampler = Drawn()
    one_class = [
        InstanceData(bboxes=t.bboxes, labels=torch.zeros_like(t.labels)) for t in truths
    ]  # as TwoStageDetector
    theirs = net.rpn_head.loss_by_feat(*net.rpn_head(features), one_class, METAS)
    expected = {"rpn_class": sum(theirs["loss_rpn_cls"]), "rpn_box": sum(theirs["loss_rpn_bbox"])}

    samples, results = outputs.samples, []
    for i, truth in enumerate(truths):
        valid = np.array(samples.valid[i])
        boxes = torch.from_numpy(np.array(outputs.boxes[i])[valid])
        assigned = net.roi_head.bbox_assigner.assign(InstanceData(priors=boxes), truth)
        mine = np.array(samples.matched[i])[valid]
        positive = mine >= 0
        assert positive.any() and np.flatnonzero(positive).max() < 128
        if name.startswith("faster"):  # with low-quality matches, other boxes were the best among all proposals
            np.testing.assert_array_equal(assigned.gt_inds.numpy(), mine + 1)
        assigned = AssignResult(len(truth), torch.from_numpy(mine + 1).long(), assigned.max_overlaps, assigned.labels)
        indices = (torch.from_numpy(np.flatnonzero(x)) for x in (positive, ~positive))
        flags = torch.zeros(len(boxes), dtype=torch.uint8)
        results.append(SamplingResult(*indices, boxes, truth.bboxes, assigned, flags))
    parts = net.roi_head.bbox_loss(features, results)
    expected |= {"class": parts["loss_bbox"]["loss_cls"], "box": parts["loss_bbox"]["loss_bbox"]}
    if module.masks:
        mask = net.roi_head.mask_loss(features, results, parts["bbox_feats"], truths)
        expected["mask"] = mask["loss_mask"]["loss_mask"]
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        print(f"\n{key}: {float(losses[key]):.6f} against {value.item():.6f}", end="")
        np.testing.assert_allclose(float(losses[key]), value.item(), rtol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_files_go_there_and_back_to_the_bit(name, tmp_path):
    net, module, found = pair(name, tmp_path)
    path = weights.write_new(module, found.variables, "mmdet", str(tmp_path / "back"), {})
    again = torch.load(path, weights_only=True)
    buffers = ("num_batches_tracked", "relative_position_index")
    expected = {key: tensor for key, tensor in net.state_dict().items() if not key.endswith(buffers)}
    assert again.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(again[key], tensor), key
