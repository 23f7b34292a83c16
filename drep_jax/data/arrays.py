"""Arrays of the user's own: channels are counted and never guessed, class names may be bytes."""

import re

import numpy as np

from drep_jax.data.decode import on_white
from drep_jax.errors import ConfigError, DataError

SHOWN = (1, 3)
"""Numbers of channels that need no question: gray, and red, green, blue."""

TRANSPARENT = "rgba"


def shown(images: np.ndarray, channels: str | None, where: str) -> np.ndarray:
    """Returns images as gray or RGB, of the channels that the user names.

    Args:
      images: uint8 (N, H, W) or (N, H, W, C).
      channels: what to show: numbers from 0 of one channel (gray) or of three (red, green, blue),
        as in "0,1,2"; "rgba", whose fourth channel is transparency, composited on white; None where
        the user says nothing.
      where: what to call the images in messages.

    Returns:
      uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3).

    Raises:
      ConfigError: for channels that the images do not have.
      DataError: for a number of channels that says nothing, where the user says nothing either.

    >>> shown(np.zeros((5, 8, 8, 4), np.uint8), "3,1,0", "mine.npz").shape
    (5, 8, 8, 3)
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"{where}: images are {images.dtype} {images.shape}, expected uint8 (N, H, W, 3) or (N, H, W).")
    if images.ndim == 3:
        if images.shape[-1] == 3:
            raise DataError(
                f"{where}: images are {images.shape}, which is one image, or gray images 3 pixels wide. Give "
                "(N, H, W, 3); or (N, H, W, 1) if they are gray."
            )
        images = images[..., None]
    count = images.shape[-1]
    if channels is None:
        if count not in SHOWN:
            raise DataError(f"{where}: images are {images.shape}, {count} channels each. {_way_out(images.shape)}")
        return images
    if channels == TRANSPARENT:
        if count != 4:
            raise ConfigError(f"{where}: channels=rgba needs 4 channels, but the images have {count}.")
        return on_white(images)
    numbers = [int(number) for number in channels.split(",")] if re.fullmatch(r"\d+(,\d+)*", channels) else []
    if len(numbers) not in SHOWN:
        raise ConfigError(
            f'{where}: channels={channels} is neither "rgba" nor the numbers of one channel (gray) or three (red, green, '
            'blue), as in "0,1,2".'
        )
    if max(numbers) >= count:
        raise ConfigError(
            f"{where}: there is no channel {max(numbers)}: the images have {count}, numbered 0 to {count - 1}."
        )
    return images[..., numbers]


def text_of(values: np.ndarray, where: str) -> np.ndarray:
    """Returns an array of bytes as one of text, and any other as it is.

    Raises:
      DataError: for bytes that are not UTF-8.

    >>> text_of(np.array([b"cat", b"dog"]), "mine.npz").tolist()
    ['cat', 'dog']
    """
    if values.dtype.kind != "S":
        return values
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} holds the bytes {error.object!r}, which are not UTF-8. Save names as text: np.array(names, dtype=str)."
        ) from error


def _way_out(shape: tuple[int, ...]) -> str:
    if shape[1] <= 4 < min(shape[2:]):
        return "The channels come before height and width: save np.moveaxis(images, 1, -1)."
    names = "0,1,2" if shape[-1] > 2 else "0"
    transparency = " or, if the fourth is transparency, ?channels=rgba (on white)" if shape[-1] == 4 else ""
    return f"Say which of them are red, green and blue, or which one is gray, behind the path: ?channels={names}{transparency}."
