"""Images of learner `measured`: clean ones and corrupted versions of each, held or made when needed."""

from typing import Any

import numpy as np

from drep_jax.core.chunks import Streams
from drep_jax.data.collate import read
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import epoch_order
from drep_jax.errors import DataError
from drep_jax.learners.noise import PAIRS, pairs_of
from drep_jax.run.setup import Setup
from drep_jax.typing import Config

CORRUPTION_SEED = 1
"""Added to the run's seed for training noise, so that it differs from the test noise."""


HELD = 0.5
"""Fraction of the bound on memory up to which images are held; more are read again when needed."""


class CorruptedImages(Streams):
    """Normalized images in three streams or more: clean, clean once more, and corrupted.

    Attributes:
      corrupted: number of corrupted versions of each image.
    """

    def __init__(self, config: Config, setup: Setup) -> None:
        """Opens the training images, or the pairs that `config.noise` names.

        Raises:
          DataError: if there are no images.
        """
        options, self._noise, self._setup = config["measured"], config["noise"], setup
        self._pairs = pairs_of(config) if self._noise.startswith(PAIRS) else None
        available = len(setup.train if self._pairs is None else self._pairs)
        count = min(options["images"] or available, available)
        if not count:
            raise DataError(f"{setup.train.name} has no training images to measure the noise on.")
        self.corrupted = 1 if self._pairs is not None else options["draws"]
        self._seeds = [config["seed"] + CORRUPTION_SEED + draw * 7919 for draw in range(self.corrupted)]
        order = np.arange(available) if self._pairs is not None else epoch_order(available, config["seed"], 0)
        self._index = np.sort(order[:count])
        self._held: tuple[np.ndarray, ...] = ()
        self._arguments: dict[str, np.ndarray] = {}
        self._image_shape = self._make(np.zeros(1, np.int64))[0].shape[1:]
        if self.bytes <= HELD * options["memory_gib"] * 2**30:
            self._held = self._make(np.arange(count))

    @property
    def shape(self) -> tuple[int, ...]:
        """(streams, images, height, width, channels)."""
        return (2 + self.corrupted, len(self._index), *self._image_shape)

    @property
    def bytes(self) -> int:
        """Bytes of all images, the clean ones counted once."""
        return 4 * (1 + self.corrupted) * len(self._index) * int(np.prod(self._image_shape))

    @property
    def resident(self) -> bool:
        """Whether the images are held in memory."""
        return bool(self._held)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Returns some images of every stream."""
        clean, *corrupted = (part[index] for part in self._held) if self._held else self._make(index)
        return np.stack([clean, clean, *corrupted])

    def arguments(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what the backbone is given beside some images that have been taken."""
        return {name: rows[index] for name, rows in self._arguments.items()}

    def _make(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the clean images, and each corrupted version of them."""
        chosen = self._index[index]
        if self._pairs is not None:
            pairs = [self._pairs[int(i)] for i in chosen]
            batch: dict[str, Any] = {"image": np.stack([pair["clean"] for pair in pairs])}
            corrupted = [np.stack([pair["corrupted"] for pair in pairs]).astype(np.float32)]
            if self._setup.sizes and "size" in pairs[0]:
                batch["size"] = np.stack([pair["size"] for pair in pairs])
        else:
            batch = read(self._setup.train, chosen, sizes=self._setup.sizes)
            corrupted = [corrupt(batch["image"], chosen, self._noise, seed, batch.get("size")) for seed in self._seeds]
        for name, rows in self._setup.arguments(batch).items():
            every = self._arguments.setdefault(name, np.zeros((len(self._index), *rows.shape[1:]), rows.dtype))
            every[index] = rows
        return tuple(np.asarray(self._setup.inputs({**batch, "image": x})) for x in (batch["image"], *corrupted))
