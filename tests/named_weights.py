"""Random weights that depend on a tensor's name only, so that two programs can make the same ones without a file."""

import math
import re
import zlib

import numpy as np

FACTOR = re.compile(r"norm.*weight$|(bn\d|layer\d\.\d+\.downsample\.1)\.weight$|running_var$")


def named_weights(shapes, spread=0.3):
    """{name: float32 array} for {name: shape}; factors of norms and variances around 1, all else around 0, nothing at either.

    With spread "fan_in" every layer keeps the variance of what it reads, so that deep networks neither grow nor die out.
    """
    arrays = {}
    for name, shape in shapes.items():
        bound = spread if spread != "fan_in" else math.sqrt(3 / math.prod(shape[1:])) if len(shape) in (2, 4) else 0.3
        draw = np.random.default_rng(zlib.crc32(name.encode())).uniform(-bound, bound, shape)
        factor = FACTOR.search(name) is not None
        arrays[name] = np.asarray(draw + factor, np.float32)  # a number by itself stays an array
    return arrays
