"""Pictures of colored rectangles of three sizes with their boxes, and the smallest network that finds any."""

import numpy as np
from PIL import Image

CLASSES = ("brick", "leaf")
COLORS = ((200, 60, 40), (60, 170, 70))

CFG = """
[net]
width=32
height=32
channels=3
[convolutional]
batch_normalize=1
filters=6
size=3
stride=4
pad=1
activation=leaky
[convolutional]
filters=8
size=3
stride=4
pad=1
activation=leaky
[convolutional]
filters=21
size=1
pad=1
activation=linear
[yolo]
mask=0,1,2
anchors=5,5, 11,11, 25,25
classes=2
"""


def write(folder, counts=(12, 6, 10), sizes=((128, 160), (160, 120))):
    """Writes a folder of train, validation and test pictures as YOLO has them, and returns its source.

    Every picture has a large object, and one of medium and of small size.
    """
    rng = np.random.default_rng(3)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            picture = rng.normal(110, 12, (height, width, 3))
            lines = []
            for side in (105, 50, 20):
                label = int(rng.integers(len(CLASSES)))
                tall, wide = (int(side * factor) for factor in rng.uniform(0.93, 1.07, 2))
                top, left = int(rng.integers(0, height - tall)), int(rng.integers(0, width - wide))
                picture[top : top + tall, left : left + wide] = COLORS[label]
                lines.append(
                    f"{label} {(left + wide / 2) / width:.6f} {(top + tall / 2) / height:.6f} {wide / width:.6f} "
                    f"{tall / height:.6f}"
                )
            name = f"{split}_{number:02d}"
            Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / "images" / split / f"{name}.png")
            (folder / "labels" / split / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return f"det_folder:{folder}"
