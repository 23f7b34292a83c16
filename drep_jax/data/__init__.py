"""Image sources with random access, and the registry that opens one by its name."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from drep_jax.data import decode, digits, folder, idx_source, npz_source, random_images, splits, tfds_source
from drep_jax.errors import ConfigError, lookup


@runtime_checkable
class Source(Protocol):
    """A sequence of equally large RGB images.

    Attributes:
      name: what the user asked for, used in messages and reports.
      num_classes: the number of classes; None when the images are unlabelled.
      class_names: one name a class, in the order of the labels; None when there are none.
      note: what the user should know about how the images were found or split; None when there is nothing to say.

    A source whose images need no reading or decoding may also have a true `in_memory`: it is then read without threads.
    """

    name: str
    num_classes: int | None
    class_names: tuple[str, ...] | None
    note: str | None

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `{"image": uint8 (H, W, 3), "label": int32 scalar}`, without "label" when unlabelled."""
        ...


# Another source is one opener: (what follows the colon, split, (height, width), resize, data_dir) -> Source.
SOURCES: dict[str, Callable[[str, str, tuple[int, int], str, str | None], Source]] = {
    "digits": digits.open_digits,
    "folder": folder.open_folder,
    "idx": idx_source.open_idx,
    "npz": npz_source.open_npz,
    "random": random_images.open_random,
    "tfds": tfds_source.open_tfds,
}


def open_source(
    spec: str, split: str, *, image_size: tuple[int, int], resize: str = "crop", data_dir: str | None = None
) -> Source:
    """Opens a data set for reading.

    Args:
      spec: `digits`, `folder:DIR`, `idx:DIR`, `npz:NAME`, `tfds:NAME[/config]` or `random:COUNT[:CLASSES]`.
      split: `train`, `validation` or `test`.
      image_size: (height, width) in pixels of every image that the source returns.
      resize: `crop` (short side to the target, then the centre), `squash` (both sides) or `exact` (refuse other sizes).
      data_dir: where data sets are kept; None means TFDS_DATA_DIR or ~/tensorflow_datasets (tfds), DREP_DATA (npz), or
        that the directory is given in full (idx).

    Raises:
      ConfigError: for an unknown source, split or way of resizing.
      DataError: when the images are absent or not laid out as expected.
    """
    kind, _, argument = spec.partition(":")
    opener = lookup(SOURCES, kind, "data source")
    splits.check_split(split)
    lookup(decode.FITS, resize, "way of resizing")
    if len(image_size) != 2 or min(image_size) < 1:
        raise ConfigError(f"The image size is (height, width), both at least 1; got {tuple(image_size)}.")
    height, width = image_size
    return opener(argument, split, (int(height), int(width)), resize, data_dir)
