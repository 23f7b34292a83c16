"""Pixel counts, mIoU and boundary IoU against loops over classes in NumPy and SciPy, and against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import confusion_matrix, jaccard_score

from drep_jax.data.resampling import bilinear
from drep_jax.metrics import label_maps, segmentation
from drep_jax.metrics.label_maps import classes_of, in_blocks, largest, resized
from drep_jax.metrics.segmentation import METRICS, boundary_region, boundary_width, counts, ignored_share

VOID = 255
CASES = (((1, 9), 0.02), ((12, 17), 0.02), ((23, 16), 0.2))
"""Sizes and ratios; few, since each is compiled."""

COUNTS = jax.jit(counts, static_argnums=2, static_argnames="ratio")


def region(mask, width):
    """A mask minus its erosion by a square of 3 x 3 pixels, `width` times; the outside is no part of it."""
    inside = ndimage.binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=width)[1:-1, 1:-1]
    return mask & ~inside


def by_class(labels, answers, classes, width):
    """Counts of one image, class by class, as the definition says it."""
    rows = []
    valid = labels != VOID
    for k in range(classes):
        label, answer = labels == k, answers == k
        near_label, near_answer = region(label, width), region(answer, width)
        rows.append(
            [
                [np.sum(label & answer), np.sum(label), np.sum(answer & valid)],
                [np.sum(near_label & near_answer), np.sum(near_label), np.sum(near_answer & valid)],
            ]
        )
    return np.array(rows).swapaxes(0, 1)


def maps_of(rng, shape, classes, void):
    """Blobs of classes, with ignored ones among the labels, and answers of which some are no class."""
    cell = int(rng.integers(1, 7))
    coarse = [-(-side // cell) for side in shape]
    labels, answers = (
        np.kron(rng.integers(0, classes, coarse), np.ones((cell, cell), int))[: shape[0], : shape[1]] for _ in range(2)
    )
    answers = np.where(rng.random(shape) < 0.6, labels, answers)
    labels = np.where(rng.random(shape) < void, VOID, labels)
    answers = np.where(rng.random(shape) < 0.05, classes, answers)
    return labels.astype(np.uint8), answers.astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(CASES), st.sampled_from((0.0, 0.2, 1.0)))
def test_counts_are_those_of_a_loop_over_the_classes(seed, case, void):
    rng = np.random.default_rng(seed)
    shape, ratio = case
    labels, answers = maps_of(rng, shape, 3, void)
    counted = COUNTS(labels[None], answers[None], 3, ratio=ratio)
    pixels, boundary = by_class(labels, answers, 3, boundary_width(shape, ratio))
    np.testing.assert_array_equal(counted["pixels"][0], pixels)
    np.testing.assert_array_equal(counted["boundary"][0], boundary)
    assert int(counted["size"][0]) == labels.size and counted["pixels"].dtype == jnp.int32


def test_widths_and_regions_are_the_published_ones():
    sizes = {(683, 512): 17, (512, 512): 14, (480, 360): 12, (640, 480): 16, (341, 256): 9, (2048, 1024): 46}
    assert {size: boundary_width(size) for size in sizes} == sizes
    one, regions = np.zeros((1, 9, 9), np.int32), jax.jit(boundary_region, static_argnums=1)
    edge = np.ones((9, 9), bool)
    edge[2:7, 2:7] = False
    np.testing.assert_array_equal(regions(one, 2)[0], edge)  # the border of the image counts
    one[0, 4, 4] = 7  # numbers of classes do not matter
    everything = np.asarray(regions(one, 2)[0])
    assert everything.all()


@pytest.fixture(scope="module")
def some():
    """Counts of six images of five classes, of which class 3 is never labeled and 4 is nowhere; and all their pixels."""
    rng = np.random.default_rng(0)
    pairs = [maps_of(rng, (12, 17), 4, 0.1) for _ in range(6)]
    labels, answers = (np.stack(each) for each in zip(*pairs, strict=True))
    labels[labels == 3] = 0
    answers[answers == 4] = 9  # no class at all
    return COUNTS(labels, answers, 5), labels, answers


def test_metrics_are_those_of_scikit_learn_over_the_set(some):
    statistics, labels, answers = some
    valid = labels != VOID
    truth, said = labels[valid], answers[valid]
    values = {name: float(metric(statistics, np.ones(6))) for name, metric in METRICS.items()}
    scores = jaccard_score(truth, said, labels=[0, 1, 2, 3], average=None)
    assert scores[3] == 0 and np.any(said == 3)  # answered but never labeled: counts as 0
    assert values["mIoU"] == pytest.approx(np.mean(scores))  # class 4 is left out
    matrix = confusion_matrix(truth, said, labels=[0, 1, 2, 3, 4])  # answers that are no class are in none
    assert values["mAcc"] == pytest.approx(np.mean([np.mean(said[truth == k] == k) for k in range(3)]))
    assert values["aAcc"] == pytest.approx(np.trace(matrix) / len(truth))
    each = segmentation.class_ious(statistics, np.ones(6))
    assert np.isnan(each[4]) and each[:4] == pytest.approx(scores)
    mean_of_images = np.mean([float(METRICS["mIoU"](statistics, weights)) for weights in np.eye(6)])
    assert abs(mean_of_images - values["mIoU"]) > 0.01, "the mean of the images is another number"
    assert ignored_share(statistics) == pytest.approx(np.mean(~valid))


def test_weights_resample_images(some):
    statistics, labels, answers = some
    weights = np.array([0.0, 2.0, 1.0, 0.0, 3.0, 0.0])
    drawn = np.repeat(np.arange(6), weights.astype(int))
    again = COUNTS(labels[drawn], answers[drawn], 5)
    for name, metric in METRICS.items():
        assert float(metric(statistics, weights)) == pytest.approx(float(metric(again, np.ones(6)))), name
        many = metric(statistics, np.stack([weights, np.ones(6)]))
        assert many.shape == (2,) and many[0] == pytest.approx(float(metric(statistics, weights)))


def test_nothing_labeled_has_no_score_and_one_class_has():
    zeros = np.zeros((6, 12, 17), np.int32)
    nothing = COUNTS(np.full((6, 12, 17), VOID, np.uint8), zeros, 5)
    assert all(np.isnan(metric(nothing, np.ones(6))) for metric in METRICS.values())
    everything = COUNTS(zeros.astype(np.uint8), zeros, 5)
    assert all(metric(everything, np.ones(6)) == 1.0 for metric in METRICS.values())


def test_counts_do_not_round_as_float32_would():
    rows = {"pixels": np.full((3, 1, 3), 2**24 + 1, np.int32)}
    both = segmentation.totals(rows, np.ones(3), "pixels")
    assert both[0, 0] == 3 * (2**24 + 1)


@pytest.mark.parametrize("sizes", [((9, 14),), ((4, 5),), ((10, 9), (7, 13)), ((5, 6),)])
def test_logits_are_resized_bilinearly_in_blocks_of_rows(sizes, monkeypatch):
    """Enlarged and shrunk, without antialiasing, one or two times, as in NumPy; the blocks are those of the whole."""
    logits = np.random.default_rng(0).normal(size=(2, 5, 6, 4)).astype(np.float32)
    expected = list(logits)
    for size in sizes:
        expected = [bilinear(each, size) for each in expected]
    rows = np.arange(2 * np.prod(sizes[-1]), dtype=np.int32).reshape(2, *sizes[-1])

    def answers(logits, rows):
        def weighted(wide, valid, rows):
            return jnp.sum(rows * valid[None, :, None] * wide[..., 0])

        return resized(logits, sizes), classes_of(logits, sizes), in_blocks(logits, sizes, weighted, rows)

    for numbers, several in ((2**23, False), (100, True)):
        monkeypatch.setattr(label_maps, "BLOCK_NUMBERS", numbers)
        wide, classes, parts = jax.jit(lambda *arrays: answers(*arrays))(logits, rows)
        np.testing.assert_allclose(wide, expected, atol=1e-5)
        np.testing.assert_array_equal(classes, np.argmax(expected, axis=-1))
        assert (len(parts) > 1) == several
        assert float(jnp.sum(parts)) == pytest.approx(float(np.sum(rows * np.stack(expected)[..., 0])), rel=1e-4)


def test_a_pixel_without_a_finite_logit_has_no_class():
    logits = jnp.array([[1.0, 1.0, 0.0], [jnp.nan, 2.0, 0.0], [0.0, jnp.inf, 0.0], [-jnp.inf, 0.0, 1.0]])
    assert largest(logits).tolist() == [0, 3, 3, 2]
