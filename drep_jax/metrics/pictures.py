"""Small pictures that a report carries inside of it."""

import base64
import io

import numpy as np
from PIL import Image

SIDE = 128
"""Pixels of the longer side, at most."""

QUALITY = 85
"""Of JPEG."""


def small(image: np.ndarray) -> str:
    """Returns an image, uint8 (height, width, 3), as JPEG in base64, at most 128 pixels a side."""
    drawn = Image.fromarray(np.asarray(image, np.uint8)).convert("RGB")
    drawn.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
