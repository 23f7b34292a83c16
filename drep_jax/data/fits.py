"""How an image gets its size, `config.data.resize`: each way is the `Transform` that it does."""

from collections.abc import Callable

from drep_jax.data.geometry import Transform
from drep_jax.data.steps import Size
from drep_jax.errors import ConfigError, DataError, did_you_mean

KEEP = "keep"


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
      where: what to call the image in messages.

    Raises:
      ConfigError: for another way.
      DataError: for a size that `exact` refuses.
    """
    name, number = parse_fit(how)
    return FITS[name](size, target, number, where)


def parse_fit(how: str) -> tuple[str, float]:
    """Returns a way of fitting and its number: the fraction kept or the multiple, 1 by default.

    Raises:
      ConfigError: for an unknown way, or a number that it does not take.
    """
    name, colon, text = how.partition(":")
    if name not in FITS:
        raise ConfigError(f'Unknown way of resizing "{how}".{did_you_mean(name, FITS)}')
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


def round_up(size: Size, multiple: int) -> Size:
    """Returns (height, width), both rounded up to a multiple."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def _crop(size: Size, target: Size, fraction: float, where: str) -> Transform:
    del where
    height, width = target
    scale = max(height / size[0], width / size[1]) / fraction
    rows, columns = max(height, round(size[0] * scale)), max(width, round(size[1] * scale))
    resized = Transform(size).resize((rows, columns))
    return resized.crop((rows - height) // 2, (columns - width) // 2, height, width)


def _squash(size: Size, target: Size, number: float, where: str) -> Transform:
    del number, where
    return Transform(size).resize(target)


def _exact(size: Size, target: Size, number: float, where: str) -> Transform:
    del number
    if tuple(size) != tuple(target):
        raise DataError(
            f"{where} is {size[0]} x {size[1]} pixels (height x width), but {target[0]} x {target[1]} is wanted. Resize the "
            'images, or choose "crop", "squash" or "pad" instead of "exact".'
        )
    return Transform(size)


def _pad(size: Size, target: Size, number: float, where: str) -> Transform:
    del number, where
    scale = min(target[0] / size[0], target[1] / size[1])
    height, width = (min(most, max(1, round(side * scale))) for side, most in zip(size, target, strict=True))
    return Transform(size).resize((height, width)).window(0, 0, *target)


def _keep(size: Size, target: Size, multiple: float, where: str) -> Transform:
    del target, where
    return Transform(size).window(0, 0, *round_up(size, int(multiple)))


FITS: dict[str, Callable[[Size, Size, float, str], Transform]] = {
    "crop": _crop,
    "squash": _squash,
    "exact": _exact,
    "pad": _pad,
    KEEP: _keep,
}
"""(size of the image, size wanted, number, what to call the image) ↦ what is done."""
