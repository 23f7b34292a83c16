"""Parts of detectors against torchvision's: RoIAlign, suppression, anchors, coder, levels, pyramid, pasted masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -r requirements-parity.txt")
torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install -r requirements-parity.txt")

from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, boxes, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from drep_jax.models.detectors import anchors, coders
from drep_jax.models.detectors.fpn import FPN
from drep_jax.models.detectors.nms import nms
from drep_jax.models.detectors.overlaps import generalized_iou
from drep_jax.models.detectors.roi_align import level_of
from drep_jax.models.detectors.roi_align import roi_align as ours

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)


def random_boxes(count, side=200, rng=RNG):
    low = rng.uniform(-10, side, (count, 2))
    return np.concatenate([low, low + np.exp(rng.normal(3, 1, (count, 2)))], axis=1).astype(np.float32)


def to_torch(maps):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(maps).transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(("samples", "aligned"), [(2, False), (-1, True), (-1, False), (2, True)])
def test_roi_align(samples, aligned):
    maps, rois = RNG.standard_normal((2, 30, 40, 3)).astype(np.float32), random_boxes(2 * 50).reshape(2, 50, 4)
    theirs = roi_align(to_torch(maps), [torch.from_numpy(r) for r in rois], 7, 1 / 8, samples, aligned)
    got = ours(
        [jnp.asarray(maps)], rois, (8,), 7, levels=np.zeros((2, 50), int), samples=max(samples, 0), aligned=aligned
    )
    np.testing.assert_allclose(got.reshape(100, 7, 7, 3), theirs.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def test_suppression_and_overlaps():
    rows, classes = random_boxes(300, side=60), RNG.integers(0, 3, 300)
    scores = RNG.uniform(size=300).astype(np.float32)
    for threshold in (0.3, 0.45, 0.7):
        kept = boxes._batched_nms_vanilla(*map(torch.from_numpy, (rows, scores, classes)), threshold)
        assert sorted(kept.tolist()) == np.flatnonzero(nms(rows, scores, threshold, classes=classes)).tolist()
    giou = boxes.generalized_box_iou(torch.from_numpy(rows[:9]), torch.from_numpy(rows[9:30]))
    np.testing.assert_allclose(generalized_iou(rows[:9], rows[9:30]), giou, atol=1e-5)


def test_anchors_coder_and_levels():
    generator = AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    shapes = anchors.level_shapes((200, 328), (4, 8, 16, 32, 64))
    maps = [torch.zeros(1, 1, *shape) for shape in shapes]
    (theirs,) = generator(ImageList(torch.zeros(1, 3, 200, 328), [(200, 328)]), maps)
    np.testing.assert_array_equal(np.concatenate(anchors.anchors_of("torchvision", shapes, (200, 328))), theirs)
    rows, others = random_boxes(50), random_boxes(50)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    encoded = coder.encode_single(torch.from_numpy(rows), torch.from_numpy(others))
    got = coders.encode_deltas(rows, others, stds=coders.RCNN_STDS)
    np.testing.assert_allclose(got, encoded, rtol=1e-4, atol=1e-4)
    deltas = 3 * RNG.standard_normal((50, 4)).astype(np.float32)
    decoded = coder.decode_single(torch.from_numpy(deltas * 20), torch.from_numpy(others))
    got = coders.decode_deltas(deltas * 20, others, stds=coders.RCNN_STDS, clamp_below=False)
    np.testing.assert_allclose(got, decoded, rtol=1e-4, atol=1e-2)
    many = random_boxes(500) * RNG.choice([1, 5, 20], (500, 1)).astype(np.float32)
    np.testing.assert_array_equal(level_of(many, 4, kind="torchvision"), LevelMapper(2, 5)([torch.from_numpy(many)]))


@pytest.mark.parametrize("extra", ["pool", "convs_on_input", "convs_on_output"])
def test_pyramid(extra):
    widths, maps = (
        (8, 12, 16),
        [RNG.standard_normal((1, 26 >> n, 38 >> n, w)).astype(np.float32) for n, w in enumerate((8, 12, 16))],
    )
    blocks = {
        "pool": LastLevelMaxPool(),
        "convs_on_input": LastLevelP6P7(16, 6),
        "convs_on_output": LastLevelP6P7(6, 6),
    }
    theirs = FeaturePyramidNetwork(widths, 6, extra_blocks=blocks[extra])
    with torch.no_grad():
        expected = list(theirs({str(n): to_torch(x) for n, x in enumerate(maps)}).values())
    net = FPN(6, len(expected), extra=extra, relu_before_extra=True)
    params = {}
    for name, layers in (("lateral", theirs.inner_blocks), ("output", theirs.layer_blocks)):
        params |= {f"{name}_{n}": layer[0] for n, layer in enumerate(layers)}
    if extra != "pool":
        params |= {"output_3": theirs.extra_blocks.p6, "output_4": theirs.extra_blocks.p7}
    params = {
        name: {"kernel": layer.weight.detach().numpy().transpose(2, 3, 1, 0), "bias": layer.bias.detach().numpy()}
        for name, layer in params.items()
    }
    for got, wanted in zip(jax.jit(net.apply)({"params": params}, maps), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy().transpose(0, 2, 3, 1), atol=1e-5)
