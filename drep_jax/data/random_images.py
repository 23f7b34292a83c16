"""Random pixels and labels, made on demand: for dry runs and timing only."""

import zlib
from typing import Any

import numpy as np

from drep_jax.errors import ConfigError

DEFAULT_CLASSES = 1000


class RandomSource:
    """`count` images of uniform noise; image i depends on the split and on i only."""

    note: str | None = "Random pixels with random labels: for dry runs only."

    def __init__(self, count: int, num_classes: int, split: str, image_size: tuple[int, int]) -> None:
        self.name = f"random:{count}:{num_classes}"
        self.num_classes: int | None = num_classes
        self._classes = num_classes
        self.class_names: tuple[str, ...] | None = None
        self._count = count
        self._size = image_size
        self._key = zlib.crc32(split.encode())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._count:
            raise IndexError(f"{self.name} has no image {index}.")
        generator = np.random.Generator(np.random.Philox(key=np.array([self._key, index], np.uint64)))
        label = np.int32(generator.integers(self._classes))
        return {"image": generator.integers(0, 256, (*self._size, 3), dtype=np.uint8), "label": label}


def open_random(
    argument: str, split: str, image_size: tuple[int, int], resize: str, data_dir: str | None
) -> RandomSource:
    """Opens `random:COUNT[:CLASSES]`."""
    del resize, data_dir  # images are made in the wanted size
    count, _, classes = argument.partition(":")
    numbers = [count, classes or str(DEFAULT_CLASSES)]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError(
            f'Expected "random:COUNT" or "random:COUNT:CLASSES" with whole numbers above 0; got "random:{argument}".'
        )
    return RandomSource(int(numbers[0]), int(numbers[1]), split, image_size)
