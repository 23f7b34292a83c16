"""What a network that finds objects offers beside its forward pass."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from flax import struct
from jaxtyping import Array, Bool, Float, Int

from drep_jax.models.detectors.proposals import Objects


@struct.dataclass
class Targets:
    """The labeled objects of a batch of images.

    Attributes:
      boxes: (batch, m, 4) x0, y0, x1, y1 in pixels of the network's input.
      classes: (batch, m) from 0; −1 where there is no object.
      crowd: (batch, m) regions of many objects, which no network learns to find.
      masks: (batch, m, height, width) of the objects, in pixels of the network's input, if they are known.
    """

    boxes: Float[Array, "batch m 4"]
    classes: Int[Array, "batch m"]
    crowd: Bool[Array, "batch m"]
    masks: Bool[Array, "batch m height width"] | None = None


@runtime_checkable
class Detector(Protocol):
    """A Linen module whose outputs become objects and losses.

    Its call is `module(x, train=False, size=None, targets=None)`: `x` are images (batch, height,
    width, channels); `size` (batch, 2) are the height and width of each without its padding, None
    where nothing is padded; `targets` are given in training to networks of two stages, which learn
    from proposals that are sampled by them: a call with them gives outputs for `losses`, with
    `train=False`, too. Both methods are pure functions of the outputs and need no parameters. Each
    array of the outputs has one row for each image.

    A network may also have `distance(outputs, clean_outputs)`, the distance of what its heads give from
    what they give for the clean images, at least 0; without it, that is the relative square of all
    outputs. Of a network of two stages it must compare what has the same place in both.

    Its class names what is denoised by default, `site_pattern = ".*"`, and its code says which rows are
    padding or empty proposals (`drep_jax.rows`).
    """

    num_classes: int
    """Number of classes; outputs that stand for the background are not counted."""

    def objects(self, outputs: Any, shape: tuple[int, int], size: Float[Array, "batch 2"] | None = None) -> Objects:
        """Returns what is found in each image, boxes in pixels of the network's input.

        Args:
          outputs: of a call with `train=False`.
          shape: (height, width) of the network's input.
          size: of the images without padding, to which boxes are clipped; None for `shape`.
        """
        ...

    def losses(
        self, outputs: Any, targets: Targets, shape: tuple[int, int], size: Float[Array, "batch 2"] | None = None
    ) -> Mapping[str, Float[Array, ""]]:
        """Returns the parts of the loss by name, whose sum is trained; means over the batch as published.

        Args:
          outputs: of a call with `train=True`.
          targets: the labeled objects.
          shape, size: as for `objects`.
        """
        ...
