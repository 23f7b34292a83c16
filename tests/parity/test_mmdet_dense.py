"""DETR, ATSS, CenterNet-update and YOLOv3 against mmdetection's with random weights: outputs, detections, losses, files."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
pytest.importorskip("torchvision", reason="needs torchvision: pip install -r requirements-parity.txt")

from tests.parity.mmdet_side import mmdet as find_mmdet

mmdet = find_mmdet()

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData

from drep_jax import weights
from drep_jax.models import create_model
from tests.models.detectors.networks import abstract, targets
from tests.parity.test_detectors import SIZES, error, padded, same_objects, spread_out, to_torch
from tests.parity.torch_side import draw_weights, save_network

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

CONFIGS = pathlib.Path(mmdet.__file__).parent / ".mim/configs"
CASES = {
    "detr_r50": "detr/detr_r50_8xb2-150e_coco.py",
    "atss_r50": "atss/atss_r50_fpn_1x_coco.py",
    "centernet_r50": "centernet/centernet-update_r50-caffe_fpn_ms-1x_coco.py",
    "yolov3_d53": "yolo/yolov3_d53_8xb8-320-273e_coco.py",
}
CLASSES = 7


def pair(name, folder):
    torch.manual_seed(0)
    config = Config.fromfile(CONFIGS / CASES[name]).model
    config.backbone.init_cfg = None
    config.bbox_head.num_classes = CLASSES
    net = MODELS.build(config).eval()
    draw_weights(net)
    shape, sizes = (128, 160), [(128, 160)] * 2
    spread_out(net, lambda x: net._forward(x, samples(shape, sizes)) if name == "detr_r50" else net._forward(x))
    module = create_model(name, num_classes=CLASSES, image_size=(64, 64))
    path = save_network(net, folder / "net.pth")
    return net, module, weights.load_foreign(path, module, abstract(module))


def samples(shape, sizes, truths=None):
    rows = []
    for i, size in enumerate(sizes):
        sample = DetDataSample(
            metainfo={
                "img_shape": size,
                "ori_shape": size,
                "pad_shape": tuple(-(-side // 32) * 32 for side in size),
                "batch_input_shape": shape,
                "scale_factor": (1.0, 1.0),
            }
        )
        if truths is not None:
            known = np.asarray(truths.classes[i]) >= 0
            sample.gt_instances = InstanceData(
                bboxes=torch.from_numpy(np.array(truths.boxes[i])[known]),
                labels=torch.from_numpy(np.array(truths.classes[i])[known].astype(np.int64)),
            )
            sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        rows.append(sample)
    return rows


@pytest.mark.parametrize("name", CASES)
def test_outputs_detections_and_losses(name, tmp_path):
    net, module, found = pair(name, tmp_path)
    assert found.format.name == "mmdet"

    def run(variables, x, size, wanted):
        outputs = module.apply(variables, x, size=size)
        learned = module.apply(variables, x, size=size, targets=wanted)
        shape = x.shape[1:3]
        return outputs, module.objects(outputs, shape, size), module.losses(learned, wanted, shape, size)

    for shape, sizes in SIZES:
        images = padded(shape, sizes)
        wanted = targets(size=min(sizes), classes=CLASSES, most=5, empty=False)
        outputs, objects, losses = jax.jit(run)(found.variables, images, jnp.asarray(sizes, jnp.float32), wanted)
        with torch.no_grad():
            x = to_torch(images[..., ::-1] if name == "centernet_r50" else images)  # BGR
            raw = net._forward(x, samples(shape, sizes)) if name == "detr_r50" else net.bbox_head(net.extract_feat(x))
            predicted = [s.pred_instances for s in net.predict(x, samples(shape, sizes), rescale=False)]
            if name == "centernet_r50":
                net.bbox_head.train()
            theirs = net.loss(x, samples(shape, sizes, wanted))
            net.bbox_head.eval()
        compare_outputs(name, outputs, raw)
        for i in range(len(sizes)):
            mine = jax.tree.map(lambda leaf, i=i: leaf[i], objects)
            p = predicted[i]
            same_objects(mine, (p.bboxes, p.scores, p.labels), shape[0])
        for key, value in expected_losses(name, theirs).items():
            print(f"\n{name} {key}: {float(losses[key]):.6f} against {value:.6f}", end="")
            np.testing.assert_allclose(float(losses[key]), value, rtol=3e-4)


def compare_outputs(name, outputs, raw):
    if name == "detr_r50":
        # Their classes and boxes of all layers; ours of the last.
        for got, wanted in zip((outputs.logits, outputs.boxes), raw, strict=True):
            assert error(np.asarray(got)[:, 0], wanted[-1].numpy()) < 1e-4
        return
    parts = raw if isinstance(raw[0], list | tuple) else [raw]
    maps = [m for part in parts for m in part]
    for got, wanted in zip(jax.tree.leaves(outputs), maps, strict=True):
        got, wanted = np.asarray(got), wanted.numpy().transpose(0, 2, 3, 1)
        if name == "centernet_r50" and wanted.shape[-1] == 4:  # theirs in pixels, ours in strides
            wanted = wanted / (wanted.max() / max(got.max(), 1e-9))
        assert error(got, wanted) < 1e-4, wanted.shape


def expected_losses(name, theirs):
    total = {key: float(sum(v) if isinstance(v, list | tuple) else v) for key, v in theirs.items()}
    if name == "detr_r50":
        layers = ["", *(f"d{i}." for i in range(5))]
        names = {"class": "loss_cls", "box": "loss_bbox", "giou": "loss_iou"}
        return {ours: sum(total[layer + key] for layer in layers) for ours, key in names.items()}
    if name == "yolov3_d53":  # sums over images there, of eight here
        names = {"class": "loss_cls", "objectness": "loss_conf", "xy": "loss_xy", "wh": "loss_wh"}
        return {ours: total[key] * 4 for ours, key in names.items()}
    names = {"class": "loss_cls", "box": "loss_bbox", "centerness": "loss_centerness"}
    return {ours: total[key] for ours, key in names.items() if key in total}


@pytest.mark.parametrize("name", CASES)
def test_files_go_there_and_back_to_the_bit(name, tmp_path):
    net, module, found = pair(name, tmp_path)
    path = weights.write_new(module, found.variables, "mmdet", str(tmp_path / "back"), {})
    again = torch.load(path, weights_only=True)
    expected = {key: tensor for key, tensor in net.state_dict().items() if "num_batches_tracked" not in key}
    assert again.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(again[key], tensor), key
