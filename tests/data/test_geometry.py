"""`Transform` against plain NumPy: images, label maps, points and boxes follow one geometry, and come back."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from drep_jax.data import resampling
from drep_jax.data.decode import UPRIGHT
from drep_jax.data.fits import transform_of_fit
from drep_jax.data.geometry import MOST_STEPS, ROW, Transform
from drep_jax.data.resampling import INTERPOLATIONS, bilinear, nearest
from drep_jax.errors import ConfigError, DataError
from tests.pictures import textured

sides = st.integers(1, 24)
PALETTE = np.random.default_rng(0).permutation(256**3)[:256]
PALETTE = np.stack([PALETTE % 256, PALETTE // 256 % 256, PALETTE // 256**2], axis=1).astype(np.uint8)


@st.composite
def transforms(draw, most=4, resizes=True, size=None):
    """A transform of some steps of every kind, made for a random size."""
    transform = Transform(size or (draw(sides), draw(sides)))
    for _ in range(draw(st.integers(0, most))):
        kind = draw(st.sampled_from(["orient", "window", "crop", "pad", "shift", "resize"][: 6 if resizes else 5]))
        height, width = transform.size_out
        if kind == "orient":
            transform = transform.orient(draw(st.integers(1, 8)))
        elif kind == "resize":
            transform = transform.resize((draw(sides), draw(sides)))
        elif kind == "window":
            transform = transform.window(draw(st.integers(-9, 9)), draw(st.integers(-9, 9)), draw(sides), draw(sides))
        elif kind == "crop":
            rows, columns = draw(st.integers(1, height)), draw(st.integers(1, width))
            top, left = draw(st.integers(0, height - rows)), draw(st.integers(0, width - columns))
            transform = transform.crop(top, left, rows, columns)
        elif kind == "pad":
            transform = transform.pad(*(draw(st.integers(0, 5)) for _ in range(4)))
        else:
            transform = transform.shift(draw(st.integers(-5, 5)), draw(st.integers(-5, 5)))
    return transform


def label_map(size, seed=0, classes=200):
    return np.random.default_rng(seed).integers(0, classes, size, np.uint8)


def random_boxes(size, count=12, seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.uniform(0, 1, (count, 2, 2)) * (size[1], size[0])
    return np.concatenate([ends.min(1), ends.max(1)], axis=1)


def pixel_by_pixel(transform, array, fill):
    """What every output pixel shows, one pixel at a time and from the last step back: the oracle of `mask`."""
    sizes = [transform.size_in]
    for step in transform.steps:
        sizes.append(step.size(sizes[-1]))
    out = np.full(transform.size_out, fill, array.dtype)
    for row, column in itertools.product(*map(range, transform.size_out)):
        y, x, shown = row, column, True
        for step, (height, width), (rows, columns) in zip(
            reversed(transform.steps), reversed(sizes[:-1]), reversed(sizes[1:]), strict=True
        ):
            name = type(step).__name__
            if name == "Window":
                y, x = y + step.top, x + step.left
                shown = shown and 0 <= y < height and 0 <= x < width
            elif name == "Resize":
                y, x = int((y + 0.5) * height / rows + 1e-9), int((x + 0.5) * width / columns + 1e-9)
            else:
                y, x = {
                    1: (y, x),
                    2: (y, width - 1 - x),
                    3: (height - 1 - y, width - 1 - x),
                    4: (height - 1 - y, x),
                    5: (x, y),
                    6: (height - 1 - x, y),
                    7: (height - 1 - x, width - 1 - y),
                    8: (x, width - 1 - y),
                }[step.code]
            if not shown:
                break
        if shown:
            out[row, column] = array[y, x]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(transforms(), st.integers(0, 99))
def test_label_maps_are_read_pixel_by_pixel(transform, seed):
    labels = label_map(transform.size_in, seed)
    moved = transform.mask(labels)
    assert moved.shape == transform.size_out and moved.dtype == np.uint8
    np.testing.assert_array_equal(moved, pixel_by_pixel(transform, labels, 255))
    np.testing.assert_array_equal(transform.shows(), moved != 255)
    np.testing.assert_array_equal(transform.mask(labels[..., None])[..., 0], moved, "further axes are carried along")


@settings(deadline=None, max_examples=60)
@given(transforms(), st.integers(0, 99))
def test_an_image_that_shows_the_classes_as_colors_stays_aligned_with_its_map(transform, seed):
    labels = label_map(transform.size_in, seed, 256)
    image = transform.image(PALETTE[labels], interpolation="nearest")
    np.testing.assert_array_equal(image[transform.shows()], PALETTE[transform.mask(labels)][transform.shows()])
    assert not image[~transform.shows()].any() and (transform.mask(labels)[~transform.shows()] == 255).all()


@settings(deadline=None, max_examples=40)
@given(sides, sides, sides, sides)
def test_resizing_is_pillows(height, width, rows, columns):
    image = textured(1, (height, width))[0]
    transform = Transform((height, width)).resize((rows, columns))
    for name, how in (("bicubic", "BICUBIC"), ("bilinear", "BILINEAR")):
        expected = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling[how]))
        np.testing.assert_array_equal(transform.image(image, interpolation=name), expected)
    labels = label_map((height, width))
    # Pillow adds up a rounded step, so only pixels whose center falls on the border between two may differ.
    ties = [(2 * np.arange(new) + 1) * old % (2 * new) == 0 for old, new in ((height, rows), (width, columns))]
    clear = ~ties[0][:, None] & ~ties[1]
    expected = np.asarray(Image.fromarray(labels).resize((columns, rows), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(nearest(labels, (rows, columns))[clear], expected[clear])


@settings(deadline=None, max_examples=30)
@given(sides, sides, sides, sides)
def test_dense_maps_are_interpolated_between_pixel_centers(height, width, rows, columns):
    values = np.random.default_rng(0).normal(size=(height, width, 2))
    out = bilinear(values, (rows, columns))
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    for row, column in itertools.product(range(rows), range(columns)):
        y, x = (row + 0.5) * height / rows + 0.5, (column + 0.5) * width / columns + 0.5
        top, left = int(y), int(x)
        a, b = y - top, x - left
        bottom, right = min(top + 1, height + 1), min(left + 1, width + 1)
        expected = (1 - a) * ((1 - b) * padded[top, left] + b * padded[top, right]) + a * (
            (1 - b) * padded[bottom, left] + b * padded[bottom, right]
        )
        np.testing.assert_allclose(out[row, column], expected, atol=1e-12)
    assert bilinear(values.astype(np.float32), (rows, columns)).dtype == np.float32
    assert bilinear(label_map((height, width)), (rows, columns)).dtype == np.float32


@pytest.mark.parametrize("code", range(1, 9))
def test_orientations_are_those_of_exif(code):
    image = textured(1, (5, 7))[0]
    expected = np.asarray(Image.fromarray(image).transpose(UPRIGHT[code])) if code in UPRIGHT else image
    transform = Transform((5, 7)).orient(code)
    np.testing.assert_array_equal(transform.image(image), expected)
    np.testing.assert_array_equal(transform.inverse().image(expected), image)
    points = np.array([[0.5, 0.5], [6.5, 2.5]])
    for (x, y), (u, v) in zip(points, transform.points(points), strict=True):
        np.testing.assert_array_equal(expected[int(v), int(u)], image[int(y), int(x)])


# ---------------------------------------------------------------------------------------------------------------------
# In turn, and back
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_composition_is_one_after_the_other(data):
    first = data.draw(transforms(3))
    second = data.draw(transforms(3, size=first.size_out))
    both = first.then(second)
    image, labels = textured(1, first.size_in)[0], label_map(first.size_in)
    np.testing.assert_array_equal(both.image(image), second.image(first.image(image)))
    np.testing.assert_array_equal(both.mask(labels), second.mask(first.mask(labels)))
    points, boxes = np.random.default_rng(1).normal(size=(9, 2)) * 20, random_boxes(first.size_in)
    np.testing.assert_array_equal(both.points(points), second.points(first.points(points)))
    np.testing.assert_array_equal(both.boxes(boxes)[0], second.boxes(first.boxes(boxes)[0])[0])
    assert both.inverse().then(both).size_out == both.size_out == second.size_out
    assert both.inverse() == second.inverse().then(first.inverse())
    assert both.inverse().inverse() == both
    with pytest.raises(DataError, match="cannot follow"):
        first.then(Transform((99, 99)))


@settings(deadline=None, max_examples=80)
@given(transforms(), st.integers(0, 9))
def test_points_and_boxes_come_back_exactly(transform, seed):
    points = np.random.default_rng(seed).uniform(-30, 30, (20, 2))
    back = transform.inverse().points(transform.points(points))
    assert back.dtype == np.float64
    np.testing.assert_allclose(back, points, rtol=0, atol=1e-11)
    boxes = random_boxes(transform.size_in, seed=seed)
    moved, _ = transform.boxes(boxes, clip=False)
    np.testing.assert_allclose(transform.inverse().boxes(moved, clip=False)[0], boxes, rtol=0, atol=1e-11)
    assert (moved[:, :2] <= moved[:, 2:]).all()
    clipped, keep = transform.boxes(boxes)
    inside = keep & np.isclose(clipped, moved, atol=0).all(axis=1)  # nothing was cut off
    np.testing.assert_allclose(transform.inverse().boxes(clipped[inside])[0], boxes[inside], rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=60)
@given(transforms(resizes=False), st.integers(0, 9))
def test_without_a_resize_what_is_seen_comes_back_and_the_rest_is_marked(transform, seed):
    labels = label_map(transform.size_in, seed)
    seen = transform.inverse().mask(transform.shows(), fill=False)
    back = transform.inverse().mask(transform.mask(labels))
    np.testing.assert_array_equal(back, np.where(seen, labels, 255))
    image = textured(1, transform.size_in)[0]
    np.testing.assert_array_equal(transform.inverse().image(transform.image(image))[seen], image[seen])
    dense = np.random.default_rng(seed).normal(size=(*transform.size_in, 2))
    there = transform.dense(dense)
    np.testing.assert_array_equal(np.isnan(there).any(-1), ~transform.shows())
    again = transform.inverse().dense(np.nan_to_num(there))
    np.testing.assert_array_equal(again[seen], dense[seen])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.data())
def test_enlarged_by_whole_factors_and_back(height, width, down, right, data):
    transform = Transform((height, width)).orient(data.draw(st.integers(1, 8)))
    rows, columns = transform.size_out
    transform = transform.resize((rows * (2 * down - 1), columns * (2 * right - 1))).pad(1, 2, 3, 0).flip()
    labels = label_map((height, width))
    np.testing.assert_array_equal(transform.inverse().mask(transform.mask(labels)), labels)
    values = np.random.default_rng(0).normal(size=(height, width))
    flat = transform.inverse().dense(np.nan_to_num(transform.dense(values)))
    np.testing.assert_allclose(flat, values, atol=1e-12)  # the middle of each enlarged pixel is its center


@settings(deadline=None, max_examples=60)
@given(transforms(), st.floats(-3, 3))
def test_the_fill_of_dense_maps_never_blends(transform, level):
    values = np.full(transform.size_in, level)
    out = transform.dense(values, fill=1e6)
    np.testing.assert_allclose(out[transform.shows()], level, atol=1e-12)
    assert (out[~transform.shows()] == 1e6).all()
    assert transform.dense(label_map(transform.size_in)).dtype == np.float32


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 24), st.integers(2, 24), st.integers(2, 24), st.integers(2, 24))
def test_a_ramp_is_its_own_coordinate_after_a_resize(height, width, rows, columns):
    """Dense maps and points agree: the value at a pixel's center is the place that the center came from."""
    ramp = np.arange(width) + 0.5 + np.zeros((height, 1))
    transform = Transform((height, width)).resize((rows, columns)).flip()
    centers = np.stack([np.arange(columns) + 0.5, np.full(columns, 0.5)], axis=1)
    came_from = transform.inverse().points(centers)[:, 0]
    np.testing.assert_allclose(transform.dense(ramp)[0], np.clip(came_from, 0.5, width - 0.5), atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------------------------------


def box_of(blob):
    """x0, y0, x1, y1 around the true pixels; None without any."""
    if not blob.any():
        return None
    rows, columns = (np.flatnonzero(blob.any(axis=axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


@settings(deadline=None, max_examples=80)
@given(transforms(), st.integers(0, 99), st.integers(0, 1))
def test_boxes_follow_the_blobs_of_a_map(transform, seed, grow):
    """Exactly without a resize; after resizes the border of a blob is known to a pixel of the coarsest grid."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=transform.size_in), 1 + grow, mode="wrap")
    blobs, count = ndimage.label(noise > noise.mean())
    boxes = np.array([box_of(blobs == number + 1) for number in range(count)]).reshape(-1, 4)
    moved, keep = transform.boxes(boxes)
    resized, slack, size = False, 0.0, transform.size_in
    for step in transform.steps:
        after = step.size(size)
        if type(step).__name__ == "Resize":
            resized, slack = True, max(after[0] / size[0], after[1] / size[1], 1) * (slack + 1)
        size = after
    for number in range(count):
        seen = box_of(transform.mask(blobs == number + 1, fill=False))
        if seen is None:
            # A frame around a blob may show where the blob itself does not: at a corner of the frame.
            assert resized or not keep[number] or (blobs != number + 1).any()
        elif not resized:
            assert keep[number]
            assert (moved[number, :2] <= seen[:2]).all() and (seen[2:] <= moved[number, 2:]).all()
        else:
            assert (moved[number, :2] - slack <= seen[:2]).all() and (seen[2:] <= moved[number, 2:] + slack).all()


@settings(deadline=None, max_examples=80)
@given(transforms(resizes=False), st.integers(0, 99))
def test_boxes_of_rectangles_are_the_boxes_of_what_is_seen(transform, seed):
    rng = np.random.default_rng(seed)
    height, width = transform.size_in
    for _ in range(6):
        (y0, y1), (x0, x1) = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
        if y0 == y1 or x0 == x1:
            continue
        rectangle = np.zeros((height, width), bool)
        rectangle[y0:y1, x0:x1] = True
        moved, keep = transform.boxes(np.array([[x0, y0, x1, y1]]))
        seen = box_of(transform.mask(rectangle, fill=False))
        assert keep[0] == (seen is not None)
        if seen is not None:
            np.testing.assert_array_equal(moved[0], seen)


def test_boxes_are_cut_and_empty_ones_told():
    transform = Transform((10, 20)).crop(0, 5, 10, 10).resize((20, 20))
    boxes, keep = transform.boxes(np.array([[0, 0, 8, 5], [0, 0, 5, 10], [14, 2, 30, 4], [7, 3, 7, 9]]))
    np.testing.assert_array_equal(boxes, [[0, 0, 6, 10], [0, 0, 0, 20], [18, 4, 20, 8], [4, 6, 4, 18]])
    assert keep.tolist() == [True, False, True, False]
    boxes, keep = Transform((4, 4)).flip().boxes(np.zeros((0, 4)))
    assert boxes.shape == (0, 4) and keep.shape == (0,)


# ---------------------------------------------------------------------------------------------------------------------
# As a row
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(transforms(MOST_STEPS))
def test_a_transform_travels_as_a_row_of_whole_numbers(transform):
    row = transform.row()
    assert row.shape == (ROW,) and row.dtype == np.int32
    assert Transform.from_row(row) == transform
    assert Transform.from_row(row.astype(np.float32)) == transform, "single precision holds it"
    assert tuple(row[:2]) == transform.size_in


def test_what_is_refused():
    transform = Transform((4, 6))
    for change, message in (
        (lambda: transform.crop(0, 0, 5, 6), "reaches beyond"),
        (lambda: transform.crop(-1, 0, 2, 2), "reaches beyond"),
        (lambda: transform.resize((0, 3)), "at least 1"),
        (lambda: transform.window(0, 0, 3, 0), "at least 1"),
        (lambda: transform.pad(0, -1, 0, 0), "at least 0"),
        (lambda: transform.orient(9), "1 to 8"),
        (lambda: transform.image(np.zeros((6, 4, 3), np.uint8)), r"made for 4 x 6 pixels .* got .*\(6, 4, 3\)"),
        (lambda: transform.dense(np.zeros((6, 4))), "made for 4 x 6"),
    ):
        with pytest.raises(DataError, match=message):
            change()
    with pytest.raises(ConfigError, match='Did you mean "bicubic"'):
        transform.image(np.zeros((4, 6, 3), np.uint8), interpolation="bicubik")
    long = Transform((4, 6))
    for _ in range(MOST_STEPS + 1):
        long = long.flip()
    with pytest.raises(DataError, match="9 steps"):
        long.row()
    for bad in (np.zeros(ROW - 1), np.full(ROW, 4)):
        with pytest.raises(DataError, match="42 numbers"):
            Transform.from_row(bad)
    assert Transform.from_row(np.zeros(ROW)) == Transform((0, 0))
    same = transform.resize((4, 6)).orient(1).pad(0, 0, 0, 0).shift(0, 0).crop(0, 0, 4, 6)
    assert same == transform, "steps that do nothing are not taken"


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_part_of_a_resized_image_is_that_part(data):
    (height, width), size = (data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40))) for _ in range(2))
    part = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in size)
    image = textured(1, (height, width))[0]
    for name, resample in INTERPOLATIONS.items():
        whole = resample(image, size)[part]
        np.testing.assert_array_equal(resample(image, size, part), whole)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resampling, "WHOLE", 0)
            patch.setattr(resampling, "MANY", 0)  # so that Pillow computes no more than the part
            alone = resample(image, size, part)
        assert alone.shape == whole.shape
        # Pillow has the borders of a part in float32 and rounds after each of two passes.
        assert np.abs(alone.astype(int) - whole).max(initial=0) <= (0 if name == "nearest" else 2)
    margins = [data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5))) for _ in range(2)]
    padded = np.pad(image, [*margins, (0, 0)], mode="edge")
    np.testing.assert_array_equal(bilinear(image, size, part, margins), bilinear(padded, size)[part])


@pytest.mark.parametrize("turned", [False, True])
def test_memory_is_that_of_the_result_however_long_the_image(turned, monkeypatch):
    # Scaled to cover a square, one pixel by 2,000 is 224 by 448,000: 300 MB of bytes, and what Pillow needs besides.
    size = (2000, 1) if turned else (1, 2000)
    transform = transform_of_fit(size, (224, 224), "crop")
    resized = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: resized.append(size) or resize(self, size, *rest)
    )
    ramp = np.repeat(np.arange(2000, dtype=np.int64)[:, None] // 8, 3, axis=1).astype(np.uint8).reshape(*size, 3)
    tracemalloc.start()
    image, mask, dense = transform.image(ramp), transform.mask(ramp[..., 0]), transform.dense(ramp)
    back = transform.inverse()
    undone, logits = back.mask(mask), back.dense(dense)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20 and max(width * height for width, height in resized) <= 224 * 224
    assert image.shape == dense.shape == (224, 224, 3) and set(np.unique(image)) <= {124, 125}
    assert undone.shape == size and logits.shape == (*size, 3)
    shown = np.flatnonzero(undone != 255)
    assert (
        np.isin(shown, (999, 1000)).all()
        and np.isnan(logits).any()
        and not np.isnan(logits.reshape(-1)[3 * shown]).any()
    )
    np.testing.assert_array_equal(undone.reshape(-1)[shown], ramp[..., 0].reshape(-1)[shown])
