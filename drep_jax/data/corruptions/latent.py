"""The noise of l-DAE's pre-training, `pca_latent:σ`: white in the latents of patches, and so structured in the image.

    x ← x + Vᵀ(σ s ε),  ε ~ N(0, I) for each patch

V and s are the PCA of the training images' patches (`drep_jax.models.patch_pca`), which a run with
pre-training writes to pca.npz. Patches that reach beyond the image are cut off.
"""

import functools
import math
import os

import numpy as np
from jaxtyping import Float32

from drep_jax.data.options import parsed
from drep_jax.errors import ConfigError, DataError
from drep_jax.files import expanded
from drep_jax.models.patch_pca import PatchPCA, load_pca

KIND = "pca_latent"
_of_the_run: list[str] = []


def use_pca(path: str) -> None:
    """Makes a saved PCA that of `pca_latent:σ`, where no file is named, in this process."""
    _of_the_run[:] = [path]


class LatentNoise:
    """Noise in the latents of a PCA.

    Attributes:
      pca: of normalized patches.
      gray: standard deviation of the images' normalization, by channel, in gray levels.
    """

    def __init__(self, pca: PatchPCA, std: np.ndarray) -> None:
        self.pca, self.gray = pca, (255.0 * np.broadcast_to(std, pca.channels)).astype(np.float32)

    def __call__(
        self, image: Float32[np.ndarray, "h w c"], rng: np.random.Generator, sigma: float
    ) -> Float32[np.ndarray, "h w c"]:
        """Returns the image with noise of σ in the latents of every patch.

        Raises:
          DataError: for an image of other channels.
        """
        (height, width, channels), (down, across) = image.shape, self.pca.patch
        if channels != self.pca.channels:
            raise DataError(
                f'"{KIND}" has a PCA of patches of {self.pca.channels} channels, and the image has {channels}.'
            )
        rows, columns = math.ceil(height / down), math.ceil(width / across)
        noise = rng.standard_normal((rows, columns, self.pca.components), np.float32)
        patches = (np.float32(sigma) * noise * self.pca.scale.astype(np.float32)) @ self.pca.directions.astype(
            np.float32
        )
        whole = patches.reshape(rows, columns, down, across, channels).swapaxes(1, 2)
        return image + whole.reshape(rows * down, columns * across, channels)[:height, :width] * self.gray


def open_latent(place: str, options: dict[str, str]) -> LatentNoise:
    """Opens the noise of a saved PCA.

    Args:
      place: its file; "" for that of the run.
      options: none.

    Raises:
      ConfigError: for options, or without a PCA.
      CheckpointError: for a file that is none.
    """
    if options:
        raise ConfigError(f'"{KIND}:{place}" has no option "{next(iter(options))}" but strength.')
    if not place and not _of_the_run:
        raise ConfigError(
            f'"{KIND}:σ" takes the PCA of a run with pre-training, and this run has none: set --config.pretrain.steps, or name '
            f'a PCA with "{KIND}:WORKDIR/pca.npz?strength=σ".'
        )
    path = expanded(place) if place else _of_the_run[0]
    return _read(path, os.stat(path).st_mtime_ns if os.path.isfile(path) else 0)


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int) -> LatentNoise:
    """Opens a file once in a process, for as long as it is the same."""
    del changed
    pca, _, std = load_pca(path)
    return LatentNoise(pca, std)


def place_and_options(argument: str) -> tuple[str, dict[str, str]]:
    """Returns the file and the options of what follows `pca_latent:`, where a number or a range is the strength.

    >>> place_and_options("0..1.4"), place_and_options("runs/a/pca.npz?strength=1")
    (('', {'strength': '0..1.4'}), ('runs/a/pca.npz', {'strength': '1'}))
    """
    try:
        [float(end) for end in argument.split("..")]
    except ValueError:
        return parsed(KIND, argument)
    return "", {"strength": argument}


def needs_a_run(spec: str) -> bool:
    """Returns whether a spec has noise in the latents of the run's own PCA.

    >>> needs_a_run("clean,pca_latent:1"), needs_a_run("pca_latent:a.npz?strength=1")
    (True, False)
    """
    parts = (part.strip().partition(":") for part in spec.split(","))
    return any(name == KIND and not place_and_options(argument)[0] for name, _, argument in parts if name == KIND)
