"""How a convolution reads its input."""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution reads its input; the attributes are those of `flax.linen.Conv`."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @property
    def single(self) -> bool:
        """Whether the window is one pixel."""
        return math.prod(self.kernel_size) == 1

    @property
    def fills_with_zeros(self) -> bool:
        """Whether a window can contain zeros that are no pixels: by padding or input dilation.

        A pointwise denoiser acts before they are filled in, so its constant would be missing there.
        """
        if any(d > 1 for d in self.input_dilation):
            return True
        if isinstance(self.padding, str):
            return self.padding in ("SAME", "SAME_LOWER", "CAUSAL") and not self.single
        return any(low > 0 or high > 0 for low, high in self.padding)


def _tuple(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def window_of(layer: nn.Conv) -> Window:
    """Returns how a bound convolution reads its input."""
    size = (layer.kernel_size,) if isinstance(layer.kernel_size, int) else tuple(layer.kernel_size)
    padding = nn.linear.canonicalize_padding(layer.padding, len(size))
    return Window(
        kernel_size=size,
        strides=_tuple(layer.strides, len(size)),
        padding=padding if isinstance(padding, str) else tuple((int(low), int(high)) for low, high in padding),
        input_dilation=_tuple(layer.input_dilation, len(size)),
        kernel_dilation=_tuple(layer.kernel_dilation, len(size)),
        groups=layer.feature_group_count,
    )
