"""Boxes: overlaps, coders, suppression and proposals against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drep_jax.errors import ConfigError
from drep_jax.models.detectors import coders
from drep_jax.models.detectors.nms import nms
from drep_jax.models.detectors.overlaps import box_iou, generalized_iou
from drep_jax.models.detectors.proposals import best, best_of_levels, best_pairs, suppressed

COUNT = 12


def iou_of(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def greedy(boxes, scores, classes, valid, threshold):
    """Plain greedy suppression: indices kept."""
    keep = []
    for i in sorted(np.flatnonzero(valid), key=lambda i: (-scores[i], i)):
        if all(classes[i] != classes[j] or iou_of(boxes[i], boxes[j]) <= threshold for j in keep):
            keep.append(i)
    return keep


@st.composite
def candidates(draw):
    """Boxes on a coarse grid, so that ties, equal boxes, empty ones and IoUs of exactly a half occur."""
    whole = st.integers(0, 6)
    boxes = np.array([[draw(whole), draw(whole), 0, 0] for _ in range(COUNT)], np.float32)
    boxes[:, 2:] = boxes[:, :2] + np.array([[draw(st.integers(0, 4)), draw(st.integers(0, 4))] for _ in range(COUNT)])
    scores = np.array([draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, np.nan])) for _ in range(COUNT)], np.float32)
    classes = np.array([draw(st.integers(0, 1)) for _ in range(COUNT)], np.int32)
    valid = np.array([draw(st.booleans()) for _ in range(COUNT)])
    boxes[draw(st.integers(0, COUNT - 1)), draw(st.integers(0, 3))] = draw(st.sampled_from([np.nan, np.inf, 1.0]))
    return boxes, scores, classes, valid


@jax.jit
def all_forms(boxes, scores, classes, valid):
    return [
        nms(boxes, scores, 0.5, classes=classes, valid=valid, form=form)
        for form in ("auto", "sequential", "fixed_point")
    ] + [suppressed(boxes, scores, classes, threshold=0.5, k=5, valid=valid), box_iou(boxes, boxes)]


@settings(max_examples=60, deadline=None)
@given(candidates())
def test_suppression_is_greedy_in_every_form(case):
    boxes, scores, classes, valid = case
    usable = valid & np.isfinite(boxes).all(axis=1) & ~np.isnan(scores)
    keep = greedy(boxes, scores, classes, usable, 0.5)
    *forms, objects, overlaps = all_forms(*case)
    for form in forms:
        assert np.flatnonzero(form).tolist() == sorted(keep)
    top = keep[:5]
    assert objects.valid.tolist() == [True] * len(top) + [False] * (5 - len(top))
    np.testing.assert_array_equal(objects.boxes[: len(top)], boxes[top])
    np.testing.assert_array_equal(objects.scores[: len(top)], scores[top])
    assert objects.classes.tolist() == [*classes[top], *[-1] * (5 - len(top))]
    finite = np.isfinite(boxes).all(axis=1)
    expected = [[iou_of(a, b) for b in boxes[finite]] for a in boxes[finite]]
    np.testing.assert_allclose(np.asarray(overlaps)[finite][:, finite], np.reshape(expected, (finite.sum(),) * 2), 1e-6)


def test_chains_need_as_many_rounds_as_they_are_long():
    """Each box overlaps the next only, so every second one is kept: a fixed number of rounds would not do."""
    left = np.arange(40, dtype=np.float32) * 2
    boxes = np.stack([left, 0 * left, left + 6, 0 * left + 1], axis=1)
    scores = np.linspace(1, 0.1, 40, dtype=np.float32)
    keep = greedy(boxes, scores, np.zeros(40), np.ones(40, bool), 0.45)
    assert keep == list(range(0, 40, 2))

    @jax.jit
    def batched(boxes, scores):
        forms = ("sequential", "fixed_point")
        return [jax.vmap(lambda b, s, form=form: nms(b, s, 0.45, form=form))(boxes, scores) for form in forms]

    order = np.random.default_rng(0).permutation(40)
    for first, second in batched(np.stack([boxes, boxes[order]]), np.stack([scores, scores[order]])):
        assert np.flatnonzero(first).tolist() == keep
        assert sorted(order[np.flatnonzero(second)].tolist()) == keep
    with pytest.raises(ConfigError, match="fixed_point"):
        nms(boxes, scores, 0.5, form="fixed")


def test_the_best_of_fewer_more_and_levels():
    scores = jnp.array([0.3, jnp.nan, 0.9, 0.3, 0.05])
    choose = jax.jit(best, static_argnums=1)
    one = choose(scores, 7, threshold=0.1)
    assert one.index.tolist() == [2, 0, 3, 0, 0, 0, 0] and one.valid.tolist() == [True] * 3 + [False] * 4
    np.testing.assert_allclose(one.scores, [0.9, 0.3, 0.3, -1, -1, -1, -1])
    two = choose(scores, 2, threshold=0.1)
    assert two.index.tolist() == [2, 0] and int(two.left_out) == 1
    levels = best_of_levels([scores, jnp.array([0.2, 0.7]), jnp.array([0.6])], 2)
    assert levels.index.tolist() == [2, 0, 6, 5, 7] and int(levels.left_out) == 2
    pairs, box, label = best_pairs(jnp.array([[0.1, 0.8], [0.7, 0.01]]), 3, threshold=0.05)
    assert box.tolist() == [0, 1, 0] and label.tolist() == [1, 0, 0] and pairs.valid.all()


def test_generalized_overlap_of_nested_distant_and_empty_boxes():
    one = jnp.array([[0.0, 0.0, 2.0, 2.0]])
    others = jnp.array([[0.0, 0.0, 2.0, 1.0], [3.0, 0.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    generalized = jax.jit(generalized_iou)
    np.testing.assert_allclose(generalized(one, others), [[0.5, -2 / 8, 0.0]], atol=1e-6)
    empty = jnp.zeros((1, 4))
    assert float(generalized(empty, empty)[0, 0]) == 0.0 == float(box_iou(empty, empty)[0, 0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_coders_are_inverse(seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64():
        centers = rng.uniform(0, 100, (2, 5, 2))
        sides = rng.uniform(1, 50, (2, 2, 5, 2))
        boxes, anchors = (np.concatenate([centers - s / 2, centers + s / 2], axis=-1) for s in sides)
        np.testing.assert_allclose(coders.from_centers(coders.to_centers(boxes)), boxes, atol=1e-12)
        anchors[..., ::2] += rng.uniform(-3, 3, (2, 5, 1))
        deltas = coders.encode_deltas(boxes, anchors, stds=coders.RCNN_STDS)
        np.testing.assert_allclose(coders.decode_deltas(deltas, anchors, stds=coders.RCNN_STDS), boxes, atol=1e-9)
        points = rng.uniform(0, 100, (2, 5, 2))
        np.testing.assert_allclose(coders.decode_distances(coders.encode_distances(boxes, points), points), boxes)
        cells = np.concatenate([centers, centers], axis=-1) + rng.uniform(-3.9, 3.9, (2, 5, 1))
        cells += np.array([-1.0, -1, 1, 1]) * 7
        targets = coders.encode_yolo(boxes, cells, 8)
        outputs = np.concatenate([np.log(targets[..., :2] / (1 - targets[..., :2])), targets[..., 2:]], axis=-1)
        np.testing.assert_allclose(coders.decode_yolo(outputs, cells, 8), boxes, atol=1e-9)


def test_bounds_of_coders():
    anchor = jnp.array([[0.0, 0.0, 16.0, 16.0]])
    huge, tiny = jnp.array([[0.0, 0.0, 9.0, 9.0]]), jnp.array([[0.0, 0.0, -9.0, -9.0]])
    np.testing.assert_allclose(coders.decode_deltas(huge, anchor)[0, 2] - 8, 500, rtol=1e-5)
    side = {
        below: coders.to_centers(coders.decode_deltas(tiny, anchor, clamp_below=below))[0, 2] for below in (True, False)
    }
    np.testing.assert_allclose([side[True], side[False]], [16 * 16 / 1000, 16 * np.exp(-9)], rtol=1e-3)
    clipped = coders.clip_boxes(jnp.array([[[-5.0, 2.0, 70.0, 99.0]]]), jnp.array([[40, 60]]))
    assert clipped.tolist() == [[[0.0, 2.0, 60.0, 40.0]]]
    double = coders.decode_yolo(jnp.array([[40.0, -40.0, 0.0, 0.0]]), anchor, (4, 6), scale_xy=2.0)
    assert double.tolist() == [[6.0, -4.0, 22.0, 12.0]]
