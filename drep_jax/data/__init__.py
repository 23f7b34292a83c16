"""Image sources with random access, and the registry that opens one by its name."""

from collections.abc import Callable

from drep_jax.data import decode, digits, folder, idx_source, list_file, npz_source, random_images, splits, tfds_source
from drep_jax.data.source import Source
from drep_jax.errors import ConfigError, lookup

__all__ = ["SOURCES", "Source", "open_source"]


# Another source is one opener: (what follows the colon, split, (height, width), resize, data_dir) -> Source.
SOURCES: dict[str, Callable[[str, str, tuple[int, int], str, str | None], Source]] = {
    "digits": digits.open_digits,
    "folder": folder.open_folder,
    "idx": idx_source.open_idx,
    "list": list_file.open_list,
    "npz": npz_source.open_npz,
    "random": random_images.open_random,
    "tfds": tfds_source.open_tfds,
}


def open_source(
    spec: str, split: str, *, image_size: tuple[int, int], resize: str = "crop", data_dir: str | None = None
) -> Source:
    """Opens a data set for reading.

    Args:
      spec: `digits`, `folder:DIR`, `idx:DIR`, `list:FILE`, `npz:NAME`, `npz:FILE.npz`, `tfds:NAME[/config]` or
        `random:COUNT[:CLASSES]`.
      split: `train`, `validation` or `test`.
      image_size: (height, width) in pixels of every image that the source returns.
      resize: `crop` (short side to the target, then the centre), `crop:0.875` (so that 87.5 % of the short side is kept),
        `squash` (both sides) or `exact` (refuse other sizes).
      data_dir: where data sets are kept; None means TFDS_DATA_DIR or ~/tensorflow_datasets (tfds), DREP_DATA (npz), or
        that the directory is given in full (idx).

    Raises:
      ConfigError: for an unknown source, split or way of resizing.
      DataError: when the images are absent or not laid out as expected.
    """
    kind, _, argument = spec.partition(":")
    opener = lookup(SOURCES, kind, "data source")
    splits.check_split(split)
    decode.parse_fit(resize)
    if len(image_size) != 2 or min(image_size) < 1:
        raise ConfigError(f"The image size is (height, width), both at least 1; got {tuple(image_size)}.")
    height, width = image_size
    return opener(argument, split, (int(height), int(width)), resize, data_dir)
