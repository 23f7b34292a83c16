"""Pictures of colored shapes with their masks, and a network of three convolutions that tells the classes apart."""

import flax.linen as nn
import numpy as np
from PIL import Image

CLASSES = ("ground", "disc", "bar", "corner")
COLORS = np.array([(90, 90, 90), (200, 60, 40), (40, 120, 210), (230, 200, 60)])
VOID = 255


class Tiny(nn.Module):
    """Logits at half the size of the image; in training also those of an auxiliary head."""

    num_classes: int = len(CLASSES)
    auxiliary: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        coarse = nn.relu(nn.Conv(12, (3, 3), (2, 2), padding=((1, 1), (1, 1)), name="stem")(x))
        x = nn.relu(nn.Conv(12, (3, 3), name="body")(coarse))
        logits = nn.Conv(self.num_classes, (1, 1), name="head")(x)
        auxiliary = nn.Conv(self.num_classes, (1, 1), name="auxiliary")
        if self.is_initializing() or (train and self.auxiliary):
            other = auxiliary(coarse)
            return (logits, other) if train else logits
        return logits


def scene(rng, size):
    """Returns an image, uint8 (h, w, 3), and its labels, uint8 (h, w)."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    labels = np.zeros(size, np.uint8)
    center = rng.uniform(0.25, 0.75, 2) * size
    radius = rng.uniform(0.15, 0.3) * min(size)
    labels[(rows - center[0]) ** 2 + (columns - center[1]) ** 2 < radius**2] = 1
    left = int(rng.integers(0, width - 6))
    labels[:, left : left + 5] = 2
    labels[: height // 3, : width // 4] = 3
    image = COLORS[labels] + rng.normal(0, 12, (*size, 3)) + rng.normal(0, 8, 3)
    edge = labels != np.roll(labels, 1, axis=1)
    labels[edge & (rng.random(size) < 0.5)] = VOID
    return np.clip(image, 0, 255).astype(np.uint8), labels


def write(folder, counts=(24, 8, 12), sizes=((24, 32),), seed=0):
    """Writes images and masks of the three splits for `seg_folder`; test images take turns with the sizes."""
    rng = np.random.default_rng(seed)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            size = sizes[number % len(sizes)] if split == "test" else sizes[0]
            for kind, array in zip(("images", "masks"), scene(rng, size), strict=True):
                Image.fromarray(array).save(folder / kind / split / f"{number:03d}.png")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return f"seg_folder:{folder}"
