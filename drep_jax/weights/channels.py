"""A first convolution for images of another number of channels, from the weights of a file.

    sum       W'_c = Σ_k W_k / C      gray images, all channels equal, give what they gave in the file's network
    mean      W'_c = Σ_k W_k / K      every channel gets the mean filter
    repeat    W'_c = W_{c mod K} · K/C   the file's filters in turn

with K channels in the file and C in the model. A single channel from several is timm's "sum", more
channels from three timm's "repeat".
"""

from collections.abc import Callable, Mapping

import numpy as np

from drep_jax.errors import ConfigError, did_you_mean

WAYS: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "sum": lambda kernel, count: np.repeat(kernel.sum(-2, keepdims=True) / count, count, axis=-2),
    "mean": lambda kernel, count: np.repeat(kernel.mean(-2, keepdims=True), count, axis=-2),
    "repeat": lambda kernel, count: (
        np.take(kernel, np.arange(count) % kernel.shape[-2], axis=-2) * (kernel.shape[-2] / count)
    ),
}


def check_way(way: str) -> None:
    """Refuses an unknown way.

    Raises:
      ConfigError: naming those that there are.
    """
    if way not in WAYS:
        raise ConfigError(f'Unknown init_channels "{way}".{did_you_mean(way, WAYS)}')


def other_channels(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Returns whether a stored kernel (height, width, in, out) differs from the model's shape in its inputs only."""
    return (
        array.ndim == len(shape) == 4
        and array.shape[-2] != shape[-2]
        and (*array.shape[:-2], array.shape[-1]) == (*shape[:-2], shape[-1])
    )


def convert(kernel: np.ndarray, count: int, way: str) -> np.ndarray:
    """Returns a kernel (height, width, count, out) made of one with another number of input channels.

    Args:
      kernel: (height, width, in, out).
      count: input channels of the model.
      way: a key of `WAYS`.
    """
    return WAYS[way](kernel.astype(np.float64), count).astype(kernel.dtype)
