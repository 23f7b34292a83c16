"""Random weights that depend on a tensor's name only, so that two programs can make the same ones without a file."""

import zlib

import numpy as np


def named_weights(shapes, spread=0.3):
    """{name: float32 array} for {name: shape}; factors of norms around 1, all else around 0, nothing at either."""
    arrays = {}
    for name, shape in shapes.items():
        draw = np.random.default_rng(zlib.crc32(name.encode())).uniform(-spread, spread, shape)
        factor = "norm" in name and name.endswith("weight")
        arrays[name] = (draw + factor).astype(np.float32)
    return arrays
