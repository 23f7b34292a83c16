"""The moments of a run: computed once, saved in its directory, tied to backbone and image size."""

import dataclasses
import itertools
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from drep_jax import weights
from drep_jax.core.moments import SHIFT_IMAGES, Moments, collect_moments, passes
from drep_jax.core.sites import Site
from drep_jax.core.working import fitting_batch, forward_bytes
from drep_jax.data import Source
from drep_jax.data.collate import read
from drep_jax.data.fits import pads
from drep_jax.data.loader import evaluation_batches
from drep_jax.data.source import fit_of
from drep_jax.errors import CheckpointError
from drep_jax.files import whole
from drep_jax.parallel import devices, processes
from drep_jax.progress import bar
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup
from drep_jax.typing import Path, Tree

MOMENTS = "moments.npz"
"""Name of the file in a run directory."""
NOISY_MOMENTS = "moments_noisy.npz"
"""Name of the file of the moments of noisy images, which `noise=unpaired:DIR` takes."""


def save_moments(
    path: str, moments: Mapping[Path, Moments], owner: str, tokens: float = 1.0, *, sizes: bool = False
) -> None:
    """Writes moments to a file, whole or not at all.

    Args:
      path: of the file.
      moments: of every site.
      owner: identifier of the backbone and image size, see `owner_of`.
      tokens: fraction of each image's tokens used.
      sizes: whether the backbone was told the size of padded images.
    """
    arrays: dict[str, Any] = {"owner": np.array(owner), "tokens": np.array(tokens), "sizes": np.array(sizes)}
    for site_path, site_moments in moments.items():
        for field in dataclasses.fields(site_moments):
            arrays[f"{'/'.join(site_path)}:{field.name}"] = np.asarray(getattr(site_moments, field.name))
    with whole(path, "wb") as file:
        np.savez(file, **arrays)


def load_moments(path: str, sites: Sequence[Site], owner: str, tokens: float = 1.0) -> dict[Path, Moments]:
    """Reads the moments of sites from a file; arguments as for `save_moments`.

    Raises:
      CheckpointError: if the file is absent or damaged, belongs to another backbone, image size or
        fraction of tokens, or lacks a site or has it with another width.
    """
    try:
        with (
            open(path, "rb") as file,
            np.load(file) as archive,
        ):  # NumPy does not close a damaged file that it opened itself
            arrays = dict(archive)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no {path}, which holds the moments of the features; run train.py with the same --workdir to take them."
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it and run again to take the moments anew."
        ) from error
    if str(arrays.get("owner")) != owner:
        raise CheckpointError(
            f"{path} holds the moments of another backbone or image size; delete it and run again to take them anew."
        )
    taken = float(arrays.get("tokens", 1.0))
    if taken != tokens:
        raise CheckpointError(
            f"{path} holds the moments of a share of {taken:g} of the feature vectors, and denoise.moment_tokens is {tokens:g}"
            "; delete it and run again to take them anew."
        )
    moments = {}
    for site in sites:
        arrays_of_site: dict[str, Any] = {
            name: arrays.get(f"{site.name}:{name}") for name in ("count", "mean", "covariance")
        }
        shapes = {name: None if value is None else value.shape for name, value in arrays_of_site.items()}
        if shapes["mean"] != site.denoiser_shape[:-1] or shapes["covariance"] != site.denoiser_shape:
            raise CheckpointError(
                f"{path}: moments of {site.name} have shape {shapes['covariance']}, expected {site.denoiser_shape}; they "
                "belong to other sites or another image size. Delete the file and run again."
            )
        moments[site.path] = Moments(
            int(arrays[f"{site.name}:count"]), arrays_of_site["mean"], arrays_of_site["covariance"]
        )
    return moments


def of_sizes(path: str) -> bool:
    """Returns whether saved moments leave out padding: false for those of earlier releases, which count it."""
    with np.load(path) as archive:
        return "sizes" in archive and bool(archive["sizes"])


def run_moments(run: Run, variables: Tree) -> dict[Path, Moments]:
    """Returns the moments of a run's sites over training images, from its directory if saved."""
    return moments_of(run, variables, os.path.join(run.directory, MOMENTS))


def kept_moments(run: Run, variables: Tree) -> dict[Path, Moments] | None:
    """Returns the moments saved in a run's directory, or None if there are none.

    Raises:
      CheckpointError: if they belong to another backbone, image size, fraction of tokens or set of
        sites.
    """
    path, tokens = os.path.join(run.directory, MOMENTS), run.config["denoise"]["moment_tokens"]
    owner = owner_of(run.setup, variables)

    def load() -> dict[Path, Moments] | None:
        return load_moments(path, run.setup.sites, owner, tokens) if os.path.exists(path) else None

    return processes.from_primary(load)


def moment_images(run: Run) -> int:
    """Returns the number of images that the moments are computed from."""
    count = len(run.setup.train)
    return min(run.config["denoise"]["moment_images"] or count, count)


def noisy_moments(run: Run, variables: Tree, source: Source) -> dict[Path, Moments]:
    """Returns the moments of a run's sites over noisy images, from its directory if saved.

    Args:
      run: of which `denoise.moment_images` bounds the number of images.
      variables: of the backbone.
      source: of the noisy images.
    """
    return moments_of(run, variables, os.path.join(run.directory, NOISY_MOMENTS), source=source)


def moments_of(
    run: Run,
    variables: Tree,
    path: str,
    sites: Sequence[Site] | None = None,
    backbone: nn.Module | None = None,
    source: Source | None = None,
) -> dict[Path, Moments]:
    """Returns the moments of a backbone's features over the training images, or other ones.

    Args:
      run: the run with the images.
      variables: of the backbone.
      path: of the file that they are read from, or written to if it is absent.
      sites: the sites; None for the run's own.
      backbone: the module; None for the run's own.
      source: of the images; None for the training images.
    """
    config, setup = run.config, run.setup
    sites = setup.sites if sites is None else tuple(sites)
    tokens = config["denoise"]["moment_tokens"]
    images = setup.train if source is None else source
    owner = owner_of(setup, variables) + ("" if source is None else f" {source.name}")
    padded = setup.sizes and pads(fit_of(images))

    def load() -> dict[Path, Moments] | None:
        if not os.path.exists(path):
            return None
        saved = load_moments(path, sites, owner, tokens)
        if padded and not of_sizes(path):
            print(f"{path} counts padded pixels; the moments are taken anew, without them.", flush=True)
            return None
        return saved

    saved = processes.from_primary(load)
    if saved is not None:
        return saved
    batch = config["denoise"]["batch_size"]
    count = -(-(min(config["denoise"]["moment_images"] or len(images), len(images))) // batch)
    module = setup.backbone if backbone is None else backbone
    one = setup.inputs(read(images, np.arange(1)))
    fitting = fitting_batch(batch, devices.device_count(), forward_bytes(module, variables, one))
    batch, count = fitting, count * batch // fitting
    first = read(images, np.arange(min(SHIFT_IMAGES, len(images))), sizes=setup.sizes)
    shift: dict[str, Any] = {"shift_images": setup.inputs(first), "shift_arguments": setup.arguments(first)}
    limit = config["denoise"]["moment_gib"] * 2**30
    groups = passes(sites, limit) if limit else [sites]
    moments: dict[Path, Moments] = {}
    for number, group in enumerate(groups):
        every = evaluation_batches(images, batch, shard=devices.host(), sizes=setup.sizes)
        name = "moments" if source is None else "moments of noisy images"
        name += "" if len(groups) == 1 else f", pass {number + 1} of {len(groups)}"
        steps = bar(itertools.islice(every, count), name, count, "batch", shown=config["progress"])
        batches = ((setup.inputs(b), b["mask"].astype(np.float32), setup.arguments(b)) for b in steps)
        slot = sum(site.stack or 1 for earlier in groups[:number] for site in earlier)
        sampling = {"tokens": tokens, "seed": config["seed"], "first_slot": slot}
        moments |= collect_moments(module, variables, group, batches, **shift, **sampling)
    if processes.primary():
        save_moments(path, moments, owner, tokens, sizes=padded)
    return moments


def owner_of(setup: Setup, variables: Tree) -> str:
    """Returns the identifier of moments: digest of the variables, and the image size.

    The digest alone is not enough, since a convolutional backbone takes images of any size.
    """
    height, width = setup.images.shape[1:3]
    return f"{weights.digest(variables)} {height}x{width}"
