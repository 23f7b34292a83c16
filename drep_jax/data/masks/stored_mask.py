"""`StoredMask`: a mask as it lies in a file, decoded when its values are asked for."""

import os
from typing import Any

import numpy as np
from PIL import Image

from drep_jax.data.decode import opened, reading, stored_size
from drep_jax.data.masks.coding import Coding
from drep_jax.errors import DataError

SHOWN = 4
Stored = bytes | str | os.PathLike
"""The bytes of a file, or its path."""


class StoredMask:
    """A mask and the image that it belongs to; `np.asarray` makes it labels, uint8 (H, W).

    A stage that does not ask for labels therefore decodes none.

    Args:
      stored: the mask.
      where: what to call it in messages.
      coding: which label each of its values stands for.
      image: the image whose pixels it labels, and what to call that; None where its size is not to
        be compared.
    """

    def __init__(self, stored: Stored, where: str, coding: Coding, image: tuple[Stored, str] | None = None) -> None:
        self.where, self.coding = where, coding
        self._stored, self._image = stored, image

    def values(self) -> np.ndarray:
        """Returns the stored values, uint8 (H, W).

        Raises:
          UnreadableError: for a file that is absent, truncated or not an image.
          DataError: for a mask in RGB without a table of colors, of more than 8 bits, from a JPEG,
            or of another size than its image.
        """
        with reading(self.where, "mask"), Image.open(opened(self._stored)) as file:
            file.load()
            form, mode = file.format, file.mode
            if self.coding.colors and mode in ("P", "PA", "L", "LA", "1"):
                mode = "RGB"
                pixels = np.asarray(file.convert("RGB"))
            else:
                pixels = np.asarray(file)
        if form == "JPEG":
            raise DataError(
                f"The mask {self.where} is a JPEG, which changes values at the borders of classes. Save masks as PNG."
            )
        values = self._indices(pixels, mode)
        if self._image is not None:
            stored, name = self._image
            size = stored_size(stored, name)
            if size != values.shape:
                turned = " The image has an EXIF orientation, and masks belong to the upright image."
                raise DataError(
                    f"The mask {self.where} is {values.shape[0]} x {values.shape[1]} pixels (height x width), but its image "
                    f"{name} is {size[0]} x {size[1]}.{turned if size == values.shape[::-1] else ''} A mask has one value "
                    "for each pixel of its image: correct the pair, or resize the mask by nearest neighbor."
                )
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        labels = self.coding.labels(self.values(), f"The mask {self.where}")
        return labels if dtype is None else labels.astype(dtype)

    def _indices(self, pixels: np.ndarray, mode: str) -> np.ndarray:
        """Returns values from the pixels that Pillow gives: indices of a palette, gray levels, or colors by the table."""
        if mode in ("PA", "LA"):
            pixels, mode = pixels[..., 0], mode[0]
        if mode in ("P", "L", "1"):
            return pixels.astype(np.uint8)
        if mode == "I" or mode.startswith("I;16"):
            if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 255:
                raise DataError(
                    f"The mask {self.where} has 16 bits and values up to {pixels.max():,}. Classes are 8 bits, 0 to 254. "
                    "Numbers such as class · 1000 + instance or class · 256 + part are instances: give masks of classes."
                )
            return pixels.astype(np.uint8)
        if mode not in ("RGB", "RGBA"):
            raise DataError(
                f'The mask {self.where} has the color mode "{mode}". Save it with 8 bits, as gray or palette PNG.'
            )
        colors = pixels[..., :3]
        if self.coding.colors:
            return self._by_color(colors)
        if (colors == colors[..., :1]).all():
            return colors[..., 0]
        some = np.unique(colors.reshape(-1, 3), axis=0)
        raise DataError(
            f"The mask {self.where} is in RGB, {len(some):,} colors such as {_colors(some)}. Masks hold the number of the "
            "class of each pixel, as gray or palette PNG. If a color stands for a class, write classes.txt with lines of "
            '"R,G,B NAME" (seg_folder, docs/data.md); channels that hold class and instance are another data set.'
        )

    def _by_color(self, colors: np.ndarray) -> np.ndarray:
        """Returns values from colors (H, W, 3) by the table of the coding."""
        keys = colors.astype(np.int64) @ _PLACES
        table = np.array(self.coding.colors, np.int64) @ _PLACES
        order = np.argsort(table)
        at = np.minimum(np.searchsorted(table[order], keys), len(table) - 1)
        known = table[order][at] == keys
        if not known.all():
            some = np.unique(colors[~known], axis=0)
            raise DataError(
                f"The mask {self.where} has {len(some):,} colors that classes.txt lacks, such as {_colors(some)} "
                f"({100 * (~known).mean():.2g} % of its pixels). Add lines of them, also of those that are ignored."
            )
        return order[at].astype(np.uint8)


_PLACES = np.array([65536, 256, 1])


def _colors(colors: np.ndarray) -> str:
    return "; ".join(",".join(map(str, color)) for color in colors[:SHOWN].tolist())
