"""The networks that find objects: their published numbers of parameters, tiny ones, and targets."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.models import MODELS, create_model
from drep_jax.models.detectors.base import Targets

# name: (options, trainable parameters with 80 classes, parts of them, running statistics), of mmdetection 3.3.0 and, for
# implementation="facebookresearch", of facebookresearch/detr, whose frozen batch norms count as 53,120 buffers there.
R50 = {"backbone": 23_508_032}
NETWORKS = {
    "detr_r50": [
        ({}, 41_575_061, {**R50, "input_proj": 524_544, "query_embedding": 25_600}, 53_120),
        ({"implementation": "facebookresearch"}, 41_524_768 + 53_120, R50, 53_120),
    ],
    "yolov3_d53": [({}, 61_949_149, {}, None)],
    "atss_r50": [({}, 32_295_322, {**R50, "neck": 3_868_672, "head": 4_918_618}, 53_120)],
    "centernet_r50": [({}, 32_293_017, {**R50, "neck": 3_868_672, "head": 4_916_313}, 53_120)],
}
PYRAMID = {"stage_sizes": (1, 1, 1, 1), "trunk_width": 2, "width": 8, "groups": 2, "depth": 2}
TINY = {
    "detr_r50": {
        "stage_sizes": (1, 1, 1, 1),
        "trunk_width": 2,
        "width": 8,
        "num_heads": 2,
        "mlp_dim": 12,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "num_queries": 6,
    },
    "yolov3_d53": {"stage_sizes": (1, 1, 1, 1, 1), "width": 2},
    "atss_r50": PYRAMID,
    "centernet_r50": PYRAMID,
}


def class_of(name):
    """Returns the class of modules that an entry of the registry makes."""
    entry = MODELS[name]
    while isinstance(entry, functools.partial):
        entry = entry.func
    return entry if isinstance(entry, type) else typing.get_type_hints(entry)["return"]


def finds_objects(name):
    """Returns whether an entry of the registry makes networks that find objects."""
    return hasattr(class_of(name), "objects")


def tiny(name, num_classes=5, **options):
    """Returns the smallest network of a family."""
    return create_model(name, num_classes=num_classes, image_size=(64, 64), **{**TINY[name], **options})


@functools.cache
def abstract(module, size=(64, 64), batch=1):
    """Returns the shapes of a module's variables."""
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32))


def random_variables(module, gain=1.4, seed=0):
    """Returns kernels that keep the size of features, and other leaves near those of a trained network."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("var", "scale") or name.startswith("scale_"):
            return np.asarray(rng.uniform(0.8, 1.2, leaf.shape), np.float32)
        scale = gain / np.sqrt(max(1, np.prod(leaf.shape[:-1]))) if name == "kernel" else 0.1
        return np.asarray(scale * rng.normal(size=leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract(module))


def pictures(size, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, 3)).astype(np.float32)


def targets(seed=0, batch=2, most=4, size=(64, 96), classes=5, empty=True):
    """Returns objects; the last place is padding everywhere, and all are of the last image if that is to be empty."""
    rng = np.random.default_rng(seed)
    height, width = size
    low = rng.uniform(0, 0.6, (batch, most, 2)) * (width, height)
    high = low + rng.uniform(0.1, 0.4, (batch, most, 2)) * (width, height)
    labels = rng.integers(0, classes, (batch, most))
    labels[:, -1] = -1
    labels[-1] = -1 if empty else labels[-1]
    return Targets(
        boxes=jnp.asarray(np.concatenate([low, high], -1), jnp.float32),
        classes=jnp.asarray(labels, jnp.int32),
        crowd=jnp.zeros((batch, most), bool),
    )
