"""The text that names corruptions: `gaussian:20`, `gaussian:0..40`, `clean,blur,cifar10c:fog:3`, `bank:DIR`."""

import dataclasses
import math
from urllib.parse import quote

from drep_jax.data.corruptions.cifar10c import CIFAR10C
from drep_jax.data.corruptions.imagenet_c import TABLES
from drep_jax.data.corruptions.latent import KIND, place_and_options
from drep_jax.data.corruptions.physical import CORRUPTIONS
from drep_jax.data.options import parsed
from drep_jax.errors import ConfigError, did_you_mean

CLEAN = "clean"
PROTOCOLS = tuple(TABLES)
"""Words that name a protocol, before the name and the severity."""
FILES = ("bank", "like", KIND)
"""Corruptions that are read from files: NAME:PLACE?option=value; that of latents may leave out the place."""
STRONGEST = 10.0
"""Largest factor on noise that is read from files."""
SAFE = "*+[]!/:.,"
"""Characters of options that need no quoting."""
SEVERITIES = ("1", "2", "3", "4", "5")


@dataclasses.dataclass(frozen=True)
class Part:
    """One corruption of a spec.

    Attributes:
      name: `clean`, a key of `CORRUPTIONS`, `cifar10c:` or `imagenet_c:` and a name of `CIFAR10C`, or
        `bank:`, `like:` or `pca_latent:` with a place and its options other than the strength.
      low: smallest strength, in the unit of the corruption, or the severity, or a factor.
      high: largest strength; that of each image is drawn uniformly between the two.
    """

    name: str
    low: float
    high: float


def parse_spec(spec: str) -> tuple[Part, ...]:
    """Parses corruptions joined by commas, one of which each image gets, all equally likely.

    One that is named twice is twice as likely.

    Args:
      spec: `clean`; `NAME:STRENGTH`; `NAME:LOW..HIGH`, a strength drawn uniformly for each image;
        `NAME`, the same in the corruption's default range; `cifar10c:NAME:SEVERITY` with a severity
        from 1 to 5, and `imagenet_c:NAME:SEVERITY`, the same for photographs; `bank:PLACE` and
        `like:PLACE`, noise from files, which takes `?strength=LOW..HIGH` among its options; `pca_latent:σ`,
        in the latents of the run's PCA, or of `pca_latent:FILE?strength=σ`.

    Returns:
      One `Part` a corruption, in the order given.

    Raises:
      ConfigError: for an unknown name, or a strength that is not a number in the range of the
        corruption.

    >>> parse_spec("clean,gaussian:0..40")
    (Part(name='clean', low=0.0, high=0.0), Part(name='gaussian', low=0.0, high=40.0))
    """
    return tuple(_part(text.strip(), spec) for text in spec.split(","))


def _part(text: str, spec: str) -> Part:
    name, colon, strength = text.partition(":")
    if name in PROTOCOLS:
        return _protocol(name, strength, text)
    if name in FILES:
        return _from_files(name, strength)
    if name == CLEAN:
        if colon:
            raise ConfigError(f'The corruption "{CLEAN}" takes no strength; got "{text}".')
        return Part(CLEAN, 0.0, 0.0)
    if name not in CORRUPTIONS:
        raise ConfigError(f'Unknown corruption "{name}"{_within(text, spec)}.{_hint(name)}')
    if not colon:
        return Part(name, *CORRUPTIONS[name].default)
    low, dots, high = strength.partition("..")
    first = _strength(low, name, text)
    last = _strength(high, name, text) if dots else first
    if first > last:
        raise ConfigError(f'The corruption "{text}" runs from a high to a low strength; write "{name}:{high}..{low}".')
    return Part(name, first, last)


def _strength(number: str, name: str, text: str) -> float:
    corruption = CORRUPTIONS[name]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(
            f'The corruption "{name}" needs a finite strength of at least 0 ({corruption.unit}), as in "{name}:20" or '
            f'"{name}:0..20"; got "{text}".'
        )
    if value > corruption.largest:
        raise ConfigError(
            f'The strength of "{name}" is at most {corruption.largest:g} ({corruption.unit}); got "{text}".'
        )
    return value


def _protocol(protocol: str, argument: str, text: str) -> Part:
    name, _, severity = argument.partition(":")
    if name not in TABLES[protocol]:
        published = {"cifar10c": "CIFAR-10-C", "imagenet_c": "ImageNet-C"}[protocol]
        raise ConfigError(
            f'Unknown {published} corruption "{name}" in "{text}"; the form is "{protocol}:NAME:SEVERITY".'
            f"{did_you_mean(name, TABLES[protocol])}"
        )
    if severity not in SEVERITIES:
        raise ConfigError(f'The severity of "{protocol}:{name}" is 1, 2, 3, 4 or 5; got "{text}".')
    return Part(f"{protocol}:{name}", float(severity), float(severity))


def _from_files(name: str, argument: str) -> Part:
    path, options = place_and_options(argument) if name == KIND else parsed(name, argument)
    low, high = parse_range(options.pop("strength", "1"), f"{name}: strength", 0.0, STRONGEST)
    query = "&".join(f"{option}={quote(value, safe=SAFE)}" for option, value in options.items())
    return Part(f"{name}:{path}{'?' if query else ''}{query}", low, high)


def parse_range(text: str, name: str, least: float, most: float) -> tuple[float, float]:
    """Returns the ends of "LOW..HIGH", or of one number twice.

    >>> parse_range("0.5..2", "scale", 0.1, 8.0)
    (0.5, 2.0)

    Raises:
      ConfigError: for anything else, and numbers outside of [least, most].
    """
    low, dots, high = text.partition("..")
    try:
        first, last = float(low), float(high if dots else low)
    except ValueError:
        first, last = math.nan, math.nan
    if not least <= first <= last <= most:
        raise ConfigError(
            f'{name}="{text}": expected a number from {least:g} to {most:g}, or a range of such, as in "0.5..1".'
        )
    return first, last


def _within(text: str, spec: str) -> str:
    return "" if text == spec else f' in "{spec}"'


def _hint(name: str) -> str:
    if name == "pairs":
        return (
            " Pairs of images are read from a folder to learn from them; they corrupt no other images. Their noise does, with "
            '"bank:DIR".'
        )
    if name == "unpaired":
        return " Noisy images are compared with clean ones by their features to learn from them; they corrupt no other images."
    if name in CIFAR10C:
        return f' It belongs to the CIFAR-10-C protocol: write "cifar10c:{name}:3".'
    return did_you_mean(name, [CLEAN, *CORRUPTIONS, *FILES, *PROTOCOLS])
