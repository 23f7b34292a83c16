"""From the bytes of an image file to uint8 RGB, fitted to a size, with Pillow."""

import contextlib
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from drep_jax.data.augment.flip_crop import Box, transform_of_crop
from drep_jax.data.columns import Columns, follow, geometric
from drep_jax.data.fits import VARYING, interpolation_of, parse_fit, picture_size, transform_of_fit
from drep_jax.data.geometry import Transform
from drep_jax.data.steps import Size
from drep_jax.errors import ConfigError, DataError, UnreadableError

# What Pillow raises on damaged files, depending on the format.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
PILLOWS_LIMIT = Image.MAX_IMAGE_PIXELS
"""Half the pixels of the largest image that Pillow decodes by itself, 179 million."""
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING = (5, 6, 7, 8)  # orientations that swap height and width
PNG_TEXTS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # that may hold an orientation
GAP = 2
"""Least ratio of a box that is decoded at reduced size to the wanted size; below it, it shows."""


def limit_pixels(millions: float) -> None:
    """Sets how large an image may be, for the whole process.

    Args:
      millions: of pixels; 0 for Pillow's limit, 179.

    Raises:
      ConfigError: for a number below 0, or none.
    """
    if isinstance(millions, bool) or not isinstance(millions, int | float) or not 0 <= millions < math.inf:
        raise ConfigError(
            f"data.max_megapixels={millions!r}: expected the pixels of the largest image in millions, such as 500; 0 for "
            "Pillow's limit."
        )
    # Pillow refuses above twice that number, and warns above it, of images that the user allows.
    Image.MAX_IMAGE_PIXELS = math.ceil(millions * 1e6 / 2) or PILLOWS_LIMIT
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(encoded: bytes | str | os.PathLike, where: str) -> np.ndarray:
    """Decodes one image file, of the first frame when there are several.

    Gray, palette and CMYK images become RGB; transparency is composited on white; 16-bit gray is
    scaled by 255 / 65535; the EXIF orientation is applied.

    Args:
      encoded: the file's bytes, or its path.
      where: what to call the image in messages.

    Returns:
      uint8 (height, width, 3).

    Raises:
      UnreadableError: for a file that is absent, truncated or not an image.
    """
    with reading(where), Image.open(opened(encoded)) as image:
        return _rgb(_upright(image), where)


def decode_box(
    encoded: bytes | str | os.PathLike, where: str, choose: Callable[[int, int], Box], size: Size
) -> tuple[np.ndarray, Transform]:
    """Decodes a box of one image file and gives it the wanted size: what random resized crops need.

    A JPEG is decoded at a half, a quarter or an eighth of its size where the box is then still
    twice as large as wanted.

    Args:
      encoded, where: as for `decode`.
      choose: (height, width) of the upright image ↦ the box.
      size: (height, width) in pixels.

    Returns:
      uint8 (height, width, 3), and what it is of the upright image.

    Raises:
      UnreadableError: as for `decode`.
    """
    with reading(where), Image.open(opened(encoded)) as image:
        if image.format != "JPEG" or image.mode != "RGB" or _orientation(image) != 1:
            return resized_box(_rgb(_upright(image), where), choose, size)
        width, height = image.size
        top, left, rows, columns = choose(height, width)
        enough = math.ceil(GAP * width * size[1] / columns), math.ceil(GAP * height * size[0] / rows)
        image.draft(None, enough)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + columns) * across, (top + rows) * down)
        pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box))
        return pixels, transform_of_crop((height, width), (top, left, rows, columns), size)


def resized_box(image: np.ndarray, choose: Callable[[int, int], Box], size: Size) -> tuple[np.ndarray, Transform]:
    """Returns a box of a decoded image, uint8 (H, W, 3), at the wanted size; see `decode_box`."""
    height, width = image.shape[:2]
    transform = transform_of_crop((height, width), choose(height, width), size)
    return transform.image(image), transform


def fitted(
    raw: Mapping[str, Any],
    size: Size,
    how: str,
    columns: Columns = (),
    *,
    original: bool = False,
    sizes: bool = False,
) -> dict[str, Any]:
    """Returns an item of a source's `raw`, decoded and fitted, with the labels that follow.

    Args:
      raw: "image" as it is stored, "where", and labels that fit the stored image once it is
        upright.
      size: (height, width) that is wanted.
      how: a way of `drep_jax.data.fits.transform_of_fit`.
      columns: label columns that follow the image; with none, the labels are left alone.
      original: whether maps that are declared so keep the size of the stored image.
      sizes: whether the item says the size of the picture without its padding.

    Returns:
      The labels, "image", uint8 (height, width, 3), and, with columns that follow it, "transform";
      with `sizes` also "size", (height, width).
    """
    stored, where = raw["image"], raw["where"]
    image = as_rgb(stored, where) if isinstance(stored, np.ndarray) else decode(stored, where)
    item = {name: value for name, value in raw.items() if name != "where"}
    transform = transform_of_fit(image.shape[:2], size, how, where)
    item["image"] = transform.image(image, interpolation=interpolation_of(how))
    if sizes:
        item["size"] = picture_size(transform)
    return follow(item, transform, columns, where, original=original) if geometric(columns) else item


def fitted_size(raw: Mapping[str, Any], size: Size, how: str) -> Size:
    """Returns the size of the image that `fitted` gives, without decoding it.

    Raises:
      UnreadableError: for a file that is absent or not an image.
    """
    if parse_fit(how)[0] not in VARYING:
        return size
    stored, where = raw["image"], raw["where"]
    upright = stored.shape[:2] if isinstance(stored, np.ndarray) else stored_size(stored, where)
    return transform_of_fit(upright, size, how, where).size_out


def stored_size(encoded: bytes | str | os.PathLike, where: str) -> Size:
    """Returns (height, width) of the upright image in a file, from its header.

    Raises:
      UnreadableError: for a file that is absent or not an image.
    """
    with reading(where), Image.open(opened(encoded)) as image:
        width, height = image.size
        return (width, height) if _sides_swap(image, encoded) else (height, width)


def stored_gray(encoded: bytes | str | os.PathLike, where: str) -> bool:
    """Returns whether the image in a file is gray, from its header.

    Raises:
      UnreadableError: for a file that is absent or not an image.
    """
    with reading(where), Image.open(opened(encoded)) as image:
        return image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16")


def as_rgb(array: np.ndarray, where: str) -> np.ndarray:
    """Returns a decoded image as uint8 (H, W, 3).

    Args:
      array: uint8 (H, W, 3); gray, (H, W) or (H, W, 1), is uint8, uint16 or bool.
      where: what to call the image in messages.

    Raises:
      DataError: for another type or number of channels: a fourth one may be anything.
    """
    expected = "expected uint8 (height, width, 3), or (height, width) if it is gray"
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    elif array.ndim == 3 and array.shape[-1] != 3:
        raise DataError(
            f"{where} is an array of {array.shape[-1]} channels, {array.shape}: {expected}. Choose the channels that are "
            "shown; what a further one means (transparency, infrared, …) is not known here."
        )
    if array.ndim not in (2, 3) or array.dtype not in (
        (np.uint8, np.uint16, np.bool_) if array.ndim == 2 else (np.uint8,)
    ):
        raise DataError(f"{where} is {array.dtype} {array.shape}, not an image: {expected}.")
    return _rgb(Image.fromarray(array), where)


def on_white(images: np.ndarray) -> np.ndarray:
    """Returns transparent images, uint8 (N, H, W, 4), composited on white, uint8 (N, H, W, 3)."""
    rgb = np.empty((*images.shape[:3], 3), np.uint8)
    for place, image in zip(rgb, images, strict=True):
        place[:] = _on_white(Image.fromarray(np.ascontiguousarray(image)))
    return rgb


def fit(image: np.ndarray, size: Size, how: str, where: str = "image") -> np.ndarray:
    """Gives an image the wanted size, with Pillow's antialiased bicubic filter (`short`: bilinear).

    Args:
      image: uint8 (H, W, 3).
      size: (height, width) in pixels.
      how: a way of `drep_jax.data.fits.transform_of_fit`.
      where: what to call the image in messages.

    Returns:
      uint8 (height, width, 3).
    """
    return transform_of_fit(image.shape[:2], size, how, where).image(image, interpolation=interpolation_of(how))


@contextlib.contextmanager
def reading(where: str, what: str = "image") -> Iterator[None]:
    """Makes whatever Pillow raises on a damaged file an `UnreadableError`.

    Args:
      where: what to call the file in messages.
      what: what the file is to be.
    """
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, UnreadableError):
            raise
        if isinstance(error, DataError):
            message = str(error)
        elif isinstance(error, Image.DecompressionBombError):
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
            message = (
                f"The image {where} has more than {limit:,.4g} million pixels ({error}) If it is meant to be so large, raise "
                "the limit: --config.data.max_megapixels=MILLIONS. It takes 3 to 8 bytes of memory a pixel in each of up to "
                "eight threads."
            )
        else:
            message = f"Cannot read the {what} {where}: {error}. Repair or remove it."
        raise UnreadableError(message, where) from error


def _has_late_text(encoded: bytes | str | os.PathLike) -> bool:
    """Returns whether a PNG has text or EXIF behind its pixels."""
    with io.BytesIO(encoded) if isinstance(encoded, bytes) else open(encoded, "rb") as file:
        file.seek(8)
        behind = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if behind and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            behind = behind or kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


def opened(encoded: bytes | str | os.PathLike) -> Any:
    """Returns what Pillow opens: a stream of the bytes, or the path."""
    return io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded


def _orientation(image: Image.Image) -> int:
    """Returns the orientation that is still to be applied: 1 of a TIFF that Pillow has loaded, as it turns those."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except UNREADABLE:
        return 1  # a damaged EXIF block says nothing about the pixels
    return orientation if orientation in UPRIGHT else 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # before the question what is left to do
    orientation = _orientation(image)
    return image.transpose(UPRIGHT[orientation]) if orientation != 1 else image


def _sides_swap(image: Image.Image, encoded: bytes | str | os.PathLike) -> bool:
    """Returns whether an image that is not loaded yet has height for width, without loading it."""
    # Pillow decodes a whole PNG to find EXIF behind the pixels; the names of the chunks tell
    # whether there is any.
    if image.format == "PNG" and not PNG_TEXTS & image.info.keys() and not _has_late_text(encoded):
        return False
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(ORIENTATION, 1) in SWAPPING:
        return False  # Pillow gives the size that it will have
    return _orientation(image) in SWAPPING


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _sixteen_bit(np.asarray(image), where)
    if image.mode == "F":
        raise DataError(
            f"{where} has floating-point pixels, whose range is unknown. Save it with 8 or 16 bits a channel."
        )
    return np.array((_on_white(image) if image.has_transparency_data else image).convert("RGB"))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _sixteen_bit(gray: np.ndarray, where: str) -> np.ndarray:
    if gray.min() < 0 or gray.max() > 65535:
        raise DataError(
            f"{where} has pixels from {gray.min()} to {gray.max()}, beyond 16 bits. Save it with 8 or 16 bits."
        )
    eight_bit = np.round(gray.astype(np.float32) / 257).astype(np.uint8)
    return np.repeat(eight_bit[:, :, None], 3, axis=2)
