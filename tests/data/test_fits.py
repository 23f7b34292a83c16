"""How the project fits and augments images, as transforms, and the labels of fitted items."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from drep_jax.data.augment.flip_crop import flip_and_shift, flip_and_shift_transforms, transform_of_crop
from drep_jax.data.columns import Column
from drep_jax.data.decode import fit, fitted
from drep_jax.data.fits import interpolation_of, parse_fit, transform_of_fit
from drep_jax.data.geometry import Transform
from drep_jax.errors import ConfigError, DataError
from tests.pictures import textured

sides = st.integers(1, 24)
FITS = ["crop", "crop:0.875", "squash", "pad", "keep", "keep:8", "short:7", "short:7:20", "short:7:20:4"]


@settings(deadline=None, max_examples=80)
@given(sides, sides, sides, sides, st.sampled_from(FITS))
def test_every_fit_is_its_transform(height, width, rows, columns, how):
    image = textured(1, (height, width))[0]
    transform = transform_of_fit((height, width), (rows, columns), how)
    fitted_image = fit(image, (rows, columns), how)
    np.testing.assert_array_equal(fitted_image, transform.image(image, interpolation=interpolation_of(how)))
    if how.startswith("short"):
        _, short, long, multiple = parse_fit(how)
        assert transform.shows().all() and not any(side % multiple for side in fitted_image.shape[:2])
        scale = min(short / min(height, width), long / max(height, width))
        for side, before in zip(fitted_image.shape[:2], (height, width), strict=True):
            assert side - multiple < max(1, int(before * scale + 0.5)) <= side
        assert fitted_image.shape[:2] == transform.size_out
        return
    keeps = how.startswith("keep")
    multiple = int(parse_fit(how)[1]) if keeps else 1
    expected = tuple(-(-side // multiple) * multiple for side in (height, width)) if keeps else (rows, columns)
    assert fitted_image.shape[:2] == transform.size_out == expected
    shown = transform.shows()
    if how in ("squash", "keep") or how.startswith("crop"):
        assert shown.all()
    else:
        inner = (shown[:, 0].sum(), shown[0].sum())
        assert shown[: inner[0], : inner[1]].all() and shown.sum() == inner[0] * inner[1], "padded below and right"
        if how == "pad":
            assert inner[0] == rows or inner[1] == columns, "as large as fits"
            scale = min(rows / height, columns / width)
            assert abs(inner[0] - height * scale) <= max(1, 0.5) and abs(inner[1] - width * scale) <= 1
    points = np.random.default_rng(0).uniform(0, 1, (9, 2)) * (width, height)
    np.testing.assert_allclose(transform.inverse().points(transform.points(points)), points, atol=1e-11)


def test_ways_of_fitting_are_parsed():
    assert parse_fit("keep") == ("keep", 1.0) and parse_fit("keep:32") == ("keep", 32.0)
    assert parse_fit("short:512:2048:32") == ("short", 512, 2048, 32) and parse_fit("short:9") == (
        "short",
        9,
        np.inf,
        1,
    )
    for bad in ("short", "short:0", "short:1:2:3:4", "short:9.5", "keep:0", "keep:1.5", "keep:x", "pad:3", "crop:"):
        with pytest.raises(ConfigError, match="Unknown way of resizing"):
            parse_fit(bad)
    with pytest.raises(DataError, match=r"cat is 3 x 4 pixels .* 4 x 3 is wanted"):
        transform_of_fit((3, 4), (4, 3), "exact", "cat")
    assert transform_of_fit((3, 4), (3, 4), "exact") == Transform((3, 4))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**40), st.booleans(), st.integers(0, 3), sides, sides)
def test_flips_and_shifts_of_a_batch_are_their_transforms(position, flip, shift, height, width):
    images = textured(6, (height, width))
    options = {"seed": 4, "first_position": position, "flip": flip, "shift": shift}
    expected = flip_and_shift(images, **options)
    for image, moved, transform in zip(
        images, expected, flip_and_shift_transforms([(height, width)] * 6, **options), strict=True
    ):
        np.testing.assert_array_equal(transform.image(image), moved)
        np.testing.assert_array_equal(transform.mask(image, fill=0), moved)


@settings(deadline=None, max_examples=30)
@given(sides, sides, sides, sides, st.data())
def test_a_resized_crop_is_the_fit_of_its_box(height, width, rows, columns, data):
    box_height, box_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - box_height)), data.draw(st.integers(0, width - box_width))
    image = textured(1, (height, width))[0]
    transform = transform_of_crop((height, width), (top, left, box_height, box_width), (rows, columns))
    expected = fit(image[top : top + box_height, left : left + box_width], (rows, columns), "squash")
    np.testing.assert_array_equal(transform.image(image), expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 24), st.integers(4, 24), st.sampled_from(FITS))
def test_items_are_fitted_with_their_labels(height, width, how):
    columns = (
        Column("label", np.uint8, geometry="mask", fill=250),
        Column("boxes", np.float32, (4,), ragged=True, geometry="boxes"),
        Column("classes", ragged=True),
    )
    boxes = np.array([[0, 0, 1, 1], [1, 1, 3, 4], [0, 0, width, height], [2, 2, 2, 3]])
    raw = {
        "image": textured(1, (height, width))[0],
        "where": "it",
        "label": np.random.default_rng(0).integers(0, 200, (height, width), np.uint8),
        "boxes": boxes,
        "classes": [7, 8, 9, 10],
        "camera": np.int32(3),
    }
    item = fitted(raw, (12, 9), how, columns)
    transform = item["transform"]
    assert transform == transform_of_fit((height, width), (12, 9), how)
    np.testing.assert_array_equal(item["image"], fitted(raw, (12, 9), how)["image"])
    np.testing.assert_array_equal(item["label"], transform.mask(raw["label"], fill=250))
    moved, keep = transform.boxes(boxes)
    assume(keep.any())
    np.testing.assert_array_equal(item["boxes"], moved[keep])
    np.testing.assert_array_equal(item["classes"], np.array([7, 8, 9, 10])[keep])
    assert 10 not in item["classes"] and 9 in item["classes"] and item["camera"] == 3 and "where" not in item
    for change, message in (
        ({"classes": [1, 2]}, "different numbers of objects"),
        ({"label": np.zeros((height + 1, width), np.uint8)}, r'it: the map "label" is an array of'),
        ({"boxes": np.zeros((4, 3))}, r"expected \(objects, 4\)"),
    ):
        with pytest.raises(DataError, match=message):
            fitted({**raw, **change}, (12, 9), how, columns)
