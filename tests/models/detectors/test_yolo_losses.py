"""YOLOv3's loss against loops over priors, as mmdetection assigns them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.models.detectors.base import Detector, Targets
from drep_jax.models.detectors.darknet import Darknet
from drep_jax.models.detectors.overlaps import box_iou
from drep_jax.models.detectors.yolo_losses import yolo_distance, yolo_losses
from drep_jax.weights.foreign import load_foreign
from tests.models.detectors.test_darknet import CFG, darknet_bytes, net_and_variables, written

HEADS = Darknet(cfg=CFG).network.heads
SHAPE, GRIDS = (24, 16), ((12, 8), (6, 4))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bce(logit, target):
    p = sigmoid(logit)
    return -(target * np.log(p) + (1 - target) * np.log(1 - p))


def by_loops(outputs, boxes, classes):
    """The four sums of one image, prior by prior, in float64."""
    priors = []
    for maps, head, grid in zip(outputs, HEADS, GRIDS, strict=True):
        down, right = SHAPE[0] / grid[0], SHAPE[1] / grid[1]
        for row in range(grid[0]):
            for column in range(grid[1]):
                for place, (wide, tall) in enumerate(head.anchors):
                    x, y = (column + 0.5) * right, (row + 0.5) * down
                    box = [x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2]
                    numbers = maps[row, column, place * 7 : place * 7 + 7].astype(np.float64)
                    priors.append((box, numbers, row, column, down, right, head))
    overlap = np.asarray(box_iou(jnp.asarray(boxes), jnp.asarray([p[0] for p in priors])), np.float64)
    centers = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes]
    responsible = np.array([any(y // d == r and x // w == c for x, y in centers) for _, _, r, c, d, w, _ in priors])
    owner = np.full(len(priors), -1)
    masked = np.where(responsible, overlap, -1)
    for place in range(len(priors)):
        if len(boxes) and masked[:, place].max() > 0.5:
            owner[place] = masked[:, place].argmax()
    for number in range(len(boxes)):
        best = masked[number].max()
        if best > 0:
            owner[masked[number] == best] = number
    sums = dict.fromkeys(("class", "objectness", "xy", "wh"), 0.0)
    for place, (box, numbers, _, _, down, right, head) in enumerate(priors):
        if owner[place] >= 0:
            target = boxes[owner[place]]
            label = np.eye(2)[classes[owner[place]]]
            x, y = ((target[0] + target[2]) - (box[0] + box[2])) / 2, ((target[1] + target[3]) - (box[1] + box[3])) / 2
            cell = np.array([x / (right * head.scale_xy), y / (down * head.scale_xy)]) + 0.5
            cell = np.clip(cell, 1e-6, 1 - 1e-6)
            logs = [np.log((target[i + 2] - target[i]) / (box[i + 2] - box[i])) for i in (0, 1)]
            sums["class"] += bce(numbers[5:], label).sum()
            sums["objectness"] += bce(numbers[4], 1.0)
            sums["xy"] += 2 * bce(numbers[:2], cell).sum()
            sums["wh"] += 2 * ((numbers[2:4] - logs) ** 2).sum()
        elif not len(boxes) or overlap[:, place].max() <= 0.5:
            sums["objectness"] += bce(numbers[4], 0.0)
    return sums, owner


def test_the_loss_is_that_of_loops_over_priors():
    rng = np.random.default_rng(0)
    outputs = tuple(
        rng.normal(size=(3, *grid, 7 * len(head.anchors))).astype(np.float32)
        for grid, head in zip(GRIDS, HEADS, strict=True)
    )
    # Three objects, two of them in one cell; one object beside a crowd and an empty box; nothing.
    boxes = np.zeros((3, 4, 4), np.float32)
    boxes[0, :3] = [[1, 2, 8, 9], [2.2, 3, 6.5, 8], [9, 12, 15, 23]]
    boxes[1] = [[3, 4, 12, 15], [0, 0, 16, 24], [5, 5, 5, 9], [0, 0, 0, 0]]
    classes = np.array([[0, 1, 1, -1], [1, 0, 0, -1], [-1] * 4])
    crowd = np.array([[False] * 4, [False, True, False, False], [False] * 4])
    targets = Targets(boxes=jnp.asarray(boxes), classes=jnp.asarray(classes), crowd=jnp.asarray(crowd))

    def total_of(outputs):
        losses = yolo_losses(outputs, HEADS, targets, SHAPE)
        return sum(losses.values()), (losses, yolo_distance(outputs, outputs, HEADS))

    (total, (losses, distance)), slopes = jax.jit(jax.value_and_grad(total_of, has_aux=True))(outputs)
    parts = [
        by_loops([maps[0] for maps in outputs], boxes[0, :3], classes[0, :3]),
        by_loops([maps[1] for maps in outputs], boxes[1, :1], classes[1, :1]),
        by_loops([maps[2] for maps in outputs], boxes[2, :0], classes[2, :0]),
    ]
    owned = [np.bincount(owner[owner >= 0], minlength=3).tolist() for _, owner in parts]
    assert owned[0][1] and owned[0][2] and owned[1][0] and not sum(owned[2])
    for name, value in losses.items():
        assert float(value) == pytest.approx(8 / 3 * sum(sums[name] for sums, _ in parts), rel=1e-4), name
    assert float(total) == pytest.approx(sum(map(float, losses.values())), rel=1e-5)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in slopes)
    assert float(distance) == pytest.approx(0, abs=1e-4)


def test_weights_of_another_number_of_classes_are_refused_with_both_shapes(tmp_path):
    _, variables = net_and_variables()
    path = written(tmp_path, darknet_bytes(variables))
    other = Darknet(cfg=CFG.replace("classes=2", "classes=3").replace("=14", "=16").replace("filters=7", "filters=8"))
    like = jax.eval_shape(other.init, jax.random.key(0), jnp.zeros((1, 24, 16, 3)))
    with pytest.raises(CheckpointError, match=r"layer12\.conv\.bias is \(7,\) in the file, \(8,\) in the model"):
        load_foreign(path, other, like)


def test_a_network_of_darknet_is_a_detector_of_the_classes_that_its_file_states():
    net = Darknet(cfg=CFG)
    assert isinstance(net, Detector) and net.num_classes == 2 and net.clone(num_classes=2) == net
    for changes, said in (
        ({"num_classes": 3}, "have 2 classes, and 3 are asked for"),
        ({"rule": "sum"}, 'got "sum"'),
        ({"keep": 0}, "keep=0 must be at least 1"),
        (
            {
                "cfg": CFG.replace("filters=7", "filters=8")
                .replace("mask=0\n", "mask=0\n")
                .replace("anchors=3,4\nclasses=2", "anchors=3,4\nclasses=3")
            },
            "different numbers of classes",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            Darknet(**{"cfg": CFG, **changes})
