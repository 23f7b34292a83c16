"""R-CNNs: parameters and tensors by table, sampling, proposals, objects and losses against plain NumPy, sites, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax import algorithm1_losses, certify, find_sites, fuse_exact, measure
from drep_jax.core import closed_form
from drep_jax.core.moments import collect_moments
from drep_jax.core.schedule import Schedule
from drep_jax.errors import ConfigError
from drep_jax.models import create_model
from drep_jax.models.detectors.base import Detector
from drep_jax.models.detectors.rcnn_losses import _to_learn
from drep_jax.models.detectors.rcnn_outputs import CONVENTIONS, Outputs
from drep_jax.models.detectors.roi_align import roi_align
from drep_jax.models.detectors.rpn import propose
from drep_jax.models.detectors.sampling import IGNORED, Samples, as_labels, assign, sample
from drep_jax.weights.formats import named_format
from drep_jax.weights.native import names_of
from drep_jax.weights.translation import find_pieces
from tests.models.detectors.networks import abstract, pictures, random_variables, targets
from tests.models.detectors.rcnns import RCNNS, TINY, tiny
from tests.models.test_pipeline import smooth_images

SIZE = (64, 96)
PADDED = np.array([[64.0, 96.0], [40.0, 70.0]], np.float32)

# Tracing one at full size takes a second.
ROWS = [pytest.param(name, marks=[pytest.mark.slow] if name != "fasterrcnn_resnet50_fpn" else []) for name in RCNNS]


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_tensors_are_those_of_the_public_networks(name):
    classes, parameters, parts, tensors = RCNNS[name]
    module = create_model(name, num_classes=classes, image_size=SIZE)
    variables = abstract(module)
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in variables["params"].items()}
    assert sum(count.values()) == parameters
    assert {part: count[part] for part in parts} == parts
    if tensors:
        shapes = {path: leaf.shape for path, leaf in names_of(variables).items()}
        fmt = named_format(module, tensors[0])
        assert len({piece.theirs for piece in find_pieces(fmt, module, shapes)}) == tensors[1]


@pytest.mark.parametrize(
    "trunk", ["resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("swin", "swinv2"))]
)
def test_every_network_is_a_detector_for_images_of_any_size(trunk):
    """By tracing: outputs have the batch first, with and without targets; objects and losses come of them."""
    module, x = tiny(trunk=trunk, masks=trunk != "swinv2"), jax.ShapeDtypeStruct((2, 61, 97, 3), jnp.float32)
    assert isinstance(module, Detector) and module.num_classes == 3
    labels = targets(classes=3)
    labels = labels.replace(masks=jnp.zeros((2, 4, 61, 97), bool))

    def run(variables, x):
        outputs = module.apply(variables, x, size=PADDED)
        learned = module.apply(
            variables, x, train=True, size=PADDED, targets=labels, rngs={"dropout": jax.random.key(0)}
        )
        return outputs, learned, module.objects(outputs, (61, 97), PADDED), module.losses(learned, labels, (61, 97))

    outputs, learned, objects, losses = jax.eval_shape(run, abstract(module), x)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves((outputs, learned)))
    assert (outputs.boxes.shape, learned.boxes.shape) == ((2, 9, 4), (2, 512, 4))
    assert objects.boxes.shape == (2, 5, 4) and objects.left_out.shape == (2,)
    assert losses.keys() == {"rpn_class", "rpn_box", "class", "box"} | ({"mask"} if module.masks else set())
    assert all(loss.shape == () for loss in losses.values())
    if module.masks:
        assert objects.masks.shape == (2, 5, 28, 28) and learned.mask_logits.shape == (2, 128, 28, 28)
    assert create_model("faster_rcnn_r50", num_classes=0, image_size=SIZE)


# --- assignment and sampling -----------------------------------------------------------------------------------------


def np_iou(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.maximum(high - low, 0))
    areas = [np.prod(np.maximum(box[2:] - box[:2], 0)) for box in (one, other)]
    return shared / (sum(areas) - shared) if shared > 0 else 0.0


def np_assign(boxes, objects, positive, negative, least, kind):
    """Object by object, as the public code writes it."""
    iou = np.array([[np_iou(o, b) for b in boxes] for o in objects])
    result = np.full(len(boxes), IGNORED)
    for j in range(len(boxes)):
        best = iou[:, j].max()
        if best < negative:
            result[j] = -1
        if best >= positive:
            result[j] = iou[:, j].argmax()
    for i in range(len(objects)):
        best = iou[i].max()
        if kind != "none" and best > 0 and best >= least:
            for j in np.flatnonzero(iou[i] == best):
                result[j] = i if kind == "mmdet" else iou[:, j].argmax()
    return result


def test_assignment_is_that_of_the_public_code():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 40, (60, 2)).round()
    boxes = np.concatenate([low, low + rng.choice([8, 16, 24], (60, 2))], 1).astype(np.float32)
    objects = np.concatenate([boxes[:3] + 1, boxes[3:4], boxes[3:4], np.zeros((2, 4))]).astype(np.float32)
    there = np.array([True] * 5 + [False] * 2)
    seen = {}
    for kind in ("none", "mmdet", "torchvision"):
        options = {"positive": 0.7, "negative": 0.3, "least": 0.3, "low_quality": kind}
        got = np.asarray(assign(boxes, objects, there, **options))
        np.testing.assert_array_equal(got, np_assign(boxes, objects[:5], 0.7, 0.3, 0.3, kind), kind)
        seen[kind] = got
    assert (seen["mmdet"] == 4).any() and not (seen["torchvision"] == 4).any() and (seen["none"] == IGNORED).any()
    nothing = assign(boxes, objects, np.zeros(7, bool), positive=0.5, negative=0.5)
    assert (np.asarray(nothing) == -1).all()


@pytest.mark.parametrize(("positives", "negatives"), [(3, 50), (20, 50), (20, 2), (0, 50), (5, 0)])
def test_a_sample_has_few_positives_and_fills_up_with_background(positives, negatives):
    matched = np.full(80, IGNORED)
    matched[:positives] = np.arange(positives) % 4
    matched[30 : 30 + negatives] = -1
    usable = np.ones(80, bool)
    usable[0] = False
    drawn = sample(jax.random.key(1), jnp.asarray(matched), 16, 6, usable=jnp.asarray(usable))
    index, valid, owner = (np.asarray(leaf) for leaf in (drawn.index, drawn.valid, drawn.matched))
    expected = min(max(positives - 1, 0), 6)
    assert (owner[valid] >= 0).sum() == expected and (owner[:expected] >= 0).all()
    assert valid.sum() == min(expected + negatives, 16) and valid[: valid.sum()].all()
    assert len(set(index[valid])) == valid.sum() and 0 not in index[:expected]
    np.testing.assert_array_equal(owner[valid], matched[index[valid]])
    labels = np.asarray(as_labels(drawn, 80))
    assert (labels > IGNORED).sum() == valid.sum()
    np.testing.assert_array_equal(labels[index[valid]], owner[valid])
    other = sample(jax.random.key(2), jnp.asarray(matched), 16, 6)
    assert negatives < 16 or set(np.asarray(other.index)) != set(index)


# --- proposals and objects -------------------------------------------------------------------------------------------


def np_nms(boxes, scores, threshold):
    """Indices that are kept, by falling score."""
    kept = []
    for j in np.argsort(-scores, kind="stable"):
        if all(np_iou(boxes[j], boxes[i]) <= threshold for i in kept):
            kept.append(j)
    return kept


def np_decode(deltas, anchors, stds=(1, 1, 1, 1), clamp_below=True):
    deltas = deltas * np.array(stds)
    sides = anchors[:, 2:] - anchors[:, :2]
    logs = np.clip(deltas[:, 2:], -4.135166556742356 if clamp_below else -np.inf, 4.135166556742356)
    middles = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * sides
    half = sides * np.exp(logs) / 2
    return np.concatenate([middles - half, middles + half], 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_proposals_are_the_best_of_every_level_after_suppression():
    rng = np.random.default_rng(0)
    anchors = []
    for count, side in ((40, 10), (12, 30), (3, 60)):
        low = rng.uniform(-5, 50, (count, 2))
        anchors.append(np.concatenate([low, low + side], 1).astype(np.float32))
    logits, deltas = rng.normal(size=(2, 55)).astype(np.float32), 0.3 * rng.normal(size=(2, 55, 4)).astype(np.float32)
    deltas[0, 5, 0] = 100  # far outside: no area is left of it
    logits[0, 5] = 9
    size = np.array([[50, 60], [40, 45]], np.float32)
    run = jax.jit(lambda *arrays: propose(*arrays[:2], anchors, arrays[2], per_level=15, keep=20, iou=0.5))
    boxes, scores, valid = run(logits, deltas, size)
    for i in (0, 1):
        expected, start = [], 0
        for level in anchors:
            rows = slice(start, start + len(level))
            best = np.argsort(-logits[i, rows], kind="stable")[:15]
            decoded = np_decode(deltas[i, rows][best].astype(np.float64), level[best])
            limit = size[i][[1, 0, 1, 0]]
            decoded = np.clip(decoded, 0, limit)
            there = (decoded[:, 2:] > decoded[:, :2]).all(1)
            decoded, level_scores = decoded[there], sigmoid(logits[i, rows][best])[there]
            expected += [(level_scores[j], *decoded[j]) for j in np_nms(decoded, level_scores, 0.5)]
            start += len(level)
        expected = np.array(sorted(expected, reverse=True)[:20])
        count = len(expected)
        assert np.asarray(valid[i]).sum() == count and count > 5
        np.testing.assert_allclose(scores[i, :count], expected[:, 0], rtol=1e-5)
        np.testing.assert_allclose(boxes[i, :count], expected[:, 1:], atol=1e-3)
        assert not np.any(np.asarray(boxes[i, count:]))


def made_up(module, rng, count=30, classes=3, spread=4.0):
    """Outputs of a network with boxes all over the image; the last proposal is none."""
    mmdet = module.convention.background < 0
    low = rng.uniform(0, 50, (2, count, 2))
    valid = np.ones((2, count), bool)
    valid[:, -1] = False
    return Outputs(
        objectness=np.zeros((2, 1), np.float32),
        anchor_deltas=np.zeros((2, 1, 4), np.float32),
        boxes=np.concatenate([low, low + rng.uniform(5, 40, (2, count, 2))], -1).astype(np.float32),
        valid=valid,
        logits=(spread * rng.normal(size=(2, count, classes + 1))).astype(np.float32),
        deltas=rng.normal(size=(2, count, classes + (not mmdet), 4)).astype(np.float32),
    )


@pytest.mark.parametrize("implementation", CONVENTIONS)
def test_objects_are_those_of_the_public_post_processing(implementation):
    module = tiny(implementation=implementation, keep=12, candidates=90, score=0.1)
    outputs = made_up(module, np.random.default_rng(0))
    first = 0 if implementation == "mmdet" else 1
    objects = jax.jit(module.objects, static_argnums=1)(outputs, SIZE, PADDED)
    for i in (0, 1):
        logits = outputs.logits[i].astype(np.float64)
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        expected = []
        for label in range(3):
            boxes = np_decode(
                outputs.deltas[i, :, label + first].astype(np.float64),
                outputs.boxes[i],
                (0.1, 0.1, 0.2, 0.2),
                implementation == "mmdet",
            )
            boxes = np.clip(boxes, 0, PADDED[i][[1, 0, 1, 0]])
            scores = chances[:, label + first]
            there = (scores > 0.1) & outputs.valid[i]
            if implementation == "torchvision":
                there &= (boxes[:, 2:] - boxes[:, :2] >= 0.01).all(1)
            boxes, scores = boxes[there], scores[there]
            expected += [(scores[j], label, *boxes[j]) for j in np_nms(boxes, scores, 0.5)]
        expected = np.array(sorted(expected, reverse=True)[:12])
        count = len(expected)
        assert np.asarray(objects.valid[i]).sum() == count > 5 and objects.left_out[i] == 0
        np.testing.assert_allclose(objects.scores[i, :count], expected[:, 0], rtol=1e-5)
        np.testing.assert_array_equal(objects.classes[i, :count], expected[:, 1])
        np.testing.assert_allclose(objects.boxes[i, :count], expected[:, 2:], atol=1e-3)
    few = module.clone(candidates=10).objects(outputs, SIZE)
    assert (np.asarray(few.left_out) > 0).all()


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["mmdet", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_losses_are_those_of_the_definition(implementation):
    """Sample by sample; parity tests compare with the public code."""
    module, rng = tiny(implementation=implementation), np.random.default_rng(1)
    first, beta = (0, 0) if implementation == "mmdet" else (1, 1 / 9)
    labels, outputs = targets(classes=3), made_up(module, rng)
    anchors = np.concatenate(module._anchors(SIZE)).astype(np.float64)
    owner = np.full((2, len(anchors)), IGNORED)
    owner[:, 20:30], owner[0, 100:103], owner[0, 40] = -1, (0, 1, 0), 2
    matched = np.where(np.arange(30) < 4, np.arange(30) % 3, -1) * np.array([[1], [0]]) - np.array([[0], [1]])
    valid = np.broadcast_to(np.arange(30) < 25, (2, 30))
    outputs = outputs.replace(
        objectness=rng.normal(size=owner.shape).astype(np.float32),
        anchor_deltas=rng.normal(size=(*owner.shape, 4)).astype(np.float32),
        anchor_objects=owner,
        samples=Samples(np.zeros((2, 30), int), matched, valid),
        valid=valid,
    )
    losses = jax.jit(module.losses, static_argnums=2)(outputs, labels, SIZE)

    def off(deltas, box, truth, stds):
        middle, other = (box[:2] + box[2:]) / 2, (truth[:2] + truth[2:]) / 2
        side, wanted = box[2:] - box[:2], truth[2:] - truth[:2]
        goal = np.concatenate([(other - middle) / side, np.log(wanted / side)]) / stds
        difference = np.abs(deltas - goal)
        return sum(d * d / (2 * beta) if d < beta else d - beta / 2 for d in difference)

    total = dict.fromkeys(losses, 0.0)
    for i in (0, 1):
        for j in np.flatnonzero(owner[i] > IGNORED):
            chance = sigmoid(float(outputs.objectness[i, j]))
            total["rpn_class"] -= np.log(chance if owner[i, j] >= 0 else 1 - chance)
            if owner[i, j] >= 0:
                truth = np.asarray(labels.boxes[i, owner[i, j]], np.float64)
                total["rpn_box"] += off(outputs.anchor_deltas[i, j], anchors[j], truth, np.ones(4))
        for j in np.flatnonzero(valid[i]):
            row = outputs.logits[i, j].astype(np.float64)
            label = int(labels.classes[i, matched[i, j]]) + first if matched[i, j] >= 0 else (0 if first else 3)
            total["class"] -= row[label] - np.log(np.exp(row).sum())
            if matched[i, j] >= 0:
                truth = np.asarray(labels.boxes[i, matched[i, j]], np.float64)
                stds = np.array([0.1, 0.1, 0.2, 0.2])
                total["box"] += off(outputs.deltas[i, j, label], outputs.boxes[i, j].astype(np.float64), truth, stds)
    assert (owner > IGNORED).sum() == 24
    for name, value in total.items():
        expected = value / (24 if name.startswith("rpn") else valid.sum())
        assert expected > 0
        np.testing.assert_allclose(losses[name], expected, rtol=1e-4, err_msg=name)


def test_masks_to_learn_are_cut_out_by_the_adaptive_roi_align():
    rng = np.random.default_rng(0)
    masks = rng.uniform(size=(1, 3, 20, 30)) > 0.5
    boxes = np.array([[[2.3, 1.7, 25.2, 18.9], [0, 0, 30, 20], [11.2, 5.5, 11.9, 9.0], [3, 3, 10, 9]]], np.float32)
    matched = np.array([[0, 2, 1, -1]])
    for aligned in (True, False):
        got = np.asarray(jax.jit(_to_learn, static_argnums=(3, 4))(masks, boxes, matched, 4, aligned))
        maps = [masks[0].transpose(1, 2, 0)[None].astype(np.float32)]
        expected = roi_align(maps, boxes, (1,), 4, levels=np.zeros((1, 4), int), aligned=aligned)
        for j, owner in enumerate((0, 2, 1)):
            np.testing.assert_allclose(got[0, j], expected[0, j, ..., owner], atol=1e-5)


# --- sites -----------------------------------------------------------------------------------------------------------


def test_sites_of_a_mask_rcnn():
    """What reads one map through one window shares a denoiser: the pyramid with the next stage, classes with boxes."""
    image = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    sites = find_sites(tiny(masks=True), image)
    shared = [[layer.name for layer in site.layers] for site in sites if len(site.layers) > 1]
    assert shared == [
        ["backbone/layer1_0/conv1", "backbone/layer1_0/downsample_conv"],
        *([f"backbone/layer{i + 2}_0/conv1", f"neck/lateral_{i}"] for i in (0, 1, 2)),
        ["rpn/objectness", "rpn/deltas"],
        ["box_head/classes", "box_head/deltas"],
    ]
    by_name = {site.name: site for site in sites}
    heads = [name for name in by_name if not name.startswith(("backbone", "neck"))]
    assert heads == [
        *("rpn/conv", "rpn/objectness", "box_head/fc1", "box_head/fc2", "box_head/classes"),
        *(f"mask_head/conv{i}" for i in (1, 2, 3, 4)),
        *("mask_head/upsample", "mask_head/logits"),
    ]
    assert not by_name["mask_head/upsample"].bias  # its bias is one for four pixels
    assert (by_name["box_head/fc1"].kind, by_name["box_head/fc1"].width) == ("patch", 4 * 49)


@pytest.mark.slow
def test_the_dense_layer_of_wide_regions_is_denoised_by_channels():
    """12,544 numbers a region have no denoiser; 256 channels have."""
    image = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    sites = find_sites(create_model("faster_rcnn_r50", num_classes=80, image_size=SIZE), image)
    by_name = {site.name: site for site in sites}
    assert (by_name["box_head/fc1"].kind, by_name["box_head/fc1"].width) == ("pointwise", 256)
    assert by_name["rpn/conv"].denoiser_shape == (2304, 2304)
    assert len({layer.name for site in sites for layer in site.layers}) == 68


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "detectron"}, 'Unknown implementation "detectron"'),
        ({"trunk": "resnets"}, 'Unknown trunk "resnets". Did you mean "resnet"'),
        ({"depths": (3, 4, 6)}, "depths must be the number of blocks of each of 4 stages"),
        ({"num_classes": -1}, "num_classes must be"),
        ({"keep": 0}, "keep must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_traced(options, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        create_model("rcnn", **{"num_classes": 3, "image_size": SIZE, **TINY, **options})


def test_outputs_for_another_use_and_missing_masks_are_refused():
    module, outputs = tiny(), made_up(tiny(), np.random.default_rng(0))
    with pytest.raises(ConfigError, match="no samples to learn from: call the network with targets"):
        module.losses(outputs, targets(classes=3), SIZE)
    with pytest.raises(ConfigError, match="call the network without targets"):
        module.objects(outputs.replace(samples=Samples(0, 0, 0)), SIZE)
    masked, x = tiny(masks=True), jax.ShapeDtypeStruct((2, *SIZE, 3), jnp.float32)
    with pytest.raises(ConfigError, match="learns from masks, and the labels have none"):
        jax.eval_shape(lambda v, x: masked.apply(v, x, targets=targets(classes=3)), abstract(masked), x)
    with pytest.raises(ConfigError, match="An R-CNN takes images of shape"):
        jax.eval_shape(lambda v, x: masked.apply(v, x), abstract(masked), jax.ShapeDtypeStruct(SIZE, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["resnet", "swin", "swinv2"])
def test_objects_and_gradients_of_a_padded_batch(trunk):
    """Boxes lie inside the images, the second image changes nothing of the first, gradients are finite and arrive."""
    module = tiny(trunk=trunk, masks=True, score=0.0)
    variables, x = random_variables(module), pictures(SIZE)
    x[1, 40:], x[1, :, 70:] = 0, 0
    labels = targets(classes=3)
    labels = labels.replace(masks=jnp.ones((2, 4, *SIZE), bool))

    @jax.jit
    def run(variables, x):
        outputs = module.apply(variables, x, size=PADDED)
        return outputs, module.objects(outputs, SIZE, PADDED)

    @jax.jit
    def learn(params, x):
        outputs = module.apply({**variables, "params": params}, x, size=PADDED, targets=labels)
        return sum(module.losses(outputs, labels, SIZE, PADDED).values())

    outputs, objects = run(variables, x)
    assert np.asarray(objects.valid).all() and (np.asarray(objects.masks) <= 1).all()
    limit = PADDED[:, None, [1, 0, 1, 0]]
    assert ((np.asarray(objects.boxes) >= 0) & (np.asarray(objects.boxes) <= limit)).all()
    changed = x.copy()
    changed[1] += 1
    other, _ = run(variables, changed)
    for one, two in zip(jax.tree.leaves(outputs), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one[0], two[0], atol=1e-4)
    loss, gradients = jax.value_and_grad(learn)(variables["params"], x)
    assert np.isfinite(loss)
    for path, gradient in names_of(gradients).items():
        assert np.isfinite(gradient).all(), path
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["mask_head"]))
    broken, _ = run(variables, np.full_like(x, np.nan))
    assert not np.asarray(broken.valid).any()


@pytest.mark.slow
def test_the_whole_method_on_a_faster_rcnn():
    """Algorithm 1's losses are at the closed form's, fused equals explicit, measured noise is undone in paired proposals."""
    schedule, count = Schedule(beta_end=0.02), 4
    module, x = tiny(score=0.0), smooth_images(4, SIZE)
    variables, sites = random_variables(module), find_sites(module, x)
    moments = collect_moments(module, variables, sites, [(x, np.ones(count, np.float32))])
    denoise = closed_form.closed_form(moments, sites, schedule)
    key, images = jax.random.key(3), jnp.arange(count)
    run = jax.jit(lambda tree: algorithm1_losses(module, variables, tree, sites, schedule, key, images, jnp.asarray(x)))
    losses = run(denoise)
    for name, least in closed_form.expected_losses(moments, sites, schedule).items():
        assert abs(losses[name] - least) < 0.2 * (1 + least), name
    certificate = certify(module, variables, denoise, sites, schedule, jnp.asarray(x[:1]))
    assert certificate.passed, str(certificate)
    noisy = x + 0.3 * np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    found = measure(module, variables, sites, np.stack([x, noisy]), [1.0])
    direct = {"rule": "affine", "steps": 1}
    fused = fuse_exact({"backbone": variables["params"], "denoise": found.denoise}, sites, schedule, **direct)
    forward = jax.jit(lambda params, x: module.apply({**variables, "params": params}, x).anchor_deltas)
    clean, before = forward(variables["params"], x), forward(variables["params"], noisy)
    assert np.linalg.norm(forward(fused, noisy) - clean) < 0.7 * np.linalg.norm(before - clean)
