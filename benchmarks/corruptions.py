"""Time of corrupting images on one core: every corruption, and the whole CIFAR-10-C protocol.

PYTHONPATH=. python benchmarks/corruptions.py [--count 1000] [--size 32]
"""

from benchmarks import single_thread  # noqa: F401  isort: skip

import time

import numpy as np
from scipy import ndimage
from tabulate import tabulate

from benchmarks.common import Parser
from drep_jax.data.corruptions import CIFAR10C, CORRUPTIONS, corrupt


def main(arguments=None):
    parser = Parser(__doc__, count=2)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32)
    flags = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.normal(size=(flags.count, flags.size, flags.size, 3)), (0, 2, 2, 0)) * 400
    images, index = np.clip(127 + blobs, 0, 255).astype(np.uint8), np.arange(flags.count)

    def seconds(spec):
        began = time.process_time()
        corrupt(images, index, spec, 0)
        return time.process_time() - began

    single = [*CORRUPTIONS, *(f"cifar10c:{name}:3" for name in CIFAR10C)]
    rows = [[spec, seconds(spec)] for spec in single]
    total = sum(seconds(f"cifar10c:{name}:{severity}") for name in CIFAR10C for severity in range(1, 6))
    print(f"{flags.count} images, {flags.size} x {flags.size}")
    print(tabulate([*rows, ["all 75 of cifar10c", total]], ["corruption", "s"], "github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
