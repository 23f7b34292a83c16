"""What the backbones of the registry have in common: numeric types, rematerialization, checks before tracing.

A backbone need not be one of these: any Linen module called as `module(x, train=False)` works.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from drep_jax.errors import ConfigError, did_you_mean


class Backbone(nn.Module, kw_only=True):
    """Base of the backbones: images in, logits or features out.

    Attributes:
      remat: recompute each block in the backward pass: less memory, more time.
      dtype: of the computation; None follows inputs and parameters.
      param_dtype: of the parameters.
    """

    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Refuses attributes that cannot work together, before anything is traced.

        Raises:
          ConfigError: naming the attribute, what was given and what was expected.
        """
        self.check()
        super().__post_init__()

    def check(self) -> None:
        """Raises ConfigError for attributes that cannot work together."""

    @property
    def dtypes(self) -> dict[str, Any]:
        """`dtype` and `param_dtype`, as layers take them."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def rematerialized(self, kind: type[nn.Module]) -> Callable[..., Any]:
        """Returns a class of blocks, recomputed in the backward pass if `remat` is set."""
        return nn.remat(kind) if self.remat else kind


class BatchNormBackbone(Backbone, kw_only=True):
    """Base of the backbones with batch norms.

    Attributes:
      axis_name: mapped axis over which batch norms share their statistics; None keeps them per
        device.
    """

    axis_name: str | None = None


def at_least_float32(x: Array) -> Array:
    """Widens bfloat16 and float16 to float32 and leaves float64 alone."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_batch(x: Float[Array, "..."], kind: str, channels: int | None = None) -> None:
    """Refuses what is no batch of images.

    Args:
      x: what the network was called with.
      kind: of the network, with its article.
      channels: how many; None for any number.

    Raises:
      ConfigError: naming the shape.
    """
    if x.ndim != 4 or (channels is not None and x.shape[-1] != channels):
        last = "channels" if channels is None else channels
        raise ConfigError(f"{kind} takes images of shape (batch, height, width, {last}), got {tuple(x.shape)}.")


def whole(values: Any, least: int) -> bool:
    """Returns whether these are whole numbers, all at least `least`.

    >>> whole((2, 3), 1), whole((0, 3), 1), whole((True,), 0)
    (True, False, False)
    """
    return isinstance(values, Sequence) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= least for value in values
    )


def check_classes(net: Any) -> None:
    """Raises ConfigError unless `num_classes` is a whole number, 0 or more."""
    if not whole((net.num_classes,), 0):
        raise ConfigError(f"num_classes must be 0 (no head: features) or more, got {net.num_classes!r}.")


def check_rate(net: Any, name: str) -> None:
    """Raises ConfigError unless an attribute is a rate of dropping, in [0, 1)."""
    rate = getattr(net, name)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ConfigError(f"{name} must be in [0, 1), got {rate!r}.")


def check_known(net: Any, **known: Collection[str]) -> None:
    """Raises ConfigError for an attribute whose value is none of those that are known; names the nearest."""
    for name, values in known.items():
        value = getattr(net, name)
        if value not in values:
            raise ConfigError(f'Unknown {name} "{value}".{did_you_mean(str(value), values)}')
