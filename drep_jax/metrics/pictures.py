"""Thumbnails embedded in a report."""

import base64
import io

import numpy as np
from PIL import Image

SIDE = 128
"""Largest length of the longer side, in pixels."""

QUALITY = 85
"""JPEG quality."""


def small(image: np.ndarray, side: int = SIDE) -> str:
    """Returns an image as a base64 JPEG whose sides have at most 128 pixels, or `side`.

    Args:
      image: uint8 (height, width, 3).
      side: largest length of the longer side, in pixels.
    """
    thumbnail = Image.fromarray(np.asarray(image, np.uint8)).convert("RGB")
    thumbnail.thumbnail((side, side))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
