"""The moments of a run: taken once, kept in its directory, and tied to the backbone and image size that they describe."""

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
from drep_jax.data.collate import read
from drep_jax.data.loader import evaluation_batches
from drep_jax.errors import CheckpointError
from drep_jax.files import whole
from drep_jax.parallel import devices, processes
from drep_jax.progress import bar
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup
from drep_jax.typing import Path, Tree

MOMENTS = "moments.npz"
"""Name of the file in a run directory."""


def save_moments(path: str, moments: Mapping[Path, Moments], owner: str, tokens: float = 1.0) -> None:
    """Writes moments whole or not at all.

    Args:
      path: of the file.
      moments: of every site.
      owner: identifies the backbone and image size whose features they describe.
      tokens: share of each image's feature vectors that they were taken of.
    """
    arrays: dict[str, Any] = {"owner": np.array(owner), "tokens": np.array(tokens)}
    for where, known in moments.items():
        for field in dataclasses.fields(known):
            arrays[f"{'/'.join(where)}:{field.name}"] = np.asarray(getattr(known, field.name))
    with whole(path, "wb") as file:
        np.savez(file, **arrays)


def load_moments(path: str, sites: Sequence[Site], owner: str, tokens: float = 1.0) -> dict[Path, Moments]:
    """Reads the moments of the given sites.

    Raises:
      CheckpointError: if the file is absent or damaged, belongs to another backbone or image size or to another share of
        the feature vectors, or lacks a site or has it in another width.
    """
    try:
        with (
            open(path, "rb") as file,
            np.load(file) as held,
        ):  # NumPy does not close a damaged file that it opened itself
            arrays = dict(held)
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
        found: dict[str, Any] = {name: arrays.get(f"{site.name}:{name}") for name in ("count", "mean", "covariance")}
        shapes = {name: None if value is None else value.shape for name, value in found.items()}
        if shapes["mean"] != site.denoiser_shape[:-1] or shapes["covariance"] != site.denoiser_shape:
            raise CheckpointError(
                f"{path}: moments of {site.name} have shape {shapes['covariance']}, expected {site.denoiser_shape}; they "
                "belong to other sites or another image size. Delete the file and run again."
            )
        moments[site.path] = Moments(int(arrays[f"{site.name}:count"]), found["mean"], found["covariance"])
    return moments


def run_moments(run: Run, variables: Tree) -> dict[Path, Moments]:
    """Returns the moments of a run's sites over its training images, from its directory if they are there."""
    return moments_of(run, variables, os.path.join(run.directory, MOMENTS))


def kept_moments(run: Run, variables: Tree) -> dict[Path, Moments] | None:
    """Returns the moments that are in a run's directory; None where nothing has asked for them yet.

    Raises:
      CheckpointError: if they are of another backbone, image size, fraction of the tokens or choice of sites.
    """
    path, tokens = os.path.join(run.directory, MOMENTS), run.config["denoise"]["moment_tokens"]
    owner = owner_of(run.setup, variables)

    def load() -> dict[Path, Moments] | None:
        return load_moments(path, run.setup.sites, owner, tokens) if os.path.exists(path) else None

    return processes.from_primary(load)


def moment_images(run: Run) -> int:
    """Returns how many images moments are taken of."""
    count = len(run.setup.train)
    return min(run.config["denoise"]["moment_images"] or count, count)


def moments_of(
    run: Run, variables: Tree, path: str, sites: Sequence[Site] | None = None, backbone: nn.Module | None = None
) -> dict[Path, Moments]:
    """Returns the moments of a backbone's features over the training images, from a file if they are there.

    Args:
      run: whose images.
      variables: the backbone's.
      path: of the file, from which they are read, or to which they are written.
      sites: where; None for the run's own.
      backbone: the module; None for the run's own.
    """
    config, setup = run.config, run.setup
    sites = setup.sites if sites is None else tuple(sites)
    tokens = config["denoise"]["moment_tokens"]
    owner = owner_of(setup, variables)
    kept = processes.from_primary(lambda: load_moments(path, sites, owner, tokens) if os.path.exists(path) else None)
    if kept is not None:
        return kept
    batch = config["denoise"]["batch_size"]
    count = -(-moment_images(run) // batch)
    shift_images = setup.inputs(read(setup.train, np.arange(min(SHIFT_IMAGES, len(setup.train)))))
    limit = config["denoise"]["moment_gib"] * 2**30
    groups = passes(sites, limit) if limit else [sites]
    moments: dict[Path, Moments] = {}
    for number, group in enumerate(groups):
        first = itertools.islice(evaluation_batches(setup.train, batch, shard=devices.host()), count)
        name = "moments" if len(groups) == 1 else f"moments, pass {number + 1} of {len(groups)}"
        steps = bar(first, name, count, "batch", shown=config["progress"])
        batches = ((setup.inputs(b), b["mask"].astype(np.float32)) for b in steps)
        slot = sum(site.stack or 1 for earlier in groups[:number] for site in earlier)
        sampling = {"tokens": tokens, "seed": config["seed"], "first_slot": slot}
        module = setup.backbone if backbone is None else backbone
        moments |= collect_moments(module, variables, group, batches, shift_images=shift_images, **sampling)
    if processes.primary():
        save_moments(path, moments, owner, tokens)
    return moments


def owner_of(setup: Setup, variables: Tree) -> str:
    """Returns whose features moments describe: a convolutional backbone alone does not tell the image size."""
    height, width = setup.images.shape[1:3]
    return f"{weights.digest(variables)} {height}x{width}"
