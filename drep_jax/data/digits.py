"""The UCI handwritten digits of scikit-learn: 1,797 real 8 x 8 images, without a download."""

from typing import Any

import numpy as np

from drep_jax.data.decode import fit
from drep_jax.errors import ConfigError

SIZES = {"train": 1000, "validation": 197, "test": 600}
SPLIT_SEED = 0


class DigitsSource:
    """One split of the digits, held in memory."""

    in_memory = True
    note: str | None = None

    def __init__(self, split: str, image_size: tuple[int, int] = (8, 8), resize: str = "crop") -> None:
        from sklearn.datasets import load_digits  # takes a second to import

        gray, labels = load_digits(return_X_y=True)
        chosen = split_indices(labels)[split]
        images = np.round(gray[chosen].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8).repeat(3, axis=3)
        self.name = "digits"
        self.num_classes: int | None = 10
        self.class_names: tuple[str, ...] | None = tuple("0123456789")
        self._images = np.stack([fit(image, image_size, resize, f"digits image {i}") for i, image in enumerate(images)])
        self.labels = labels[chosen].astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": self.labels[index]}


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the indices of each split: disjoint, stratified by class, always the same."""
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(labels))
    rest, test = train_test_split(everything, test_size=SIZES["test"], stratify=labels, random_state=SPLIT_SEED)
    train, validation = train_test_split(
        rest, test_size=SIZES["validation"], stratify=labels[rest], random_state=SPLIT_SEED
    )
    return {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}


def open_digits(
    argument: str, split: str, image_size: tuple[int, int], resize: str, data_dir: str | None
) -> DigitsSource:
    """Opens `digits`."""
    del data_dir
    if argument:
        raise ConfigError(f'The data source "digits" takes no argument; got "digits:{argument}".')
    return DigitsSource(split, image_size, resize)
