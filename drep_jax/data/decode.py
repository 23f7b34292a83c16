"""From the bytes of an image file to uint8 RGB of one size, with Pillow."""

import contextlib
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from drep_jax.data.augment.flip_crop import Box
from drep_jax.errors import ConfigError, DataError, UnreadableError, did_you_mean

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
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
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
GAP = 2
"""How many times larger than wanted a box that is decoded at less than its size must still be: less would show."""


def decode(encoded: bytes | str | os.PathLike, where: str) -> np.ndarray:
    """Decodes one image file, of the first frame when there are several.

    Grey, palette and CMYK images become RGB; transparency is composited on white; 16-bit grey is scaled by 255 / 65535;
    the EXIF orientation is applied.

    Args:
      encoded: the file's bytes, or its path.
      where: what to call the image in messages.

    Returns:
      uint8 (height, width, 3).

    Raises:
      UnreadableError: for a file that is absent, truncated or not an image.
    """
    with _reading(where), Image.open(_opened(encoded)) as image:
        image.load()
        return _rgb(_upright(image), where)


def decode_box(
    encoded: bytes | str | os.PathLike, where: str, choose: Callable[[int, int], Box], size: tuple[int, int]
) -> np.ndarray:
    """Decodes a box of one image file and gives it the wanted size: what random resized crops need.

    A JPEG is decoded at a half, a quarter or an eighth of its size where the box is then still twice as large as wanted.

    Args:
      encoded, where: as for `decode`.
      choose: (height, width) of the upright image ↦ the box.
      size: (height, width) in pixels.

    Returns:
      uint8 (height, width, 3).

    Raises:
      UnreadableError: as for `decode`.
    """
    with _reading(where), Image.open(_opened(encoded)) as image:
        if image.mode != "RGB" or image.format != "JPEG" or _orientation(image) in UPRIGHT:
            return resized_box(_rgb(_upright(image), where), choose, size)
        width, height = image.size
        top, left, rows, columns = choose(height, width)
        enough = math.ceil(GAP * width * size[1] / columns), math.ceil(GAP * height * size[0] / rows)
        image.draft(None, enough)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + columns) * across, (top + rows) * down)
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box))


def resized_box(image: np.ndarray, choose: Callable[[int, int], Box], size: tuple[int, int]) -> np.ndarray:
    """Returns a box of a decoded image, uint8 (H, W, 3), at the wanted size; see `decode_box`."""
    top, left, rows, columns = choose(*image.shape[:2])
    return _resize(image[top : top + rows, left : left + columns], *size)


def fitted(raw: dict[str, Any], size: tuple[int, int], how: str) -> dict[str, Any]:
    """Returns what a source's `raw` hands out, decoded and given its size: `{"image": uint8, "label": if there is one}`."""
    stored, where = raw["image"], raw["where"]
    image = as_rgb(stored, where) if isinstance(stored, np.ndarray) else decode(stored, where)
    item = {name: value for name, value in raw.items() if name != "where"}
    return {**item, "image": fit(image, size, how, where)}


def as_rgb(array: np.ndarray, where: str) -> np.ndarray:
    """Turns a decoded image, (H, W) or (H, W, 1, 3 or 4) of uint8 or uint16 grey, into uint8 (H, W, 3)."""
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    try:
        return _rgb(Image.fromarray(array), where)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where} is {array.dtype} {array.shape}, not an image: expected uint8 (height, width, channels)."
        ) from error


def fit(image: np.ndarray, size: tuple[int, int], how: str, where: str = "image") -> np.ndarray:
    """Gives an image the wanted size.

    Args:
      image: uint8 (H, W, 3).
      size: (height, width) in pixels.
      how: `crop` scales until the image just covers the target (bicubic, antialiased) and cuts out the centre;
        `crop:S` does so for a target 1/S times as large, so that S of the short side is kept (`crop:0.875`: 256 to 224);
        `squash` scales both sides; `exact` refuses any other size.
      where: what to call the image in messages.

    Returns:
      uint8 (height, width, 3).
    """
    name, share = parse_fit(how)
    return FITS[name](image, size, where, share)


def parse_fit(how: str) -> tuple[str, float]:
    """Returns the way of resizing and the share of the short side that is kept.

    Raises:
      ConfigError: for what is none.
    """
    name, _, number = how.partition(":")
    if name not in FITS:
        raise ConfigError(f'Unknown way of resizing "{how}".{did_you_mean(name, FITS)}')
    if name == how:
        return name, 1.0
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if name != "crop" or not 0 < share <= 1:
        raise ConfigError(
            f'Unknown way of resizing "{how}": only "crop" takes a number, the share of the short side that is kept, in '
            '(0, 1], as in "crop:0.875".'
        )
    return name, share


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, UnreadableError):
            raise
        told = (
            str(error)
            if isinstance(error, DataError)
            else f"Cannot read the image {where}: {error}. Repair or remove it."
        )
        raise UnreadableError(told, where) from error


def _opened(encoded: bytes | str | os.PathLike) -> Any:
    return io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except UNREADABLE:
        return 1  # a damaged EXIF block says nothing about the pixels


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _sixteen_bit(np.asarray(image), where)
    if image.mode == "F":
        raise DataError(
            f"{where} has floating-point pixels, whose range is unknown. Save it with 8 or 16 bits a channel."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _sixteen_bit(grey: np.ndarray, where: str) -> np.ndarray:
    if grey.min() < 0 or grey.max() > 65535:
        raise DataError(
            f"{where} has pixels from {grey.min()} to {grey.max()}, beyond 16 bits. Save it with 8 or 16 bits."
        )
    eight_bit = np.round(grey.astype(np.float32) / 257).astype(np.uint8)
    return np.repeat(eight_bit[:, :, None], 3, axis=2)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _crop(image: np.ndarray, size: tuple[int, int], where: str, share: float) -> np.ndarray:
    del where
    height, width = size
    scale = max(height / image.shape[0], width / image.shape[1]) / share
    resized = _resize(image, max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale)))
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
    return resized[top : top + height, left : left + width]


def _squash(image: np.ndarray, size: tuple[int, int], where: str, share: float) -> np.ndarray:
    del where, share
    return _resize(image, *size)


def _exact(image: np.ndarray, size: tuple[int, int], where: str, share: float) -> np.ndarray:
    del share
    if image.shape[:2] != tuple(size):
        raise DataError(
            f"{where} is {image.shape[0]} x {image.shape[1]} pixels (height x width), but {size[0]} x {size[1]} is "
            'wanted. Resize the images, or choose "crop" or "squash" instead of "exact".'
        )
    return image


FITS: dict[str, Callable[[np.ndarray, tuple[int, int], str, float], np.ndarray]] = {
    "crop": _crop,
    "squash": _squash,
    "exact": _exact,
}
