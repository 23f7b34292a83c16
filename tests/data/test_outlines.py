"""Masks as polygons, runs and text, against pycocotools where it is installed, and there and back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drep_jax.data import open_source
from drep_jax.data.objects.outlines import counts_of_text, mask_of, runs_of, text_of_counts
from drep_jax.errors import DataError
from drep_jax.metrics.detection.overlaps import mask_overlaps


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_runs_there_and_back(seed, height, width):
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=(height, width)) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    runs = runs_of(mask)
    assert (mask_of(runs, mask.shape) == mask).all()
    counts = counts_of_text(runs["counts"])
    assert (mask_of({"size": [height, width], "counts": counts}, mask.shape) == mask).all()
    large = (rng.integers(0, 2**40, 9)).tolist()
    assert counts_of_text(text_of_counts(large)) == large


def test_a_square_and_a_hole():
    square = mask_of([[1, 1, 4, 1, 4, 3, 1, 3]], (5, 6))
    assert square.sum() == 6 and square[1:3, 1:4].all()
    both = mask_of([[1, 1, 4, 1, 4, 3, 1, 3], [0, 0, 2, 0, 2, 2, 0, 2]], (5, 6))
    assert both.sum() == 9 and both[0, 0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools, with NumPy 2
def test_pycocotools_draws_and_writes_the_same():
    coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools: pip install -r requirements-dev.txt")
    rng = np.random.default_rng(0)
    masks = []
    for number in range(60):
        size = (int(rng.integers(5, 50)), int(rng.integers(5, 50))) if number < 50 else (30, 40)
        corners = rng.uniform(-4, 55, (int(rng.integers(3, 9)), 2))
        corners = np.round(corners) if number % 3 == 0 else corners
        polygons = [corners.reshape(-1).tolist(), rng.uniform(0, 30, 8).tolist()]
        theirs = coco.decode(coco.merge(coco.frPyObjects(polygons, *size))).astype(bool)
        ours = mask_of(polygons, size)
        np.testing.assert_array_equal(ours, theirs, err_msg=str(number))
        runs = coco.encode(np.asfortranarray(ours.astype(np.uint8)))
        assert runs_of(ours)["counts"] == runs["counts"].decode()
        masks.append((ours, runs))
    last = masks[50:]
    crowd = np.arange(5) % 2 == 1
    overlaps = mask_overlaps(np.stack([m for m, _ in last[:5]]), np.stack([m for m, _ in last[5:]]), crowd)
    np.testing.assert_allclose(overlaps, coco.iou([r for _, r in last[:5]], [r for _, r in last[5:]], crowd.tolist()))


def test_masks_of_an_image_and_bad_ones(tmp_path):
    (tmp_path / "test").mkdir()
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "test" / "a.png")
    square = {"bbox": [1, 1, 3, 2], "area": 6, "image_id": 1, "category_id": 1}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 5, "width": 6}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {**square, "id": 1, "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]]},
            {**square, "id": 2, "bbox": [0, 0, 0, 1], "segmentation": [[0, 0, 1, 1, 1, 0]]},
            {**square, "id": 3, "iscrowd": 1, "segmentation": {"size": [5, 6], "counts": [0, 5, 25]}},
        ],
    }

    def masks():
        (tmp_path / "test.json").write_text(json.dumps(content))
        return open_source(f"det_folder:{tmp_path}", "test", image_size=(8, 8)).masks(0)

    assert masks().sum(axis=(1, 2)).tolist() == [6, 5]  # that of the empty box has gone with it
    content["annotations"][0]["segmentation"] = [[1, 1, 4, 1]]
    with pytest.raises(DataError, match="object 1: a polygon of 4 numbers"):
        masks()
    del content["annotations"][0]["segmentation"]
    assert masks() is None
    for wrong, message in (
        ({"size": [6, 5], "counts": [30]}, r"expected \[5, 6\]"),
        ({"size": [5, 6], "counts": [29]}, "add up to 29 pixels; the image has 30"),
        ("x", "is a str; expected polygons or runs"),
    ):
        with pytest.raises(DataError, match=message):
            mask_of(wrong, (5, 6))
    for text, message in (("P", "break off"), ("\x7f", "damaged")):
        with pytest.raises(DataError, match=message):
            counts_of_text(text)
