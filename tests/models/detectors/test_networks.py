"""DETR, YOLOv3, ATSS and CenterNet-update: parameters and tensors by table, their losses against plain NumPy, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from drep_jax.errors import ConfigError
from drep_jax.models import create_model
from drep_jax.models.detectors.anchors import anchors_of
from drep_jax.models.detectors.atss_losses import assign, centerness_of
from drep_jax.models.detectors.base import Detector, Targets
from drep_jax.models.detectors.centernet_losses import RANGES, centernet_losses
from drep_jax.models.detectors.detr_losses import detr_losses
from drep_jax.models.detectors.losses import binary_cross_entropy, focal_loss
from drep_jax.models.detectors.padding import valid_cells
from drep_jax.models.detectors.proposals import best, best_pairs
from drep_jax.weights.formats import named_format
from drep_jax.weights.native import names_of
from drep_jax.weights.translation import find_pieces
from tests.models.detectors.networks import NETWORKS, TINY, abstract, pictures, random_variables, targets, tiny

# Tensors of mmdetection's files, and of facebookresearch's, without the counters of batch norms.
TENSORS = {"detr_r50": 511 - 53, "yolov3_d53": 438 - 72, "atss_r50": 369 - 53, "centernet_r50": 367 - 53}
SIZES = jnp.array([[64.0, 96.0], [40.0, 70.0]])
ROWS = [
    pytest.param(
        name,
        row,
        id=f"{name}-{row[0]}",
        marks=[pytest.mark.slow] if row[0] or name in ("atss_r50", "centernet_r50") else [],
    )
    for name, rows in NETWORKS.items()
    for row in rows
]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_parameters_and_tensors_are_those_of_the_public_networks(name, row):
    options, parameters, parts, statistics = row
    module = create_model(name, num_classes=80, image_size=(64, 64), **options)
    variables = abstract(module)
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in variables["params"].items()}
    assert sum(count.values()) == parameters
    assert {part: count[part] for part in parts} == parts
    if statistics:
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) == statistics
    shapes = {path: leaf.shape for path, leaf in names_of(variables).items()}
    fmt = named_format(module, options.get("implementation", "mmdet"))
    assert len({piece.theirs for piece in find_pieces(fmt, module, shapes)}) == TENSORS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_network_is_a_detector(name):
    """By tracing, in training: outputs have the batch first, objects and losses come of them."""
    module, x = tiny(name), jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    assert isinstance(module, Detector) and module.num_classes == 5

    def run(variables, x):
        options = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
        outputs, _ = module.apply(variables, x, train=True, size=SIZES, targets=targets(), **options)
        return outputs, module.objects(outputs, (64, 96), SIZES), module.losses(outputs, targets(), (64, 96), SIZES)

    outputs, objects, losses = jax.eval_shape(run, abstract(module), x)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(outputs))
    assert objects.boxes.shape == (2, 6 if "detr" in name else 100, 4) and objects.left_out.shape == (2,)
    assert all(loss.shape == () for loss in losses.values()) and len(losses) >= 2
    assert create_model(name, num_classes=0, image_size=(64, 64), **TINY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_outputs_objects_and_losses_of_a_padded_batch(name):
    """Finite gradients, boxes inside the images, the second image changes nothing of the first, NaN finds nothing."""
    module = tiny(name)
    variables, x = random_variables(module), pictures((64, 96))

    @jax.jit
    def run(variables, x, targets):
        def total(params):
            outputs = module.apply({**variables, "params": params}, x, size=SIZES, targets=targets)
            losses = module.losses(outputs, targets, (64, 96), SIZES)
            return sum(losses.values()), (outputs, module.objects(outputs, (64, 96), SIZES), losses)

        gradient, rest = jax.grad(total, has_aux=True)(variables["params"])
        return gradient, *rest

    gradient, outputs, objects, _ = run(variables, x, targets())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0
    boxes, limit = np.asarray(objects.boxes), np.asarray(SIZES)[:, ::-1]
    assert np.asarray(objects.valid).any() and np.isfinite(boxes).all()
    assert "yolo" in name or ((boxes[..., 2:] <= limit[:, None]).all() and (boxes >= 0).all())
    scores = np.where(objects.valid, objects.scores, -1)
    assert (np.diff(scores, axis=1) <= 0).all() and (np.asarray(objects.classes)[np.asarray(objects.valid)] >= 0).all()
    other = x.copy()
    other[1] = 3
    for one, two in zip(jax.tree.leaves(outputs), jax.tree.leaves(run(variables, other, targets())[1]), strict=True):
        np.testing.assert_array_equal(one[0], two[0])
    distance = jax.jit(module.distance)
    assert abs(float(distance(outputs, outputs))) < 1e-4 < float(distance(run(variables, other, targets())[1], outputs))
    # Images without objects, and with crowds only, are background and finite.
    none = targets().replace(classes=jnp.full((2, 4), -1))
    crowd = targets().replace(crowd=jnp.ones((2, 4), bool))
    (gradient, _, _, losses), crowds = run(variables, x, none), run(variables, x, crowd)[3]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert losses == crowds and max(losses.values()) > 0 and losses.get("box", losses.get("wh")) == 0
    assert not np.asarray(run(variables, np.full_like(x, np.nan), none)[2].valid).any()


def np_iou(a, b, generalized=False):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = np.prod(np.maximum(high - low, 0))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
    hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    return shared / union - (hull - union) / hull * generalized


def np_sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_focal_loss_and_cross_entropy():
    logits, labels = np.linspace(-30, 30, 13), np.arange(13) % 2
    p = np.clip(np_sigmoid(logits), 1e-14, 1 - 1e-14)
    with jax.enable_x64(True):
        focal, entropy = focal_loss(jnp.asarray(logits), labels), binary_cross_entropy(jnp.asarray(logits), labels)
    np.testing.assert_allclose(entropy, -np.log(np.where(labels, p, 1 - p)), rtol=1e-2, atol=1e-12)
    expected = np.where(labels, 0.25 * (1 - p) ** 2, 0.75 * p**2) * -np.log(np.where(labels, p, 1 - p))
    np.testing.assert_allclose(focal, expected, rtol=1e-2, atol=1e-12)


def np_atss(anchors, boxes, valid):
    """Algorithm 1 of the paper, object by object."""
    every = np.concatenate(anchors)
    owner, highest = np.full(len(every), -1), np.zeros(len(every))
    for g, box in enumerate(boxes):
        candidates, start = [], 0
        for level in anchors:
            usable = [start + i for i in range(len(level)) if valid[start + i]]
            start += len(level)
            centers = (every[usable, :2] + every[usable, 2:]) / 2 if usable else np.zeros((0, 2))
            distance = np.linalg.norm(centers - (box[:2] + box[2:]) / 2, axis=1)
            candidates += [usable[i] for i in np.argsort(distance, kind="stable")[:9]]
        overlaps = np.array([np_iou(every[i], box) for i in candidates])
        threshold = overlaps.mean() + overlaps.std(ddof=1)
        for i, overlap in zip(candidates, overlaps, strict=True):
            x, y = (every[i, :2] + every[i, 2:]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= threshold and inside and overlap > highest[i]:
                owner[i], highest[i] = g, overlap
    return owner


def test_atss_assigns_as_the_paper_does():
    rng = np.random.default_rng(0)
    shapes = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
    anchors = anchors_of("atss", shapes)
    low = rng.uniform(0, 100, (6, 2))
    boxes = np.concatenate([low, low + np.exp(rng.uniform(2, 4.5, (6, 2)))], 1)
    boxes[5] = boxes[4] + 2  # two that claim the same anchors
    valid = np.ones(sum(map(len, anchors)), bool)
    valid[: 16 * 20].reshape(16, 20)[:, 17:] = False
    with jax.enable_x64(True):
        anchors = [a.astype(np.float64) for a in anchors]
        run = jax.jit(lambda b, t, v: assign(anchors, b, t, v))
        got = np.asarray(run(np.vstack([boxes, [[3, 3, 90, 90]]]), np.array([True] * 6 + [False]), valid))
    expected = np_atss(anchors, boxes, valid)
    assert len(set(expected)) >= 5
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(centerness_of(jnp.array([[1.0, 2.0, 4.0, 2.0], [-1.0, 1.0, 2.0, 2.0]])), [0.5, 0])


def np_centernet(classes, distances, shapes, strides, boxes, labels):
    """The loss of one image, cell by cell."""
    p = np.clip(np_sigmoid(classes), 1e-4, 1 - 1e-4)
    heat, box_losses, start = np.zeros_like(p), [], 0
    around = {g: [] for g in range(len(boxes))}
    for (rows, columns), stride, (least, most) in zip(shapes, strides, RANGES, strict=True):
        for i in range(rows):
            for j in range(columns):
                at, point = start + i * columns + j, np.array([j + 0.5, i + 0.5]) * stride
                ranked = []
                for g, (box, label) in enumerate(zip(boxes, labels, strict=True)):
                    middle = (box[:2] + box[2:]) / 2
                    own = (np.floor(middle / stride) + 0.5) * stride
                    area = np.prod(box[2:] - box[:2])
                    distance = 0 if (own == point).all() else np.sum((point - middle) ** 2)
                    distance /= max(2 / 81 * area, 16)
                    value = np.exp(-distance)
                    heat[at, label] = max(heat[at, label], value if value >= 1e-4 else 0)
                    sides = np.concatenate([point - box[:2], box[2:] - point])
                    half = np.hypot(*(box[2:] - box[:2])) / 2
                    near = (np.abs(point - own) <= stride).all()
                    if sides.min() > 0 and near and least <= half <= most:
                        ranked.append((distance, g, sides / stride))
                    # The nine candidates for positives: those whose target would not be negative.
                    center = np.floor(middle / stride) * stride + stride // 2
                    step = np.array([j, i]) - np.floor(middle / stride)
                    if np.abs(step).max() <= 1:
                        base = np.concatenate([center - box[:2], box[2:] - center]) / stride
                        wanted = base + np.concatenate([step, -step])
                        if wanted.min() >= 0:
                            predicted = distances[at] * [-1, -1, 1, 1]
                            loss = 1 - np_iou(predicted, wanted * [-1, -1, 1, 1], True)
                            if not step.any() and base.min() >= 0 and least <= half <= most:
                                loss = 0
                            around[g].append((loss, at))
                if ranked:
                    wanted = min(ranked, key=lambda row: row[0])[2]
                    box_losses.append(1 - np_iou(distances[at] * [-1, -1, 1, 1], wanted * [-1, -1, 1, 1], True))
        start += rows * columns
    positives = []
    for g, rows in around.items():
        losses = sorted([loss for loss, _ in rows] + [np.inf] * 45)[:9]
        positives += [(at, labels[g]) for loss, at in rows if loss < min(losses[8], 0.2)]
    value = sum(-0.25 * (1 - p[at]) ** 2 * np.log(p[at]) for at in positives)
    value += np.sum(-0.75 * (1 - heat) ** 4 * p**2 * np.log(1 - p))
    return value / max(len(positives), 1), 2 * np.sum(box_losses) / max(len(box_losses), 1), len(positives)


def test_centernet_s_loss():
    rng = np.random.default_rng(1)
    shapes, strides = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)], (8, 16, 32, 64, 128)
    cells = sum(rows * columns for rows, columns in shapes)
    classes, distances = rng.normal(-1, 1, (cells, 3)), np.abs(rng.normal(2, 1, (cells, 4)))
    boxes = np.array([[10, 12, 41, 60], [30, 20, 120, 90], [33, 22, 118, 91], [2.5, 3, 12, 9], [0, 0, 1, 1.0]])
    labels = np.array([0, 2, 1, 2, -1])
    # Predictions that are right around the second object, so that there are further positives.
    stride, place, start = 16, (3, 4), 12 * 16
    for i in (-1, 0, 1):
        at = start + (place[0] + i) * 8 + place[1]
        point = (np.array([place[1], place[0] + i]) + 0.5) * stride
        distances[at] = np.concatenate([point - boxes[1, :2], boxes[1, 2:] - point]) / stride
    with jax.enable_x64(True):
        objects = Targets(jnp.asarray(boxes[None]), jnp.asarray(labels[None]), jnp.zeros((1, 5), bool))
        run = jax.jit(lambda c, d, t: centernet_losses(c, d, shapes, strides, t))
        losses = run(classes[None], distances[None], objects)
    expected = np_centernet(classes, distances, shapes, strides, boxes[:4], labels[:4])
    assert expected[2] > 4
    np.testing.assert_allclose([losses["class"], losses["box"]], expected[:2], rtol=1e-9)


def test_detr_s_loss():
    rng = np.random.default_rng(2)
    logits, boxes = rng.normal(size=(2, 1, 6, 4)), rng.uniform(0.2, 0.6, (2, 1, 6, 4))
    wanted, extent = targets(most=4, classes=3), np.array([[64.0, 96.0], [60.0, 90.0]])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, wanted)
        losses = jax.jit(lambda a, b, t: detr_losses(a, b, t, jnp.asarray(extent), (0, 1, 2)))(logits, boxes, wide)
    entropy, weight, distance, overlap, count = 0.0, 0.0, 0.0, 0.0, 0
    for i in range(2):
        p = np.exp(logits[i, 0]) / np.exp(logits[i, 0]).sum(1, keepdims=True)
        label = np.full(6, 3)
        known = np.asarray(wanted.classes[i]) >= 0
        true = np.asarray(wanted.boxes[i], np.float64)[known] / np.tile(extent[i, ::-1], 2)
        classes = np.asarray(wanted.classes[i])[known]
        corners = np.concatenate(
            [boxes[i, 0, :, :2] - boxes[i, 0, :, 2:] / 2, boxes[i, 0, :, :2] + boxes[i, 0, :, 2:] / 2], 1
        )
        middle = np.concatenate([(true[:, :2] + true[:, 2:]) / 2, true[:, 2:] - true[:, :2]], 1)
        l1 = np.abs(boxes[i, 0][:, None] - middle[None]).sum(-1)
        giou = np.array([[np_iou(a, b, True) for b in true] for a in corners]).reshape(6, len(true))
        for row, column in zip(*linear_sum_assignment(-p[:, classes] + 5 * l1 - 2 * giou), strict=True):
            label[row] = classes[column]
            distance, overlap, count = distance + l1[row, column], overlap + 1 - giou[row, column], count + 1
        weights = np.where(label == 3, 0.1, 1)
        entropy, weight = entropy - (weights * np.log(p[np.arange(6), label])).sum(), weight + weights.sum()
    assert count == 3
    expected = [entropy / weight, 5 * distance / count, 2 * overlap / count]
    np.testing.assert_allclose([losses["class"], losses["box"], losses["giou"]], expected, rtol=1e-9)


def test_best_pairs_of_many_boxes_are_those_of_all():
    """With ties, NaN and a threshold; the shorter way gives the same pairs in the same order."""
    rng = np.random.default_rng(3)
    scores = np.round(rng.uniform(size=(300, 7)), 2).astype(np.float32)
    scores[5] = np.nan
    for threshold in (0.3, 0.995, -np.inf):
        short, box, label = best_pairs(jnp.asarray(scores), 40, threshold=threshold)
        every = best(jnp.asarray(scores.reshape(-1)), 40, threshold=threshold)
        for one, other in zip(jax.tree.leaves(short), jax.tree.leaves(every), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(np.asarray(box) * 7 + np.asarray(label), every.index)


def test_cells_of_an_image_are_those_whose_first_pixel_is():
    got = np.asarray(valid_cells((100, 64), (4, 2), jnp.array([[51.0, 32.0], [100.0, 33.0]]), 2))
    np.testing.assert_array_equal(got.sum((1, 2)), [3, 8])
    assert np.asarray(valid_cells((100, 64), (4, 2), None, 2)).all()


BAD = [
    ("detr_r50", {"width": 30}, "multiple of 4"),
    ("detr_r50", {"implementation": "facebook"}, 'Did you mean "facebookresearch"'),
    ("detr_r50", {"stage_sizes": (3, 4)}, "each of 4 stages"),
    ("detr_r50", {"num_queries": 0}, "num_queries must be a whole number, at least 1"),
    ("detr_r50", {"dropout": 1.0}, "dropout must be in"),
    ("atss_r50", {"groups": 3}, "width 8 is not divisible by groups 3"),
    ("centernet_r50", {"keep": 0}, "keep must be a whole number"),
    ("centernet_r50", {"stage_sizes": (1, 1, 1)}, "each of 4 stages"),
    ("yolov3_d53", {"width": 3}, "even number of channels"),
    ("yolov3_d53", {"stage_sizes": (1, 2, 8)}, "each of 5 groups"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_what_cannot_work_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny(name, **options)


@pytest.mark.parametrize("name", ["detr_r50", "atss_r50", "centernet_r50"])
def test_what_is_no_batch_of_images_is_refused(name):
    with pytest.raises(ConfigError, match="takes images of shape"):
        jax.eval_shape(tiny(name).init, jax.random.key(0), jnp.zeros((64, 64, 3)))
