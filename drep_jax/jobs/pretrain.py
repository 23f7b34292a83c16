"""The pre-training of a run: train the autoencoder, merge and certify its encoder, probe it, say so in the report."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.data.collate import read
from drep_jax.data.source import Source, Subset
from drep_jax.errors import FusionError
from drep_jax.evaluation.arms import Network
from drep_jax.evaluation.probes import NEIGHBOR, RIDGE, compare_arms, features_of, probe_arms
from drep_jax.files import write_json
from drep_jax.jobs.scores import reading
from drep_jax.metrics.pictures import small
from drep_jax.models.autoencoder import images_of, patches_of
from drep_jax.models.patch_pca import PatchPCA
from drep_jax.parallel import processes
from drep_jax.pretraining.merge import merge, neutral, shifted
from drep_jax.pretraining.probe import Probe, ridge_probe
from drep_jax.progress import pulsing
from drep_jax.run.inputs import certificate_images
from drep_jax.run.pretraining import (
    STAGE,
    Pretraining,
    fresh_autoencoder,
    pca_of,
    pretraining_of,
    save_encoder,
    saved_encoder,
    train_autoencoder,
    use_saved_pca,
    with_encoder,
)
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup
from drep_jax.training.logging import lines_of
from drep_jax.typing import Tree

SECTION = "pretraining.json"
"""The report's section on the pre-training, in the directory of the run."""
ENCODER, RANDOM, LATENTS, PIXELS = "encoder", "random encoder", "PCA latents", "pixels"
"""The arms that are probed: the encoder, the same one before training, and what a linear layer reads without it."""
WIDEST = 4096
"""Numbers in a feature that is probed in closed form, at most."""
LOGGED = 2000
"""Training images of the probe in the log, and test images, at most."""
SHOWN = 5
"""Images whose reconstructions are in the report."""
LEVELS = (0.1, 0.4, 1.0)
"""Their noise, as fractions of the schedule's last step."""
FILTERS = 64
"""PCA directions in the report, at most."""


def pretrained_backbone(run: Run) -> Tree:
    """Returns the backbone that the pre-training makes, with the probe as its head; read if it is there.

    Raises:
      DrepError: its subclasses name the setting or file that cannot be used.
    """
    path = os.path.join(run.directory, SECTION)
    pca = pca_of(run)
    use_saved_pca(run.directory)
    saved = saved_encoder(run)
    if saved is not None and processes.from_primary(lambda: os.path.exists(path)):
        return saved
    pretraining = pretraining_of(run, pca)
    evaluate = _log_probe(run, pretraining) if run.config[STAGE]["probe_every"] and can_probe(run.setup) else None
    params, seconds = train_autoencoder(run, pretraining, evaluate)
    encoder = pretraining.merged(params)
    section: dict[str, Any] = {"seconds": seconds, **_described(run, pretraining)}
    if processes.primary():
        images = certificate_images(run.config, run.setup, run.directory)
        with pulsing("merge and certificate", 1, "step", shown=run.config["progress"]):
            certificate = pretraining.certificate(params, images)
        print(certificate, flush=True)
        if not certificate.passed:
            raise FusionError(
                "The plain ViT is not the encoder that was trained: the merge of the time step failed its certificate above. "
                "Nothing was written; the autoencoder is in checkpoints/pretrain."
            )
        section |= {"certificate": certificate.to_json(), "pictures": pictures(run, pretraining, params)}
    head = None
    if can_probe(run.setup) and run.setup.test is not None:
        probe, mean, section["probe"] = probed(run, pretraining, params, run.setup.test)
        head = probe.head(mean)
        encoder = {"params": shifted(encoder["params"], pretraining.vit, mean)}
    variables = with_encoder(run, encoder, head)
    save_encoder(run, variables)
    if processes.primary():
        write_json(path, section)
    processes.barrier("pre-trained")
    return variables


def pretraining_section(run: Run) -> dict[str, Any] | None:
    """Returns the report's section on the pre-training, or None without one."""
    path = os.path.join(run.directory, SECTION)
    if not run.config[STAGE]["steps"] or not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def can_probe(setup: Setup) -> bool:
    """Returns whether a linear layer on the features can be learned and scored: labels, a head and test images."""
    labeled = setup.train.num_classes is not None and setup.test is not None
    return labeled and "head" in setup.abstract["params"]


def _described(run: Run, pretraining: Pretraining) -> dict[str, Any]:
    """Returns what was pre-trained, and the curves of the log."""
    options, pca, objective = run.config[STAGE], pretraining.pca, pretraining.objective
    basis = pca_of(run)
    lines = lines_of(run.directory, STAGE) if processes.primary() else []
    count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(pretraining.abstract))
    return {
        "steps": options["steps"],
        "batch_size": options["batch_size"],
        "images": len(run.setup.train),
        "t": pretraining.t,
        "sigma": float(objective.levels()[1][pretraining.t]),
        "parameters": count,
        "loss": [[line["step"], line["loss"]] for line in lines if "loss" in line],
        "curve": [[line["step"], line["probe"]] for line in lines if "probe" in line],
        "pca": {
            "components": basis.components,
            "numbers": basis.numbers,
            "patch": [*basis.patch],
            "kept": basis.kept,
            "patches": basis.count,
            "scale": options["scale"],
            "centered": options["center"],
            "noise": options["noise"],
            "used": pca.components,
        },
    }


def _some(source: Source, count: int) -> Source:
    """Returns images evenly spaced over a source; all of them for 0 or as many."""
    if not count or count >= len(source):
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).astype(int))  # type: ignore[arg-type]


def _log_probe(run: Run, pretraining: Pretraining) -> Callable[[Tree], dict[str, float]]:
    """Returns parameters ↦ {"probe": accuracy of a ridge probe on some test images}."""
    setup, classes = run.setup, int(run.setup.train.num_classes or 0)
    train, test = (_some(source, LOGGED) for source in (setup.train, setup.test) if source is not None)
    options = {**reading(run.config), "progress": False}

    def evaluate(params: Tree) -> dict[str, float]:
        arms = {ENCODER: pretraining.merged(params)}
        (features, labels), (others, truth) = (features_of(setup, arms, each, **options) for each in (train, test))
        probe = ridge_probe(features[ENCODER], labels, classes)
        return {"probe": 100.0 * float(probe.hits(others[ENCODER], truth).mean())}

    return evaluate


def control_networks(pretraining: Pretraining, basis: PatchPCA) -> dict[str, Network]:
    """Returns the arms without a network: name ↦ (nothing, images) ↦ features; those that are too wide are left out."""
    count = int(np.prod(pretraining.vit.grid))

    def latents(_: Tree, images: Any) -> Any:
        return basis.encode(patches_of(images, basis.patch)).reshape(len(images), -1)

    def pixels(_: Tree, images: Any) -> Any:
        return images.reshape(len(images), -1)

    widths: dict[str, tuple[int, Network]] = {
        LATENTS: (count * basis.components, latents),
        PIXELS: (count * basis.numbers, pixels),
    }
    return {name: network for name, (width, network) in widths.items() if width <= WIDEST}


def random_encoder(run: Run, pretraining: Pretraining) -> Tree:
    """Returns the encoder before the first step as variables of the ViT, its gates open.

    With the zero gates that training starts from it would be the patch embedding alone.
    """
    fresh = jax.device_get(fresh_autoencoder(run, pretraining))
    given = neutral(fresh) if pretraining.net.time_width else None
    options: dict[str, Any] = {"project": pretraining.project, "given": given}
    return {
        "params": merge(fresh, pretraining.objective, pretraining.vit, pretraining.abstract, pretraining.t, **options)
    }


def probed(run: Run, pretraining: Pretraining, params: Tree, test: Source) -> tuple[Probe, np.ndarray, dict[str, Any]]:
    """Returns the probe of the encoder, the mean of its features, and the comparison of all arms under all conditions.

    Every probe is learned on clean training images and kept for all conditions.
    """
    config, setup = run.config, run.setup
    classes = int(setup.train.num_classes or 0)
    networks = control_networks(pretraining, pca_of(run))
    arms = {
        ENCODER: pretraining.merged(params),
        RANDOM: random_encoder(run, pretraining),
        **{name: {"params": {}} for name in networks},
    }
    times = [t for t in config[STAGE]["sweep"] if t != pretraining.t]
    sweep = {f"t = {t}": pretraining.merged(params, t) for t in times}
    train = _some(setup.train, config[STAGE]["probe_images"])
    options = reading(config)
    features, labels = features_of(setup, {**arms, **sweep}, train, networks=networks, **options)
    readers = probe_arms(features, labels, classes, readers=(RIDGE, NEIGHBOR))
    conditions: Sequence[str] = config["evaluate"]["conditions"]
    bootstrap = {"resamples": config["evaluate"]["resamples"], "seed": config["seed"]}
    compared = {}
    for condition in conditions:
        rows, truth = features_of(setup, {**arms, **sweep}, test, condition, networks, **options)
        hits = {
            arm: {reader: read_hits(rows[arm], truth) for reader, read_hits in each.items()}
            for arm, each in readers.items()
        }
        compared[condition] = compare_arms(hits, ENCODER, **bootstrap)
    section = {"images": len(labels), "conditions": compared, "sweep": [pretraining.t, *times]}
    probe = ridge_probe(features[ENCODER], labels, classes)
    return probe, features[ENCODER].mean(axis=0, dtype=np.float64), {**section, "strength": probe.strength}


def pictures(run: Run, pretraining: Pretraining, params: Tree) -> dict[str, Any]:
    """Returns the report's images: clean, noisy and predicted at several levels, and the PCA's directions."""
    setup, objective = run.setup, pretraining.objective
    source = setup.test if setup.test is not None else setup.train
    images = setup.inputs(read(source, np.arange(min(SHOWN, len(source)))))
    vit, patch = pretraining.vit, pretraining.pca.patch
    patches = patches_of(images, patch)
    mean, std = (np.asarray(each, np.float32) for each in (setup.mean, setup.std))

    def seen(each: Any) -> list[str]:
        gray = np.asarray(images_of(each, vit.grid, patch)) * std + mean
        return [small(image) for image in np.rint(255 * np.clip(gray, 0, 1)).astype(np.uint8)]

    rows = []
    for fraction in LEVELS if objective.noise in ("latent", "pixels") else LEVELS[-1:]:
        step = round(fraction * (objective.timesteps - 1))
        t = jnp.full(len(images), step)
        noisy, _ = objective.corrupted(patches, t, jax.random.split(jax.random.key(run.config["seed"]), len(images)))
        predicted = pretraining.net.apply({"params": params}, noisy, t.astype(jnp.float32))
        given = objective.pca.decode(noisy) if objective.inputs == "latent" else noisy
        restored = objective.restored(predicted, noisy, t)
        rows.append(
            {"t": step, "sigma": float(objective.levels()[1][step]), "noisy": seen(given), "predicted": seen(restored)}
        )
    basis = pca_of(run)
    directions = basis.directions[:FILTERS].reshape(-1, *patch, basis.channels)
    largest = np.abs(directions).max(axis=(1, 2, 3), keepdims=True)
    shades = np.rint(127.5 * (1 + directions / largest)).astype(np.uint8)
    enlarged = np.kron(shades, np.ones((1, max(1, 32 // patch[0]), max(1, 32 // patch[1]), 1), np.uint8))
    return {"clean": seen(patches), "levels": rows, "filters": [small(each) for each in enlarged]}
