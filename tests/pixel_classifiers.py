"""FCNs and SegFormers at full size, with the parameters that their public implementations have, and tiny ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.models import create_model

TINY_FCN = {"stage_sizes": (1, 1, 2, 1), "width": 4}
TINY_SEGFORMER = {
    "widths": (4, 6, 8, 12),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 3),
    "mlp_ratio": 2,
    "head_width": 8,
}
TINY = {"fcn": TINY_FCN, "segformer": TINY_SEGFORMER}

# name: (options, trainable parameters with 150 classes, running statistics). Counts of mmsegmentation 1.2.2, torchvision
# 0.29 and transformers 5.24; mmsegmentation's wide ones are the encoders of transformers and its head of 256 channels.
HEAD_256 = 256 * (64 + 128 + 320 + 512) + 4 * 512 + 1024 * 256 + 512 + 256 * 150 + 150
PIXEL_CLASSIFIERS = {
    "fcn": [],
    "fcn_r50": [({}, 49_598_604, 56_832), ({"auxiliary": False}, 47_200_246, 56_320)],
    "fcn_r101": [({}, 68_590_732, 109_056), ({"auxiliary": False}, 66_192_374, 108_544)],
    "fcn_resnet50": [({}, 35_421_548, None), ({"num_classes": 21}, 35_322_218, None)],
    "fcn_resnet101": [({}, 54_413_676, None), ({"num_classes": 21}, 54_314_346, None)],
    "segformer": [],
    "segformer_b0": [
        ({}, 3_753_718, 2_560),
        ({"implementation": "nvlabs"}, 3_752_694, 512),
        ({"implementation": "transformers"}, 3_752_694, 512),
    ],
    "segformer_b1": [({}, 13_716_822, 2_560), ({"implementation": "transformers"}, 13_715_798, 512)],
    "segformer_b2": [({}, 24_196_288 + HEAD_256, 2_560), ({"implementation": "transformers"}, 27_461_974, 1_536)],
    "segformer_b3": [({}, 44_072_128 + HEAD_256, 2_560), ({"implementation": "transformers"}, 47_337_814, 1_536)],
    "segformer_b4": [({}, 60_842_688 + HEAD_256, 2_560), ({"implementation": "transformers"}, 64_108_374, 1_536)],
    "segformer_b5": [({}, 81_443_008 + HEAD_256, 2_560), ({"implementation": "transformers"}, 84_708_694, 1_536)],
}


def tiny(name, num_classes=5, **options):
    """Returns the smallest network of a family."""
    return create_model(name, num_classes=num_classes, image_size=(32, 32), **{**TINY[name], **options})


@functools.cache
def abstract(module, size=(32, 32), batch=1):
    """Returns the shapes of a module's variables."""
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)


def pictures(size, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, 3)).astype(np.float32)
