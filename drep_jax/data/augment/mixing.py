"""Mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) of neighbors in the training stream.

Image p is mixed with image p ^ 1, that is 2j with 2j + 1, each with its own weight. Batches, and
the hosts' parts of them, are even, so both images of a pair are on one host.
"""

import numpy as np
from scipy import special

from drep_jax.data.augment.random_bits import MIX, uniform, words


def mix(
    images: np.ndarray, labels: np.ndarray, *, seed: int, first_position: int, mixup: float, cutmix: float
) -> dict[str, np.ndarray]:
    """Mixes every image x with its neighbor y, by mixup or cutmix; if both are on, a coin decides.

    Mixup gives λ x + (1 − λ) y. Cutmix pastes a box of y into x, of the fraction 1 − λ of the area
    before it is clipped at the border. λ is Beta(a, a) distributed.

    Args:
      images: uint8 (B, H, W, C), at consecutive positions, the first of them even and B even.
      labels: int32 (B,).
      seed: of the augmentation.
      first_position: the position of the first image.
      mixup, cutmix: parameter a of each; 0 turns it off.

    Returns:
      `{"image": uint8 (B, H, W, C), "label": int32 (B,), "label2": int32 (B,), "share": float32
      (B,)}`: "label2" is the neighbor's; "share" is the weight of "label", and 1 − share that of
      "label2".
    """
    count, height, width, _ = images.shape
    neighbor = np.arange(count) ^ 1
    numbers = uniform(words(seed, MIX, first_position, count))
    by_box = np.full(count, cutmix > 0) if not (mixup and cutmix) else numbers[:, 1] < 0.5
    weights = np.empty(count)
    for chosen, parameter in ((by_box, cutmix), (~by_box, mixup)):
        if parameter:
            weights[chosen] = special.betaincinv(parameter, parameter, numbers[chosen, 0])
    out = np.empty_like(images)
    for place in range(count):
        x, y = images[place], images[neighbor[place]]
        if by_box[place]:
            top, bottom = _span(height, weights[place], numbers[place, 2])
            left, right = _span(width, weights[place], numbers[place, 3])
            out[place] = x
            out[place, top:bottom, left:right] = y[top:bottom, left:right]
            weights[place] = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            weight = np.float32(weights[place])
            out[place] = np.rint(weight * x + (1 - weight) * y)
    return {"image": out, "label": labels, "label2": labels[neighbor], "share": weights.astype(np.float32)}


def _span(side: int, weight: float, place: float) -> tuple[int, int]:
    """Returns the ends of a box of √(1 − weight) of the side, centered anywhere in the image."""
    length, center = int(side * np.sqrt(1 - weight)), int(place * side)
    return max(0, center - length // 2), min(side, center + (length + 1) // 2)
