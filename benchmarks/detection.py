"""Time of average precision at the size of COCO's val2017, against pycocotools and faster-coco-eval.

    PYTHONPATH=. python benchmarks/detection.py                       # 5,000 images
    PYTHONPATH=. python benchmarks/detection.py --images=500 --rounds=3 --resamples=1000

A made-up set with as many images, boxes, detections and classes, with crowds and equal scores. Each
side reads the same lists in memory: "load" builds what the library needs of them, "evaluate" gives
the twelve numbers, "processor" is the processor time of both. pycocotools and faster-coco-eval are
measured where they are installed. The last line is the bootstrap of AP, which needs the matches
that we keep: the time of that many resamples of one arm.
"""

import contextlib
import importlib
import io
import statistics
import time

import numpy as np

from benchmarks.common import Parser
from drep_jax.evaluation.intervals import Bootstrap
from drep_jax.metrics.detection import METRICS, Detected, Truths, statistics_of_lists

BOXES, FOUND = 7.39, 31.11
"""Boxes and detections an image: 36,951 and 155,549 of 5,000, as val2017 has and a detector gives."""
CLASSES = 80
PACKAGES = {"pycocotools": ("pycocotools.coco", "pycocotools.cocoeval"), "faster-coco-eval": ("faster_coco_eval",) * 2}
NAMES = {"pycocotools": ("COCO", "COCOeval"), "faster-coco-eval": ("COCO", "COCOeval_faster")}


def made_up(images, seed=0):
    """Returns detections and objects."""
    rng = np.random.default_rng(seed)
    count, found = round(BOXES * images), round(FOUND * images)
    image = np.sort(rng.integers(0, images, count))
    sides = np.exp(rng.normal(4, 1, (count, 2)))
    low = rng.uniform(0, 500, (count, 2))
    boxes = np.concatenate([low, low + sides], axis=1)
    frequency = 1 / np.arange(1, CLASSES + 1)
    labels = rng.choice(CLASSES, count, p=frequency / frequency.sum())
    truths = Truths(
        image, boxes, labels, rng.uniform(size=count) < 0.01, sides.prod(axis=1) * rng.uniform(0.4, 1, count)
    )
    source = np.sort(rng.integers(0, count, found))
    moved = boxes[source] + rng.normal(0, 0.1, (found, 4)) * np.tile(sides[source], 2)
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    guessed = np.where(rng.uniform(size=found) < 0.7, labels[source], rng.integers(0, CLASSES, found))
    return Detected(image[source], moved, guessed, np.round(rng.uniform(size=found), 3)), truths


def as_dicts(detected, truths, images):
    """Returns the same as COCO's lists of dicts."""

    def sides(boxes):
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()

    rows = zip(truths.image, truths.classes, sides(truths.boxes), truths.areas, truths.crowd, strict=True)
    objects = [
        {
            "id": n,
            "image_id": int(i) + 1,
            "category_id": int(c) + 1,
            "bbox": box,
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for n, (i, c, box, area, crowd) in enumerate(rows, 1)
    ]
    rows = zip(detected.image, detected.classes, sides(detected.boxes), detected.scores, strict=True)
    found = [
        {"image_id": int(i) + 1, "category_id": int(c) + 1, "bbox": box, "score": float(score)}
        for i, c, box, score in rows
    ]
    categories = [{"id": c + 1, "name": str(c)} for c in range(CLASSES)]
    listed = [{"id": i + 1, "width": 640, "height": 640} for i in range(images)]
    return {"images": listed, "annotations": objects, "categories": categories}, found


def theirs(package, dicts):
    """Returns seconds of loading, evaluating and processor, and the twelve numbers; None where it is not installed."""
    try:
        modules = [importlib.import_module(name) for name in PACKAGES[package]]
    except ImportError:
        return None
    coco, evaluation = (getattr(module, name) for module, name in zip(modules, NAMES[package], strict=True))
    annotations, found = dicts
    with contextlib.redirect_stdout(io.StringIO()):
        start, processor = time.perf_counter(), time.process_time()
        reference = coco()
        reference.dataset = annotations
        reference.createIndex()
        results = reference.loadRes(found)
        loaded = time.perf_counter()
        run = evaluation(reference, results, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
        end = time.perf_counter()
        processor = time.process_time() - processor
    return loaded - start, end - loaded, processor, np.array(run.stats[:12])


def ours(detected, truths, images):
    start, processor = time.perf_counter(), time.process_time()
    rows = statistics_of_lists(detected, truths, images=images, num_classes=CLASSES)
    numbers = np.array([float(metric(rows, np.ones(images))) for metric in METRICS.values()])
    return 0.0, time.perf_counter() - start, time.process_time() - processor, numbers


def main(command=None):
    parser = Parser(__doc__, images=12, rounds=1, resamples=100)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=1, help="times that each side is measured, in turns")
    parser.add_argument("--resamples", type=int, default=100, help="of the bootstrap")
    options = parser.parse_args(command)
    detected, truths = made_up(options.images)
    dicts = as_dicts(detected, truths, options.images)
    print(
        f"{options.images:,} images, {len(truths.image):,} boxes, {len(detected.image):,} detections, {CLASSES} classes"
    )
    sides = {
        "drep_jax": lambda: ours(detected, truths, options.images),
        **{package: lambda package=package: theirs(package, dicts) for package in PACKAGES},
    }
    times = {side: [] for side in sides}
    numbers = {}
    for _ in range(options.rounds):
        for side, run in sides.items():
            measured = run()
            if measured is not None:
                times[side].append(measured[:3])
                numbers[side] = measured[3]
    print("| | load | evaluate | processor | largest difference of the twelve numbers |\n|---|---|---|---|---|")
    for side, rows in times.items():
        if not rows:
            print(f"| {side} | not installed | | | |")
            continue
        load, evaluate, processor = (statistics.median(column) for column in zip(*rows, strict=True))
        difference = np.nanmax(np.abs(np.where(numbers[side] < 0, np.nan, numbers[side]) - numbers["drep_jax"]))
        print(f"| {side} | {load:.2f} s | {evaluate:.2f} s | {processor:.2f} s | {difference:.1e} |")
    rows = statistics_of_lists(detected, truths, images=options.images, num_classes=CLASSES)
    start = time.perf_counter()
    Bootstrap(options.images, resamples=options.resamples).values({"AP": (METRICS["AP"], rows)})
    print(f"{options.resamples} resamples of AP: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
