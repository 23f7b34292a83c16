"""A tiny configuration of every task: with a line here a new task is held to what is asked of all of them."""

import functools

import jax
import numpy as np
from PIL import Image

from configs.default import get_default
from drep_jax.run.setup import build
from tests import boxes, label_maps
from tests.tiny_config import get_config

PEOPLE = 8
"""Identities in the folder that `people` writes."""


def people(folder):
    """Writes pictures of persons in two colors each, three in each of two cameras, of which one is darker."""
    rng = np.random.default_rng(0)
    for person in range(PEOPLE):
        top, bottom = rng.integers(40, 255, (2, 3))
        for camera in range(2):
            for number in range(3):
                picture = np.concatenate([np.full((8, 8, 3), top), np.full((8, 8, 3), bottom)])
                picture = np.clip(picture * (1 - 0.4 * camera) + rng.normal(0, 12, picture.shape), 0, 255)
                Image.fromarray(picture.astype(np.uint8)).save(folder / f"{person:04d}_c{camera + 1}_{number}.png")
    return folder


def classification(folder, **changes):
    """Digits, by one small block."""
    del folder
    config = get_config()
    config.model.depth = 1
    config.update_from_flattened_dict({"select.images": 48, "evaluate.batch_size": 48, **changes})
    return config.to_dict()


def retrieval(folder, **changes):
    """The persons of `people`, by one small block."""
    config = get_default()
    config.task, config.progress = "retrieval", False
    config.data.update(
        {"source": f"reid_folder:{people(folder)}?test=0.5&held_out=0.5", "image_size": (16, 8), "resize": "exact"}
    )
    config.model.update({"name": "transreid", "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24})
    config.evaluate.update({"conditions": ("clean", "gaussian:60"), "batch_size": 16, "resamples": 200})
    config.update_from_flattened_dict(changes)
    return config.to_dict()


def segmentation(folder, **changes):
    """Colored shapes of two sizes, by three convolutions."""
    config = get_default()
    config.task, config.progress = "segmentation", False
    config.data.update({"source": label_maps.write(folder, (8, 8, 12), ((24, 32), (20, 38))), "image_size": (24, 32)})
    config.model.name = f"{label_maps.__file__}:Tiny"
    config.evaluate.update({"conditions": ("clean", "gaussian:60"), "batch_size": 16, "resamples": 200})
    config.update_from_flattened_dict({"select.images": 8, **changes})
    return config.to_dict()


QUICK = {
    "backbone.batch_size": 8,
    "backbone.learning_rate": 1e-2,
    "control.steps": 2,
    "control.batch_size": 8,
    "denoise.train_steps": 2,
    "measured.vectors": 20,
    "distilled.steps": 2,
    "distilled.batch_size": 8,
    "select.strengths": (0.0, 1.0),
    "evaluate.batch_size": 8,
    "evaluate.certificate_images": 2,
}
"""What a whole job on `detection` needs to be done within a minute or two."""


def detection(folder, **changes):
    """Rectangles of three sizes, by three convolutions."""
    config = get_default()
    config.task, config.progress = "detection", False
    config.data.update({"source": boxes.write(folder), "image_size": (32, 32), "resize": "squash"})
    config.model.update({"name": "darknet", "cfg": boxes.CFG})
    config.detection.confidence = 0.1
    config.evaluate.update({"conditions": ("clean", "gaussian:60"), "batch_size": 16, "resamples": 200})
    config.update_from_flattened_dict({"select.images": 6, **changes})
    return config.to_dict()


CASES = {
    "classification": classification,
    "classification without a head": functools.partial(classification, **{"model.num_classes": -1}),
    "retrieval": retrieval,
    "segmentation": segmentation,
    "detection": detection,
}
"""Name of a task, with a word of what is special ↦ its configuration, given a folder to write images to."""


def setup_of(name, folder):
    """Returns configuration, setup and random variables, not blind, of a case."""
    config = CASES[name](folder)
    setup = build(config)
    fresh = jax.jit(setup.backbone.init)(jax.random.key(1), np.zeros(setup.images.shape, np.float32))
    rng = np.random.default_rng(1)
    spread = jax.tree_util.tree_map(lambda leaf: leaf + np.float32(0.3) * rng.normal(size=leaf.shape), dict(fresh))
    return config, setup, jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float32), spread)
