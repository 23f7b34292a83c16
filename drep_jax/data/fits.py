"""How an image gets its size, `config.data.resize`: each way is the `Transform` that it does."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from drep_jax.data.geometry import Transform
from drep_jax.data.resampling import PLAIN
from drep_jax.data.steps import Size, Window
from drep_jax.errors import ConfigError, DataError, did_you_mean

KEEP = "keep"
SHORT = "short"

VARYING = (KEEP, SHORT)
"""Ways that leave images of several sizes, for evaluation in buckets."""


def transform_of_fit(size: Size, target: Size, how: str, where: str = "image") -> Transform:
    """Returns what fitting does to an image of that size.

    Args:
      size: (height, width) of the image in pixels.
      target: (height, width) that is wanted.
      how: one of these.
        `crop` scales until the image just covers the target, and cuts out the center.
        `crop:S` does so for a target 1/S times as large, so that the fraction S of the short side
        is kept (`crop:0.875`: 256 to 224).
        `squash` scales both sides.
        `exact` refuses any other size.
        `pad` scales until the image just fits into the target, and pads it below and on the right.
        `keep` leaves the size, whatever the target.
        `keep:M` pads it below and on the right, up to multiples of M pixels.
        `short:S` scales both sides alike until the short one has S pixels; with `short:S:L` no more
        than lets the long one have L. `short:S:L:M` then rounds both sides up to multiples of M
        pixels, by a second resize, as public protocols do.
      where: what to call the image in messages.

    Raises:
      ConfigError: for another way.
      DataError: for a size that `exact` refuses.
    """
    name, *numbers = parse_fit(how)
    return FITS[name](size, target, numbers, where)


def interpolation_of(how: str) -> str:
    """Returns how an image is resized, a key of `drep_jax.data.resampling.INTERPOLATIONS`."""
    return PLAIN if parse_fit(how)[0] == SHORT else "bicubic"


def scaled_size(size: Size, short: float, long: float) -> Size:
    """Returns the size of an image scaled until one side is as long as wanted: both sides ⌊side · s + ½⌋.

    s = min(long / longer side, short / shorter side).

    Args:
      size: (height, width) in pixels.
      short, long: most pixels of the shorter and of the longer side; infinite for any.
    """
    scale = min(long / max(size), short / min(size))
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in size)
    return height, width


def parse_fit(how: str) -> tuple[Any, ...]:
    """Returns a way of fitting and its numbers: the fraction kept or the multiple, 1 by default.

    Of `short` they are the short side, the long one (infinite by default) and the multiple.

    Raises:
      ConfigError: for an unknown way, or a number that it does not take.
    """
    name, colon, text = how.partition(":")
    if name not in FITS:
        raise ConfigError(f'Unknown way of resizing "{how}".{did_you_mean(name, FITS)}')
    if name == SHORT:
        parts = text.split(":")
        if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"[1-9]\d{0,5}", part) for part in parts):
            raise ConfigError(
                f'Unknown way of resizing "{how}": "short" takes the pixels of the short side, of the long one at most, and a '
                'multiple to round up to, as in "short:512", "short:512:2048" or "short:512:2048:32".'
            )
        sides = [float(part) for part in parts]
        return name, *sides, *(math.inf, 1.0)[len(sides) - 1 :]
    if not colon:
        return name, 1.0
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if name == "crop" and 0 < number <= 1:
        return name, number
    if name == KEEP and number >= 1 and number == int(number):
        return name, number
    raise ConfigError(
        f'Unknown way of resizing "{how}": only "crop" takes the fraction of the short side that is kept, in (0, 1], as in '
        '"crop:0.875", and "keep" a whole number of pixels, as in "keep:32".'
    )


def pads(how: str) -> bool:
    """Returns whether a way of fitting may leave padding, below the picture and on its right."""
    name, number, *_ = parse_fit(how)
    return name == "pad" or (name == KEEP and number > 1)


def picture_size(transform: Transform) -> Size:
    """Returns (height, width) of the picture at the top left of what a fit gives, without padding.

    Args:
      transform: of `transform_of_fit`.

    >>> picture_size(transform_of_fit((10, 20), (32, 32), "pad"))
    (16, 32)
    """
    whole = transform.size_out
    if not transform.steps or not isinstance(transform.steps[-1], Window):
        return whole
    before = Transform(transform.size_in, transform.steps[:-1]).size_out
    return min(before[0], whole[0]), min(before[1], whole[1])


def round_up(size: Size, multiple: int) -> Size:
    """Returns (height, width), both rounded up to a multiple."""
    height, width = (-(-int(side) // multiple) * multiple for side in size)
    return height, width


def _crop(size: Size, target: Size, numbers: Sequence[float], where: str) -> Transform:
    del where
    height, width = target
    scale = max(height / size[0], width / size[1]) / numbers[0]
    rows, columns = max(height, round(size[0] * scale)), max(width, round(size[1] * scale))
    resized = Transform(size).resize((rows, columns))
    return resized.crop((rows - height) // 2, (columns - width) // 2, height, width)


def _squash(size: Size, target: Size, numbers: Sequence[float], where: str) -> Transform:
    del numbers, where
    return Transform(size).resize(target)


def _exact(size: Size, target: Size, numbers: Sequence[float], where: str) -> Transform:
    del numbers
    if tuple(size) != tuple(target):
        raise DataError(
            f"{where} is {size[0]} x {size[1]} pixels (height x width), but {target[0]} x {target[1]} is wanted. Resize the "
            'images, or choose "crop", "squash" or "pad" instead of "exact".'
        )
    return Transform(size)


def _pad(size: Size, target: Size, numbers: Sequence[float], where: str) -> Transform:
    del numbers, where
    scale = min(target[0] / size[0], target[1] / size[1])
    height, width = (min(most, max(1, round(side * scale))) for side, most in zip(size, target, strict=True))
    return Transform(size).resize((height, width)).window(0, 0, *target)


def _keep(size: Size, target: Size, numbers: Sequence[float], where: str) -> Transform:
    del target, where
    return Transform(size).window(0, 0, *round_up(size, int(numbers[0])))


def _short(size: Size, target: Size, numbers: Sequence[float], where: str) -> Transform:
    del target, where
    short, long, multiple = numbers
    scaled = scaled_size(size, short, long)
    return Transform(size).resize(scaled).resize(round_up(scaled, int(multiple)))


FITS: dict[str, Callable[[Size, Size, Sequence[float], str], Transform]] = {
    "crop": _crop,
    "squash": _squash,
    "exact": _exact,
    "pad": _pad,
    KEEP: _keep,
    SHORT: _short,
}
"""(size of the image, size wanted, numbers, what to call the image) ↦ what is done."""
