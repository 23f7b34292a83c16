"""Mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) of neighbours in the stream of training images.

Image p is mixed with image p ^ 1: 2j with 2j + 1, each by a share of its own. Even batches and even parts of them hold such
pairs whole, so that hosts need nothing of each other.
"""

import numpy as np
from scipy import special

from drep_jax.data.augment.random_bits import MIX, uniform, words


def mix(
    images: np.ndarray, labels: np.ndarray, *, seed: int, first_position: int, mixup: float, cutmix: float
) -> dict[str, np.ndarray]:
    """Mixes every image with its neighbour; where both ways are on, each image takes one of them by the toss of a coin.

    Mixup gives λ·own + (1 − λ)·other; cutmix puts a box of the other, of 1 − λ of the area before it is cut off at the
    border, into the own one. λ is Beta(a, a) distributed.

    Args:
      images: uint8 (B, H, W, C), at consecutive positions, the first of them even and B even.
      labels: int32 (B,).
      seed: of the augmentation.
      first_position: the position of the first image.
      mixup, cutmix: the parameter a of either way; 0 turns it off.

    Returns:
      `{"image": uint8 (B, H, W, C), "label": int32 (B,), "label2": int32 (B,), "share": float32 (B,)}`: "label2" is the
      neighbour's, and "share" the weight of "label", 1 − share that of "label2".
    """
    count, height, width, _ = images.shape
    other = np.arange(count) ^ 1
    numbers = uniform(words(seed, MIX, first_position, count))
    by_box = np.full(count, cutmix > 0) if not (mixup and cutmix) else numbers[:, 1] < 0.5
    own = np.empty(count)
    for way, parameter in ((by_box, cutmix), (~by_box, mixup)):
        if parameter:
            own[way] = special.betaincinv(parameter, parameter, numbers[way, 0])
    out = np.empty_like(images)
    for place in range(count):
        mine, theirs, share = images[place], images[other[place]], own[place]
        if by_box[place]:
            top, bottom = _span(height, share, numbers[place, 2])
            left, right = _span(width, share, numbers[place, 3])
            out[place] = mine
            out[place, top:bottom, left:right] = theirs[top:bottom, left:right]
            own[place] = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            weight = np.float32(share)
            out[place] = np.rint(weight * mine + (1 - weight) * theirs)
    return {"image": out, "label": labels, "label2": labels[other], "share": own.astype(np.float32)}


def _span(side: int, share: float, place: float) -> tuple[int, int]:
    """Returns where a box of √(1 − share) of the side begins and ends, its middle anywhere in the image."""
    length, middle = int(side * np.sqrt(1 - share)), int(place * side)
    return max(0, middle - length // 2), min(side, middle + (length + 1) // 2)
