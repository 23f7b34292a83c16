"""The table of formats × orientations: every way to an image's pixels and to its size agrees, and gives it upright."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from drep_jax.data.decode import decode, decode_box, stored_size
from drep_jax.errors import UnreadableError

HEIGHT, WIDTH = 24, 40
RAMP = np.linspace(0, 250, HEIGHT)[:, None] + np.linspace(0, 5, WIDTH)
UPRIGHT = np.stack([RAMP, np.flip(RAMP, 0), np.broadcast_to(np.linspace(0, 255, WIDTH), RAMP.shape)], axis=2)
UPRIGHT = UPRIGHT.astype(np.uint8)

# How each orientation stores an upright image, by its definition: where its first row and first column are.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def xmp(orientation):
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def saved(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png_with_text(image, key, text, *, late):
    """A PNG with a text, in front of its pixels or behind them."""
    if not late:
        info = PngImagePlugin.PngInfo()
        info.add_itxt(key, text)
        return saved(image, "PNG", pnginfo=info)
    body = b"iTXt" + key.encode() + b"\0\0\0\0\0" + text.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return saved(image, "PNG")[:-12] + chunk + saved(image, "PNG")[-12:]


def raw_profile(orientation):
    data = exif(orientation).tobytes()
    return f"\nexif\n{len(data):8}\n{data.hex()}\n"


def tiff_with_xmp(image, orientation):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = xmp(orientation)
    tags.tagtype[700] = 1
    return saved(image, "TIFF", tiffinfo=tags)


WAYS = {
    "JPEG": lambda image, code: saved(image, "JPEG", exif=exif(code), quality=95, subsampling=0),
    "JPEG, XMP": lambda image, code: saved(image, "JPEG", xmp=xmp(code), quality=95, subsampling=0),
    "JPEG, gray": lambda image, code: saved(image.convert("L"), "JPEG", exif=exif(code), quality=95),
    "MPO": lambda image, code: saved(
        image, "MPO", save_all=True, append_images=[image], exif=exif(code), quality=95, subsampling=0
    ),
    "PNG": lambda image, code: saved(image, "PNG", exif=exif(code)),
    "PNG, XMP": lambda image, code: png_with_text(image, "XML:com.adobe.xmp", xmp(code).decode(), late=False),
    "PNG, XMP behind": lambda image, code: png_with_text(image, "XML:com.adobe.xmp", xmp(code).decode(), late=True),
    "PNG, profile": lambda image, code: png_with_text(image, "Raw profile type exif", raw_profile(code), late=False),
    "PNG, profile behind": lambda image, code: png_with_text(
        image, "Raw profile type exif", raw_profile(code), late=True
    ),
    "WebP": lambda image, code: saved(image, "WEBP", exif=exif(code), lossless=True),
    "WebP, XMP": lambda image, code: saved(image, "WEBP", xmp=xmp(code), lossless=True),
    "TIFF": lambda image, code: saved(image, "TIFF", exif=exif(code)),
    "TIFF, gray": lambda image, code: saved(image.convert("L"), "TIFF", exif=exif(code)),
    "TIFF, transparent": lambda image, code: saved(image.convert("RGBA"), "TIFF", exif=exif(code)),
    "TIFF, LZW": lambda image, code: saved(image, "TIFF", exif=exif(code), compression="tiff_lzw"),
    "TIFF, JPEG": lambda image, code: saved(image, "TIFF", exif=exif(code), compression="jpeg", quality=95),
    "TIFF, frames": lambda image, code: saved(image, "TIFF", exif=exif(code), save_all=True, append_images=[image]),
    "TIFF, XMP": tiff_with_xmp,
    "AVIF": lambda image, code: saved(image, "AVIF", exif=exif(code), quality=95, subsampling="4:4:4"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_reader_gives_the_upright_image_and_its_size(way):
    for orientation in range(1, 9):
        data = WAYS[way](Image.fromarray(np.ascontiguousarray(STORED[orientation])), orientation)
        agree(data, f"{way}, orientation {orientation}")
        image = decode(data, way).astype(int)
        expected = UPRIGHT.astype(int)
        if "gray" in way:
            expected = np.asarray(Image.fromarray(UPRIGHT).convert("L"), int)[:, :, None].repeat(3, 2)
        assert np.abs(image - expected).max() <= 24 and np.abs(image - expected).mean() < 4, f"{way} {orientation}"


@pytest.mark.parametrize("code", [0, 9, 65535])
@pytest.mark.parametrize("way", ["JPEG", "PNG", "TIFF", "WebP"])
def test_numbers_that_are_no_orientation_turn_nothing(way, code):
    data = WAYS[way](Image.fromarray(UPRIGHT), code)
    agree(data, way)
    assert decode(data, way).shape == UPRIGHT.shape


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_every_format_that_pillow_reads_and_writes():
    seen = set()
    forms = set(Image.registered_extensions().values()) & set(Image.OPEN) & set(Image.SAVE)
    for form in sorted(forms - {"ICNS"}):  # which always has 1024 x 1024 pixels, and so takes long
        for mode in ("1", "L", "P", "RGB", "RGBA"):
            try:
                data = saved(Image.fromarray(UPRIGHT).convert(mode), form)
                decode(data, form)
            except (OSError, ValueError, KeyError):
                continue  # Pillow does not write this mode as this format, or needs another program to read it
            agree(data, f"{form} {mode}")
            seen.add(form)
    assert {"BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"} <= seen and len(seen) > 15


def test_what_pillow_asserts_of_a_file_is_an_image_that_cannot_be_read():
    with pytest.raises(UnreadableError, match=r"Cannot read the image it\.icns"):
        decode(saved(Image.fromarray(UPRIGHT).convert("P"), "ICNS"), "it.icns")


def agree(data, what):
    image = decode(data, what)
    sizes = []

    def whole(height, width):
        sizes.append((height, width))
        return 0, 0, height, width

    boxed, transform = decode_box(data, what, whole, image.shape[:2])
    np.testing.assert_array_equal(boxed, image, err_msg=what)
    assert sizes == [transform.size_in] == [stored_size(data, what)] == [image.shape[:2]], what
