"""From the bytes of an image file to uint8 RGB of one size, with Pillow."""

import io
import os
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from drep_jax.errors import DataError, lookup

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
      DataError: for a file that is absent, truncated or not an image.
    """
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            image.load()
            return _rgb(_upright(image), where)
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"Cannot read the image {where}: {error}. Repair or remove it.") from error


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
        `squash` scales both sides; `exact` refuses any other size.
      where: what to call the image in messages.

    Returns:
      uint8 (height, width, 3).
    """
    return lookup(FITS, how, "way of resizing")(image, size, where)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except UNREADABLE:
        orientation = 1  # a damaged EXIF block says nothing about the pixels, which have been read
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


def _crop(image: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    del where
    height, width = size
    scale = max(height / image.shape[0], width / image.shape[1])
    resized = _resize(image, max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale)))
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
    return resized[top : top + height, left : left + width]


def _squash(image: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    del where
    return _resize(image, *size)


def _exact(image: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    if image.shape[:2] != tuple(size):
        raise DataError(
            f"{where} is {image.shape[0]} x {image.shape[1]} pixels (height x width), but {size[0]} x {size[1]} is "
            'wanted. Resize the images, or choose "crop" or "squash" instead of "exact".'
        )
    return image


FITS: dict[str, Callable[[np.ndarray, tuple[int, int], str], np.ndarray]] = {
    "crop": _crop,
    "squash": _squash,
    "exact": _exact,
}
