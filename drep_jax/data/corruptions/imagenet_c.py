"""The 15 corruptions with the constants of ImageNet-C, for photographs; COCO-C takes them, too (arXiv 1907.07484).

They are those of `drep_jax.data.corruptions.cifar10c` with other constants. Lengths are in pixels and
meant for images of 244 pixels a side and more; the elastic field's are fractions of the short side,
which agree with the published pixels for one of 244.
"""

from typing import Any

from drep_jax.data.corruptions import cifar10c
from drep_jax.data.corruptions.cifar10c import Table

PHOTOGRAPHS: Table = {
    "gaussian_noise": (cifar10c.gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": (cifar10c.shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": (cifar10c.impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": (cifar10c.defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (cifar10c.glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (cifar10c.motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (cifar10c.zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        cifar10c.snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (cifar10c.frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (cifar10c.fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (cifar10c.brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (cifar10c.contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": (
        cifar10c.elastic_transform,
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": (cifar10c.pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": (cifar10c.jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}
"""Name ↦ its function and its constants for the severities 1 to 5."""

TABLES: dict[str, Any] = {"cifar10c": cifar10c.PROTOCOL, "imagenet_c": PHOTOGRAPHS}
"""Protocol ↦ its table, by the word before the name in a spec: `imagenet_c:fog:3`."""
