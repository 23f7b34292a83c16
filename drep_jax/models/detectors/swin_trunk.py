"""Swin Transformers as detectors use them: the maps of their stages, for images of any size."""

from collections.abc import Sequence

import flax.linen as nn

from drep_jax.models.swin import SwinV2
from drep_jax.models.swin_v1 import Swin
from drep_jax.models.transformer import pair
from drep_jax.models.windows import Maps, layer_norm


class SwinV2Trunk(SwinV2, kw_only=True):
    """The stages of a SwinV2, without norms behind them."""

    num_classes: int = 0
    image_size: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> list[Maps]:
        """Returns the maps of strides 4, 8, 16 and 32 (in the published networks); sides are rounded up."""
        return self.stages(x, train)


class SwinTrunk(Swin, kw_only=True):
    """The stages of a Swin, each behind a norm of its own, as in mmdetection.

    Windows are whole and shifted on small maps, too: these are padded.
    """

    num_classes: int = 0
    image_size: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> list[Maps]:
        """Returns the maps of strides 4, 8, 16 and 32 (in the published networks); sides are rounded up."""
        maps = self.stages(x, train)
        return [layer_norm(**self.dtypes, name=f"norm{stage}")(x) for stage, x in enumerate(maps)]

    def windows(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the window on a map of this size, and by how much every other block shifts it."""
        del size
        rows, columns = pair(self.window_size)
        return (rows, columns), (rows // 2, columns // 2)
