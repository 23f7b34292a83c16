"""Boundary IoU and the other pixel counts of an image, against the usual loop over the classes.

    PYTHONPATH=. python benchmarks/segmentation.py

One map of 150 classes at 512 x 683 pixels, ratio 0.02, so regions 17 pixels wide. The loop erodes
each class of both maps, by OpenCV as boundary-iou-api does it where that is installed, otherwise by
SciPy's separable minimum filter, which gives the same masks and is faster than repeated erosions.
Both sides count the same pixels, which is checked first.
"""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from benchmarks.common import Parser
from drep_jax.metrics.segmentation import boundary_width, counts

try:
    import cv2
except ImportError:
    cv2 = None

VOID = 255


def region(mask: np.ndarray, width: int) -> np.ndarray:
    """Returns a mask minus its erosion by a square of 3 x 3 pixels, `width` times."""
    padded = np.pad(mask, 1)
    if cv2 is not None:
        inside = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)
    else:
        inside = ndimage.minimum_filter(padded, 2 * width + 1, mode="constant", cval=0)
    return mask - inside[1:-1, 1:-1]


def by_class(labels: np.ndarray, answers: np.ndarray, classes: int, width: int) -> np.ndarray:
    """Returns intersection, labels and answers of the regions of each class, int64 (classes, 3)."""
    valid = labels != VOID
    rows = []
    for k in range(classes):
        label, answer = (region((each == k).astype(np.uint8), width) for each in (labels, answers))
        rows.append([np.sum(label & answer), np.sum(label), np.sum(answer * valid)])
    return np.array(rows)


def maps_of(size: tuple[int, int], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels in cells of about 1/16 of the width, some ignored, and answers that are moved by some pixels."""
    rng = np.random.default_rng(seed)
    cell = max(2, size[1] // 16)
    cells = rng.integers(0, classes, [-(-side // cell) for side in size])
    labels = np.kron(cells, np.ones((cell, cell), np.int64))[: size[0], : size[1]].astype(np.uint8)
    answers = np.roll(labels, (3, 2), (0, 1)).astype(np.int32)
    labels[rng.random(size) < 0.05] = VOID
    return labels, answers


def main(command: Sequence[str] | None = None) -> None:
    """Times both sides in turn and prints a table."""
    parser = Parser(__doc__, height=24, width=32, classes=5, rounds=1)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=683)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(command)
    size = (options.height, options.width)
    labels, answers = maps_of(size, options.classes, seed=0)
    width = boundary_width(size)
    program = jax.jit(lambda a, b: counts(a, b, options.classes))
    arrays = jnp.asarray(labels)[None], jnp.asarray(answers)[None]

    def ours() -> np.ndarray:
        return np.asarray(jax.block_until_ready(program(*arrays))["boundary"][0])

    def loop() -> np.ndarray:
        return by_class(labels, answers, options.classes, width)

    np.testing.assert_array_equal(ours(), loop())
    seconds: dict[str, list[float]] = {"loop": [], "ours": []}
    for _ in range(options.rounds):
        for name, function in (("loop", loop), ("ours", ours)):
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    ratio = np.median(np.array(seconds["loop"]) / np.array(seconds["ours"]))
    how = "OpenCV" if cv2 is not None else "SciPy"
    print(f"{options.classes} classes, {size[0]} x {size[1]} pixels, regions of {width} pixels")
    print(f"{f'loop over the classes ({how})':34s} {1e3 * np.median(seconds['loop']):9.1f} ms")
    print(f"{'all counts at once':34s} {1e3 * np.median(seconds['ours']):9.1f} ms   {ratio:.0f}x faster")


if __name__ == "__main__":
    main()
