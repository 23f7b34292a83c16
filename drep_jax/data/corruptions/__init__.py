"""Corruptions of images, on the host: functions of (seed, image, corruption), not of the batch."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Num

from drep_jax.data.corruptions.bank import open_bank
from drep_jax.data.corruptions.cifar10c import CIFAR10C, at_severity
from drep_jax.data.corruptions.imagenet_c import TABLES
from drep_jax.data.corruptions.latent import KIND, open_latent
from drep_jax.data.corruptions.like import open_like
from drep_jax.data.corruptions.physical import CORRUPTIONS, Corruption
from drep_jax.data.corruptions.spec import CLEAN, FILES, PROTOCOLS, Part, parse_spec
from drep_jax.data.options import parsed
from drep_jax.errors import DataError

__all__ = ["CIFAR10C", "CLEAN", "CORRUPTIONS", "Corruption", "Part", "check_spec", "corrupt", "noise_of", "parse_spec"]

OPENED: dict[str, Callable[[str, dict[str, str]], Any]] = dict(
    zip(FILES, (open_bank, open_like, open_latent), strict=True)
)
"""Corruptions from files: (place, options) ↦ (image, generator, strength) ↦ image."""

WORD = 2**64
CHOICE = "which of several"  # no corruption has a name with spaces, so no other draw has this key


def corrupt(
    images: Num[np.ndarray, "b h w c"],
    index: Int[np.ndarray, "b"],
    spec: str,
    seed: int,
    size: Int[np.ndarray, "b 2"] | None = None,
) -> Float32[np.ndarray, "b h w c"]:
    """Corrupts images, each with its own random numbers.

    The numbers are keyed by the corruption's name but not by its strength. So two strengths of one
    corruption draw the same noise, and an image whose strength was drawn looks as it would with
    that strength given.

    Args:
      images: (B, H, W, 1 or 3), gray levels from 0 to 255; not modified.
      index: (B,), each image's index in its source: the same image is always corrupted in the same
        way.
      spec: `clean`, `gaussian:20`, `gaussian:0..40`, `gaussian`, `cifar10c:fog:3`, `bank:DIR`,
        `like:DIR`, `pca_latent:1`, or several of these with commas between; see `parse_spec`.
      seed: another seed is other noise.
      size: (B, 2), height and width of each image without padding, the column "size" of a batch;
        None where there is no padding. Padding stays as it is, so that what happens to an image
        does not depend on its bucket.

    Returns:
      (B, H, W, C), clipped to 0..255.

    Raises:
      ConfigError: for an unknown or impossible spec.
      DataError: for arrays of another shape, and for noise whose files cannot be used.
    """
    parts = parse_spec(spec)
    images, index = np.asarray(images), np.asarray(index)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or index.shape != images.shape[:1]:
        raise DataError(
            f"Expected images (count, height, width, 1 or 3 channels) and one index an image; got {images.shape} and "
            f"{index.shape}."
        )
    out = np.clip(images.astype(np.float32), 0, 255)
    sizes = np.full((len(out), 2), out.shape[1:3]) if size is None else np.asarray(size)
    for padded, (height, width), number in zip(out, sizes.tolist(), index.tolist(), strict=True):
        image = padded[:height, :width]
        if not image.size:
            continue  # a place of the batch that is all padding
        choice = 0 if len(parts) == 1 else int(_generator(seed, number, CHOICE).integers(len(parts)))
        image[...] = _apply(parts[choice], image, seed, number)
    return np.clip(out, 0, 255, out=out)


def _apply(part: Part, image: np.ndarray, seed: int, number: int) -> np.ndarray:
    if part.high == 0:
        return image
    kind = part.name.partition(":")[0]
    # Noise from files does not depend on where they lie.
    rng = _generator(seed, number, kind if kind in FILES else part.name)
    strength = part.low + (part.high - part.low) * rng.random()
    if kind in PROTOCOLS:
        return at_severity(image, rng, part.name.partition(":")[2], int(strength), TABLES[kind])
    function = noise_of(part) if kind in FILES else CORRUPTIONS[part.name].function
    return image if strength == 0 else function(image, rng, strength)


def check_spec(spec: str) -> list[Any]:
    """Parses a spec and opens the noise that it reads from files, so that a wrong place fails early.

    Returns:
      The banks and noise models in it.

    Raises:
      ConfigError: for a spec that cannot be parsed, or options that cannot be used.
      DataError: for files that cannot be.
    """
    parts = [part for part in parse_spec(spec) if part.name.partition(":")[0] in FILES]
    return [noise_of(part) for part in parts if part.name != f"{KIND}:"]  # which the run makes, or checks


def noise_of(part: Part) -> Any:
    """Returns the bank or the noise model of a part, opened once in a process."""
    if part.name == f"{KIND}:":  # which PCA that is, the run says
        return open_latent("", {})
    return _opened(part.name)


@functools.lru_cache(maxsize=8)
def _opened(name: str) -> Any:
    kind, _, argument = name.partition(":")
    place, options = parsed(kind, argument)
    return OPENED[kind](place, options)


def _generator(seed: int, number: int, name: str) -> np.random.Generator:
    # The image's index is the highest word of the counter, which no draw ever reaches.
    key = np.array([seed % WORD, _hash(name)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, number % WORD], np.uint64)))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
