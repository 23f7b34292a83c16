"""AP: known cases, a plain loop as the oracle, the compiled statistics, weights, and pycocotools where it is installed."""

import contextlib
import io

import jax
import numpy as np
import pytest

from drep_jax.errors import ConfigError, DataError
from drep_jax.evaluation.intervals import Bootstrap
from drep_jax.metrics.detection import (
    AREAS,
    METRICS,
    THRESHOLDS,
    Detected,
    Truths,
    average_precision,
    average_recall,
    image_statistics,
    of_classes,
    statistics_of_lists,
)
from drep_jax.metrics.detection.overlaps import box_overlaps

IMAGES, CLASSES = 12, 4


def random_set(seed, images=IMAGES, classes=CLASSES):
    """Boxes on a grid, so that IoUs, areas and scores tie; crowds, ignored objects, an absent class, empty images."""
    rng = np.random.default_rng(seed)
    image = np.sort(rng.integers(0, images - 2, 5 * images))
    low, sides = rng.integers(0, 12, (len(image), 2)) * 8.0, rng.integers(1, 16, (len(image), 2)) * 8.0
    boxes = np.concatenate([low, low + sides], axis=1)
    labels = rng.integers(0, classes - 1, len(image))
    areas = np.round(sides.prod(axis=1) * rng.choice([1.0, 0.7], len(image)))
    truths = Truths(image, boxes, labels, rng.uniform(size=len(image)) < 0.1, areas)
    source = rng.integers(0, len(image), 20 * images)
    shifted = boxes[source] + rng.integers(-2, 3, (len(source), 4)) * 8.0 * (rng.uniform(size=(len(source), 1)) < 0.6)
    shifted[:, 2:] = np.maximum(shifted[:, 2:], shifted[:, :2] + 8)
    guessed = np.where(rng.uniform(size=len(source)) < 0.8, labels[source], rng.integers(0, classes, len(source)))
    order = np.argsort(image[source], kind="stable")
    scores = np.round(rng.uniform(size=len(source)), 1)
    return Detected(image[source][order], shifted[order], guessed[order], scores), truths


def plain(detected, truths, iou, area, most=100):
    """AP and recall of each class by the rule of the module's docstring, one box after the other."""
    low, high = AREAS[area]
    crowd, results = np.asarray(truths.crowd, bool), []
    ignored = crowd | (truths.areas < low) | (truths.areas > high)
    for label in range(CLASSES):
        rows = []
        for image in range(IMAGES):
            objects = np.flatnonzero((truths.image == image) & (truths.classes == label))
            mine = np.flatnonzero((detected.image == image) & (detected.classes == label))
            mine = mine[np.argsort(-detected.scores[mine], kind="stable")][:most]
            taken = set()
            for place in mine:
                overlaps = box_overlaps(detected.boxes[[place]], truths.boxes[objects], crowd[objects])[0]
                chosen = None
                for wanted in (False, True):
                    free = [
                        (overlap, number)
                        for number, overlap in zip(objects, overlaps, strict=True)
                        if overlap >= iou and ignored[number] == wanted and (number not in taken or crowd[number])
                    ]
                    if free:
                        chosen = max(free)[1]  # the last of equal ones
                        break
                taken.add(chosen)
                own = np.prod(detected.boxes[place, 2:] - detected.boxes[place, :2])
                lost = ignored[chosen] if chosen is not None else not low <= own <= high
                rows.append((detected.scores[place], chosen is not None and not lost, not lost))
        positives = int((~ignored[truths.classes == label]).sum())
        if not positives:
            results.append((np.nan, np.nan))
            continue
        rows.sort(key=lambda row: -row[0])
        hits = np.cumsum([row[1] for row in rows])
        precision = hits / np.maximum(np.cumsum([row[2] for row in rows]), 1)
        recall = hits / positives
        reached = [max(precision[recall >= limit], default=0.0) for limit in np.linspace(0, 1, 101)]
        results.append((np.mean(reached), recall[-1] if len(rows) else 0.0))
    return np.array(results).T


@pytest.mark.parametrize("seed", [0, 1])
def test_the_lists_agree_with_a_plain_loop(seed):
    detected, truths = random_set(seed)
    statistics = statistics_of_lists(detected, truths, images=IMAGES, num_classes=CLASSES)
    weights = np.ones(IMAGES)
    for iou, area in ((0.5, "all"), (0.75, "small"), (0.5, "medium"), (0.95, "large")):
        ap, recall = plain(detected, truths, iou, area)
        assert np.isnan(ap[CLASSES - 1]) and np.nanmax(ap) > 0.01
        np.testing.assert_allclose(of_classes(statistics, weights, iou=iou, area=area), ap, atol=1e-12)
        options = {"iou": iou, "area": area, "recall": True}
        np.testing.assert_allclose(of_classes(statistics, weights, **options), recall, atol=1e-12)
    _, recall = plain(detected, truths, 0.5, "all", most=1)
    np.testing.assert_allclose(average_recall(statistics, weights, iou=0.5, most=1), np.nanmean(recall))


@pytest.mark.parametrize("seed", range(4))
def test_the_twelve_numbers_are_those_of_pycocotools(seed):
    coco = pytest.importorskip("pycocotools.coco", reason="needs pycocotools: pip install -r requirements-parity.txt")
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    detected, truths = random_set(seed)

    def sides(box):
        return [*box[:2], *(box[2:] - box[:2])]

    objects = [
        {
            "id": n + 1,
            "image_id": int(image),
            "category_id": int(label),
            "bbox": sides(box),
            "area": area,
            "iscrowd": int(crowd),
        }
        for n, (image, box, label, crowd, area) in enumerate(
            zip(truths.image, truths.boxes, truths.classes, truths.crowd, truths.areas, strict=True)
        )
    ]
    found = [
        {"image_id": int(image), "category_id": int(label), "bbox": sides(box), "score": score}
        for image, box, label, score in zip(
            detected.image, detected.boxes, detected.classes, detected.scores, strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco.COCO()
        reference.dataset = {
            "images": [{"id": image} for image in range(IMAGES)],
            "categories": [{"id": label} for label in range(CLASSES)],
            "annotations": objects,
        }
        reference.createIndex()
        run = evaluation(reference, reference.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    statistics = statistics_of_lists(detected, truths, images=IMAGES, num_classes=CLASSES)
    ours = [float(metric(statistics, np.ones(IMAGES))) for metric in METRICS.values()]
    np.testing.assert_allclose(np.nan_to_num(ours, nan=-1), run.stats, atol=1e-14)


def padded(values, image, fill=0):
    width = 1 << int(np.bincount(image, minlength=IMAGES).max() - 1).bit_length()
    out = np.full((IMAGES, width, *values.shape[1:]), fill, values.dtype)
    valid = np.zeros((IMAGES, width), bool)
    for row in range(IMAGES):
        mine = np.flatnonzero(image == row)
        out[row, : len(mine)], valid[row, : len(mine)] = values[mine], True
    return out, valid


def test_the_compiled_statistics_are_those_of_the_lists():
    """All numbers of the set are exact in float32, so the bits are the same."""
    program = jax.jit(lambda **arrays: image_statistics(**arrays, num_classes=CLASSES))
    for seed in (2, 3):
        detected, truths = random_set(seed)
        # Padding must not count, whatever is in it.
        boxes, valid = padded(detected.boxes.astype(np.float32), detected.image, 8)
        scores, classes = (padded(values, detected.image, 1)[0] for values in (detected.scores, detected.classes))
        truth_boxes, truth_valid = padded(truths.boxes.astype(np.float32), truths.image, 8)
        labels, crowd, areas = (padded(v, truths.image, 1)[0] for v in (truths.classes, truths.crowd, truths.areas))
        compiled = program(
            boxes=boxes,
            scores=scores.astype(np.float32),
            classes=classes.astype(np.int32),
            valid=valid,
            truth_boxes=truth_boxes,
            truth_classes=labels.astype(np.int32),
            truth_valid=truth_valid,
            crowd=crowd,
            areas=areas.astype(np.float32),
        )
        lists = statistics_of_lists(detected, truths, images=IMAGES, num_classes=CLASSES)
        width = lists["scores"].shape[1]
        for name, values in lists.items():
            part = np.asarray(compiled[name])[:, :width] if name != "truths" else compiled[name]
            np.testing.assert_array_equal(part, values.astype(part.dtype), err_msg=name)
        assert (np.asarray(compiled["classes"])[:, width:] == -1).all()


def test_weights_are_counts_of_images():
    """A weight of 2 is the image twice, a weight of 0 is no image; rows of weights are resamples side by side."""
    detected, truths = random_set(4)
    detected.scores[:] += np.arange(len(detected.scores)) * 1e-6  # of ties, copies would interleave
    statistics = statistics_of_lists(detected, truths, images=IMAGES, num_classes=CLASSES)
    weights = np.random.default_rng(0).integers(0, 3, (3, IMAGES)).astype(np.float64)
    for name, metric in METRICS.items():
        side_by_side = metric(statistics, weights)
        assert side_by_side.shape == (3,)
        for row, value in zip(weights.astype(int), side_by_side, strict=True):
            repeated = {key: np.repeat(values, row, axis=0) for key, values in statistics.items()}
            np.testing.assert_allclose(metric(repeated, np.ones(row.sum())), value, atol=1e-12, err_msg=name)
    assert abs(side_by_side[0] - METRICS["AP"](statistics, np.ones(IMAGES))) > 1e-3
    every = of_classes(statistics, np.ones(IMAGES))
    chosen = average_precision(statistics, np.ones(IMAGES), class_weights=np.array([0.0, 3.0, 1.0, 5.0]))
    np.testing.assert_allclose(chosen, (3 * every[1] + every[2]) / 4)


def test_two_arms_are_resampled_together():
    detected, truths = random_set(5)
    better = Detected(truths.image, truths.boxes, truths.classes, np.ones(len(truths.image)))
    arms = [statistics_of_lists(d, truths, images=IMAGES, num_classes=CLASSES) for d in (better, detected)]
    assert float(METRICS["AP"](arms[0], np.ones(IMAGES))) > 0.99
    bootstrap = Bootstrap(IMAGES, resamples=200, seed=0)
    values = bootstrap.values({place: (METRICS["AP50"], arm) for place, arm in enumerate(arms)})
    difference = float(METRICS["AP50"](arms[0], np.ones(IMAGES)) - METRICS["AP50"](arms[1], np.ones(IMAGES)))
    interval = bootstrap.interval(difference, values[0] - values[1])
    assert interval.significant and interval.low < difference < interval.high


def test_masks_have_their_own_overlaps_and_areas():
    masks = [np.zeros((40, 40), bool) for _ in range(4)]
    masks[0][:20, :20], masks[1][:20, :10], masks[2][20:, 20:], masks[3][:40] = True, True, True, True
    boxes = np.tile([0.0, 0.0, 40.0, 40.0], (4, 1))
    labels = np.zeros(2, int)
    truths = Truths(labels, boxes[:2], labels, np.array([False, True]), masks=[masks[0], masks[3]])
    detected = Detected(labels, boxes[:2], labels, np.array([0.9, 0.8]), masks=[masks[1], masks[2]])
    statistics = statistics_of_lists(detected, truths, images=1, num_classes=1)
    # IoU 0.5 with the object at the first threshold; the other lies in the crowd and counts for nothing.
    assert statistics["matched"][0, :, 0].tolist() == [1, 0]
    assert statistics["ignored"][0, :, 0].tolist() == [
        2**10 - 2,
        2**10 - 1,
    ]  # above it, the first lies in the crowd, too
    assert statistics["truths"][0, 0].tolist() == [1, 1, 0, 0]
    assert float(average_precision(statistics, np.ones(1), iou=0.5)) == pytest.approx(1.0)


def test_nothing_found_nothing_asked_and_bad_input():
    detected, truths = random_set(6)
    none = Detected(*(values[:0] for values in (detected.image, detected.boxes, detected.classes, detected.scores)))
    empty = statistics_of_lists(none, truths, images=IMAGES, num_classes=CLASSES)
    assert [float(metric(empty, np.ones(IMAGES))) for name, metric in METRICS.items()] == [0.0] * 12
    without = Truths(truths.image[:0], truths.boxes[:0], truths.classes[:0])
    nothing = statistics_of_lists(detected, without, images=IMAGES, num_classes=CLASSES)
    assert all(np.isnan(metric(nothing, np.ones(IMAGES))) for metric in METRICS.values())
    crowds = Truths(truths.image, truths.boxes, truths.classes, np.ones(len(truths.image), bool))
    assert np.isnan(
        METRICS["AP"](statistics_of_lists(detected, crowds, images=IMAGES, num_classes=CLASSES), np.ones(IMAGES))
    )
    many = Detected(np.zeros(150, int), np.tile([0.0, 0, 8, 8], (150, 1)), np.zeros(150, int), np.linspace(1, 0, 150))
    assert statistics_of_lists(many, truths, images=IMAGES, num_classes=CLASSES)["scores"].shape == (IMAGES, 100)
    for change, message in (
        ({"classes": truths.classes + CLASSES}, "Are numbers of COCO's categories"),
        ({"image": truths.image + IMAGES}, "has the image"),
        ({"boxes": truths.boxes * np.nan}, "NaN"),
        ({"areas": truths.areas[1:]}, "one entry of each list"),
        ({"masks": [None] * len(truths.image)}, "needs a mask for every"),
    ):
        with pytest.raises(DataError, match=message):
            statistics_of_lists(detected, Truths(**{**vars(truths), **change}), images=IMAGES, num_classes=CLASSES)
    for options in ({"iou": 0.52}, {"area": "tiny"}):
        with pytest.raises(ConfigError, match=r"0\.95|medium"):
            average_precision(empty, np.ones(IMAGES), **options)
    assert len(THRESHOLDS) == 10
