"""What a run keeps of its images, so that it can be fused again without them.

That are the number of classes, the side information of the backbone, and the images that
certificates are measured on.
"""

import dataclasses
import json
import os
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.data.collate import read
from drep_jax.data.datasets import Images
from drep_jax.data.source import varies
from drep_jax.errors import CheckpointError, ConfigError
from drep_jax.files import whole
from drep_jax.run.setup import Setup
from drep_jax.typing import Config

INPUTS = "inputs.npz"
"""Name of the file in a run directory."""


class NoImages:
    """An empty source that stands for images which are not opened."""

    note: str | None = None
    class_names: tuple[str, ...] | None = None

    def __init__(self, name: str, num_classes: int | None, image_size: tuple[int, int]) -> None:
        self.name = name
        self.num_classes = num_classes
        self.image_size = image_size

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise IndexError(index)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run has kept of its images.

    Attributes:
      num_classes: of `data.source`; None if it is unlabeled.
      side: side-information columns with their cardinalities, see `Setup.side`.
      images: inputs of the backbone on which the fused network is compared with the explicit one,
        float32 (images, height, width, channels).
    """

    num_classes: int | None
    side: tuple[tuple[str, int], ...]
    images: np.ndarray

    def unopened(self, config: Config) -> Images:
        """Returns the images of a run's configuration, none of them opened."""
        data = config["data"]
        nothing = NoImages(data["source"], self.num_classes, tuple(data["image_size"]))
        return Images(train=nothing, held_out=nothing, num_classes=self.num_classes, test=None, others=())


def first_images(config: Config, setup: Setup) -> jax.Array:
    """Returns the first few test images, normalized.

    They are training images if there is no test set, or if test images keep several sizes.
    """
    source = setup.test if setup.test is not None and not varies(setup.test) else setup.train
    count = min(config["evaluate"]["certificate_images"], len(source))
    return setup.inputs(read(source, np.arange(count)))


def save_inputs(directory: str, config: Config, setup: Setup) -> None:
    """Writes what a run keeps of its images to its directory, whole or not at all."""
    facts = {"num_classes": setup.num_classes, "side": setup.side}
    with whole(os.path.join(directory, INPUTS), "wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts)), images=np.asarray(first_images(config, setup)))


def load_inputs(directory: str) -> Inputs | None:
    """Returns what a run has kept of its images; None for a run of an earlier release.

    Raises:
      CheckpointError: if the file is damaged.
    """
    path = os.path.join(directory, INPUTS)
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            facts, images = json.loads(str(archive["facts"])), archive["images"]
        side = tuple((str(name), int(count)) for name, count in facts["side"])
        return Inputs(facts["num_classes"], side, images)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it, and the images of the run are opened instead."
        ) from error


def certificate_images(config: Config, setup: Setup, directory: str) -> jax.Array:
    """Returns the images that certificates are measured on: those that the run has kept, or the first ones."""
    kept = load_inputs(directory)
    return first_images(config, setup) if kept is None else jnp.asarray(kept.images)


def sizes_of(config: Config) -> dict[str, tuple[int, int]]:
    """Returns {"height×width": (height, width)} of `evaluate.certificate_sizes`.

    Raises:
      ConfigError: for a size that is not understood.
    """
    sizes = {}
    for text in config["evaluate"].get("certificate_sizes", ()):  # runs of earlier releases do not have it
        parts = str(text).lower().replace("×", "x").split("x")
        if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ConfigError(
                f'evaluate.certificate_sizes: "{text}" is no size; give height and width as in "512x683".'
            )
        height, width = map(int, parts)
        sizes[f"{height}×{width}"] = (height, width)
    return sizes


def resized(images: jax.Array, size: tuple[int, int], channels: int = 3) -> jax.Array:
    """Returns inputs of another size, without antialiasing; channels after the first ones by the nearest pixel."""
    shape = (images.shape[0], *size)
    pixels, rest = images[..., :channels], images[..., channels:]
    pixels = jax.image.resize(pixels, (*shape, pixels.shape[-1]), "bilinear", antialias=False)
    return jnp.concatenate([pixels, jax.image.resize(rest, (*shape, rest.shape[-1]), "nearest")], axis=-1)


def check_sizes(config: Config, setup: Setup) -> None:
    """Refuses sizes for certificates that the backbone cannot take.

    Raises:
      ConfigError: naming the size.
    """
    for name, size in sizes_of(config).items():
        image = jax.ShapeDtypeStruct((1, *size, setup.images.shape[-1]), jnp.float32)
        try:
            jax.eval_shape(setup.backbone.apply, setup.abstract, image)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"evaluate.certificate_sizes: {config['model']['name']} takes no images of {name}: {reason} Leave the size "
                "out; the certificate at data.image_size is made in any case."
            ) from error
