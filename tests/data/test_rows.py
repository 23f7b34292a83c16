"""Boxes taken back inside a program are those of `Transform.inverse`."""

import jax
import numpy as np

from drep_jax.data.geometry import Transform
from drep_jax.data.rows import boxes_back


def test_boxes_come_back_through_every_kind_of_step():
    rng = np.random.default_rng(0)
    transforms, boxes = [], []
    for number in range(60):
        transform = Transform((int(rng.integers(20, 60)), int(rng.integers(20, 60))))
        for _ in range(rng.integers(0, 7)):
            height, width = transform.size_out
            kind = rng.integers(0, 3)
            if kind == 0:
                transform = transform.orient(int(rng.integers(1, 9)))
            elif kind == 1:
                transform = transform.resize((int(rng.integers(15, 70)), int(rng.integers(15, 70))))
            else:
                top, left = (int(value) for value in rng.integers(-6, 6, 2))
                transform = transform.window(top, left, height + number % 5 - 2, width + 3)
        height, width = transform.size_out
        corners = np.sort(rng.uniform(0, 1, (4, 2, 2)), axis=1) * [width, height]
        transforms.append(transform)
        boxes.append(corners.reshape(4, 4))
    kinds = {type(step).__name__ for transform in transforms for step in transform.steps}
    assert kinds == {"Orient", "Resize", "Window"}
    rows = np.stack([transform.row() for transform in transforms])
    back = jax.jit(boxes_back)(rows, np.stack(boxes).astype(np.float32))
    expected = [transform.inverse().boxes(box, clip=False)[0] for transform, box in zip(transforms, boxes, strict=True)]
    np.testing.assert_allclose(back, np.stack(expected), rtol=1e-4, atol=2e-3)
    assert np.isfinite(boxes_back(np.zeros((1, rows.shape[1]), np.int32), np.zeros((1, 2, 4), np.float32))).all()
