"""Decoding and resizing: every color mode, orientation, and damaged files."""

import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from drep_jax.data.decode import as_rgb, decode, decode_box, fit, limit_pixels, stored_size
from drep_jax.errors import ConfigError, DataError, UnreadableError
from tests.pictures import textured

RAMP = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
COLOR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_rgb_is_returned_unchanged_from_bytes_and_from_a_path(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(COLOR)))
    for source in (path, str(path), path.read_bytes()):
        image = decode(source, "a.png")
        assert image.dtype == np.uint8 and image.flags.writeable
        np.testing.assert_array_equal(image, COLOR)


def test_gray_is_repeated_over_three_channels():
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(RAMP)), "x"), RAMP[:, :, None].repeat(3, 2))


def test_bilevel_is_black_and_white():
    image = decode(encoded(Image.fromarray(RAMP > 90)), "x")
    np.testing.assert_array_equal(image[..., 1], np.where(RAMP > 90, 255, 0))


def test_transparency_is_composited_on_white():
    alpha = np.full((12, 16), 64, np.uint8)
    image = decode(encoded(Image.fromarray(np.dstack([COLOR, alpha]))), "x")
    expected = COLOR * (64 / 255) + 255 * (1 - 64 / 255)
    assert np.abs(image - expected).max() <= 1.0
    grey_alpha = Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(np.zeros_like(RAMP))])
    assert (decode(encoded(grey_alpha), "x") == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_color_becomes_white(mode):
    image = Image.fromarray(np.zeros((4, 4) if mode == "L" else (4, 4, 3), np.uint8))
    image.putpixel((0, 0), 9 if mode == "L" else (9, 9, 9))
    out = decode(encoded(image, transparency=9 if mode == "L" else (9, 9, 9)), "x")
    assert (out[0, 0] == 255).all() and out.sum() == 3 * 255


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_gives_its_colors(transparent):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode=None).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 1, 0])
    out = decode(encoded(image, **({"transparency": b"\x00\xff"} if transparent else {})), "x")
    np.testing.assert_array_equal(out[0, 0], [255] * 3 if transparent else [10, 20, 30])
    np.testing.assert_array_equal(out[0, 1], [200, 100, 50])


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # pure cyan ink
    for form in ("JPEG", "TIFF"):
        pixel = decode(encoded(cmyk, form), "x").astype(int)[4, 4]
        assert np.abs(pixel - [0, 255, 255]).max() <= 3


def test_sixteen_bits_are_scaled_to_eight():
    deep = np.array([[0, 257, 65535], [32768, 128, 129]], np.uint16)
    expected = np.round(deep / 257.0).astype(np.uint8)
    for form in ("PNG", "TIFF", "PPM"):
        out = decode(encoded(Image.fromarray(deep), form), "x")
        assert out.shape == (2, 3, 3)
        np.testing.assert_array_equal(out[..., 2], expected)


@pytest.mark.parametrize("pixels", [np.ones((3, 3), np.float32), np.full((3, 3), 70000, np.int32)])
def test_pixels_of_unknown_range_are_refused(pixels):
    with pytest.raises(DataError, match=r"deep\.tif"):
        decode(encoded(Image.fromarray(pixels), "TIFF"), "deep.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # How each orientation stores an upright image, by its definition: where the stored first row and first column are.
    stored = {
        1: COLOR,
        2: COLOR[:, ::-1],
        3: COLOR[::-1, ::-1],
        4: COLOR[::-1],
        5: COLOR.transpose(1, 0, 2),
        6: np.rot90(COLOR, 1),
        7: COLOR[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(COLOR, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(decode(data, "x"), COLOR)


def test_damaged_exif_does_not_lose_the_image():
    data = encoded(Image.fromarray(COLOR), exif=b"Exif\x00\x00not a TIFF header")
    np.testing.assert_array_equal(decode(data, "x"), COLOR)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_truncated_files_are_named(form):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = encoded(Image.fromarray(noise), form)
    for keep in (0, 3, len(data) // 2):
        with pytest.raises(DataError, match=re.escape("dir/bad image.x")):
            decode(data[:keep], "dir/bad image.x")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns about some of the damage
def test_damaged_bytes_either_decode_or_raise_data_error(form):
    rng = np.random.default_rng(1)
    data = np.frombuffer(encoded(Image.fromarray(COLOR), form), np.uint8)
    refused = 0
    for _ in range(150):
        broken = data.copy()
        where = rng.integers(0, min(len(data), 400), 4)
        broken[where] = rng.integers(0, 256, 4)
        try:
            assert decode(broken.tobytes(), "x").shape[2] == 3
        except DataError:
            refused += 1
    assert refused


def test_absent_and_foreign_files_are_named(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    for path in (text, tmp_path / "absent.png", tmp_path):
        with pytest.raises(DataError, match=re.escape(str(path))):
            decode(path, str(path))


def test_arrays_are_treated_like_files():
    np.testing.assert_array_equal(as_rgb(RAMP[:, :, None], "x"), RAMP[:, :, None].repeat(3, 2))
    np.testing.assert_array_equal(as_rgb(COLOR, "x"), COLOR)
    for array in (RAMP > 90, (RAMP > 90) * np.uint16(65535)):
        np.testing.assert_array_equal(as_rgb(array, "x")[..., 0], np.where(RAMP > 90, 255, 0))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_of_arrays_are_not_guessed(channels):
    with pytest.raises(DataError, match=rf"array 7 is an array of {channels} channels"):
        as_rgb(np.zeros((2, 2, channels), np.uint8), "array 7")


@pytest.mark.parametrize("array", [RAMP.astype(np.int32), COLOR.astype(np.uint16), RAMP / 255, RAMP[0]])
def test_arrays_whose_range_is_unknown_are_refused(array):
    with pytest.raises(DataError, match=r"array 7 is .* not an image"):
        as_rgb(array, "array 7")


def test_crop_keeps_the_aspect_ratio_and_the_center():
    # Vertical stripes; twice as wide as wanted, so that only the middle half of the columns may remain.
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 255
    assert (fit(wide, (32, 32), "crop") == 255).all()
    assert fit(wide, (32, 32), "squash")[16, 2].max() < 30
    half = fit(wide, (16, 16), "crop")
    assert half.shape == (16, 16, 3) and half[:, 1:-1].min() > 200


@pytest.mark.parametrize("size", [(7, 9), (31, 5), (200, 3), (12, 16)])
@pytest.mark.parametrize("how", ["crop", "squash"])
def test_the_target_size_is_met_exactly(size, how):
    assert fit(COLOR, size, how).shape == (*size, 3)


def test_downscaling_is_antialiased():
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, 2)
    assert np.abs(fit(checkers, (16, 16), "crop").astype(int) - 127).max() < 12


def test_exact_refuses_other_sizes_and_says_all():
    np.testing.assert_array_equal(fit(COLOR, (12, 16), "exact"), COLOR)
    with pytest.raises(DataError, match=r"cat\.png is 12 x 16 .* 16 x 12 is wanted"):
        fit(COLOR, (16, 12), "exact", "cat.png")
    with pytest.raises(ConfigError, match='Did you mean "squash"'):
        fit(COLOR, (16, 12), "squish")


def test_images_above_the_limit_name_the_setting_that_raises_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # restored in the end
    data = encoded(Image.fromarray(np.zeros((300, 700), np.uint8)))
    limit_pixels(0.1)
    for read in (
        lambda: decode(data, "big.png"),
        lambda: stored_size(data, "big.png"),
        lambda: decode_box(data, "big.png", lambda *size: (0, 0, *size), (8, 8)),
    ):
        with pytest.raises(UnreadableError, match=r"big\.png has more than 0\.1 million pixels.*data\.max_megapixels"):
            read()
    for allowed in (0.21, 0.3, 0):  # also between half the limit and the limit, where Pillow warns
        limit_pixels(allowed)
        assert decode(data, "big.png").shape == (300, 700, 3)
    for wrong in (-1, math.nan, math.inf, "many", True):
        with pytest.raises(ConfigError, match=r"data\.max_megapixels="):
            limit_pixels(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes and shares
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "turned"])
@pytest.mark.parametrize("box", [(20, 30, 160, 200), (0, 0, 300, 400), (100, 40, 30, 24)])
def test_a_decoded_box_is_the_box_of_the_decoded_image(kind, box):
    picture = Image.fromarray(textured(1, (300, 400))[0]).resize((400, 300))
    stream, options = io.BytesIO(), {}
    if kind == "turned":
        picture = picture.rotate(90, expand=True)
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    picture.save(stream, "PNG" if kind == "PNG" else "JPEG", **options)
    sizes = []
    cropped, transform = decode_box(stream.getvalue(), "it", lambda *size: sizes.append(size) or box, (32, 40))
    whole = decode(stream.getvalue(), "it")
    assert sizes == [(300, 400)] == [whole.shape[:2]], "the box is chosen once, for the upright image"
    top, left, rows, columns = box
    expected = fit(whole[top : top + rows, left : left + columns], (32, 40), "squash")
    assert cropped.shape == (32, 40, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(transform.image(whole), expected)
    difference = np.abs(cropped.astype(int) - expected)
    assert difference.mean() < (2.5 if kind == "JPEG" else 1e-9) and cropped.std() > 20, (
        "JPEGs are decoded smaller where the box allows it"
    )


def test_boxes_of_damaged_images_are_named():
    stream = io.BytesIO()
    Image.fromarray(textured(1, (64, 64))[0]).save(stream, "JPEG")
    with pytest.raises(UnreadableError, match="Cannot read the image it") as caught:
        decode_box(stream.getvalue()[:900], "it", lambda *size: (0, 0, *size), (8, 8))
    assert caught.value.where == "it"


def test_a_share_of_the_short_side():
    image = textured(1, (300, 400))[0]
    cropped = fit(image, (224, 224), "crop:0.875")
    whole = np.asarray(Image.fromarray(image).resize((341, 256), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(cropped, whole[16:240, 58:282])
    np.testing.assert_array_equal(fit(image, (224, 224), "crop:1"), fit(image, (224, 224), "crop"))
    for bad in ("crop:", "crop:0", "crop:1.5", "crop:a", "squash:0.5", "crap:0.5"):
        with pytest.raises(ConfigError, match="Unknown way of resizing"):
            fit(image, (8, 8), bad)
