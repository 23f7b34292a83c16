"""What R-CNNs return, and what differs between the public networks of one architecture."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float

from drep_jax.models.detectors.proposals import Objects
from drep_jax.models.detectors.roi_align import ADAPTIVE
from drep_jax.models.detectors.sampling import Samples


@dataclasses.dataclass(frozen=True)
class Convention:
    """What differs between the public networks of one architecture.

    Attributes:
      anchors: entry of `ANCHORS`.
      background: index of the background among the logits.
      level_kind, samples, aligned: of RoIAlign.
      clamp_below: of the coder.
      least_proposal, least_object: least side in pixels; 0 asks for sides above 0, None for nothing.
      train_per_level, train_keep: proposals in training.
      low_quality: matches of the first stage that a box gets for an object's own best overlap.
      least_low_quality: their least overlap.
      beta: below which the loss of a delta is quadratic; 0: absolute differences.
      hard_masks: whether masks to learn are rounded to 0 and 1.
    """

    anchors: str
    background: int
    level_kind: str
    samples: int
    aligned: bool
    clamp_below: bool
    least_proposal: float
    least_object: float | None
    train_per_level: int
    train_keep: int
    low_quality: Any
    least_low_quality: float
    beta: float
    hard_masks: bool


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "mmdet": Convention(
            "faster", -1, "mmdet", ADAPTIVE, True, True, 0.0, None, 2000, 1000, "mmdet", 0.3, 0.0, True
        ),
        "torchvision": Convention(
            "torchvision", 0, "torchvision", 2, False, False, 1e-3, 1e-2, 2000, 2000, "torchvision", 0.0, 1 / 9, False
        ),
    }
)


@struct.dataclass
class Outputs:
    """What an R-CNN returns; every array begins with the images of the batch.

    Attributes:
      objectness, anchor_deltas: of all anchors, see `RPNHead`.
      boxes: proposals that the second stage read; in training those that were sampled.
      valid: which of them there are.
      logits: of the classes of each, the background counted.
      deltas: of each and each class.
      anchor_objects: the object that each anchor learns from, with `BACKGROUND` and `IGNORED`; None
        without targets.
      samples: which boxes were sampled; None without targets.
      found: the objects, of networks with masks; None with targets.
      mask_logits: of the class of each object, or of each positive sample.
    """

    objectness: Float[Array, "batch anchors"]
    anchor_deltas: Float[Array, "batch anchors 4"]
    boxes: Float[Array, "batch n 4"]
    valid: Bool[Array, "batch n"]
    logits: Float[Array, "batch n logits"]
    deltas: Float[Array, "batch n boxes 4"]
    anchor_objects: Any = None
    samples: Samples | None = None
    found: Objects | None = None
    mask_logits: Any = None
