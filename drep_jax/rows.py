"""What a network says of the rows of its features: which of them count, and which follow the clean image.

For the author of a network. None of this adds an equation to the network; it matters only while
denoisers are learned or measured.

- `valid_rows` and `valid_pixels`: padding and empty proposals are no features of an image.
- `clean_stream`: where measured noise compares a clean with a corrupted image, both have to look
  at the same places.
"""

import contextlib
import dataclasses
import re
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from drep_jax.errors import SiteError
from drep_jax.typing import AnyArray

T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class Block:
    """One block of `valid_rows` or `valid_pixels`.

    Attributes:
      mask: of the rows; None where all count, or for pixels.
      only: regular expression of the names of the layers that it is for, or None for all.
      size: (batch, 2) heights and widths of the images without padding, or None for rows.
      shape: (height, width) of the padded images.
      asked, fitted: layers inside that have asked for it, and those whose inputs have such rows.
    """

    mask: Any
    only: str | None = None
    size: Any = None
    shape: tuple[int, int] = (0, 0)
    asked: list[str] = dataclasses.field(default_factory=list)
    fitted: list[str] = dataclasses.field(default_factory=list)

    @property
    def source(self) -> Any:
        """What it was made of; blocks of the same object say the same."""
        return self.mask if self.size is None else self.size

    def fits(self, positions: tuple[int, ...]) -> bool:
        """Returns whether feature vectors at these positions belong to its rows or pixels."""
        if self.size is not None:
            return len(positions) == 3 and positions[0] == self.size.shape[0]
        return positions[: self.mask.ndim] == self.mask.shape or positions[:1] == (self.mask.size,)

    def at(self, positions: tuple[int, ...]) -> Bool[Array, "*positions"]:
        """Returns which of the feature vectors count."""
        if self.size is not None:
            sides = (jnp.arange(n) * whole // n for n, whole in zip(positions[1:], self.shape, strict=True))
            rows, columns = (side[None] < self.size[:, axis, None] for axis, side in enumerate(sides))
            return rows[:, :, None] & columns[:, None, :]
        flat = positions[: self.mask.ndim] != self.mask.shape
        mask = jnp.asarray(self.mask, bool).reshape(-1) if flat else jnp.asarray(self.mask, bool)
        return jnp.broadcast_to(mask.reshape(*mask.shape, *(1,) * (len(positions) - mask.ndim)), positions)


class _State(threading.local):
    """Of one thread: the blocks around what runs, innermost last; the streams of measured noise."""

    def __init__(self) -> None:
        self.blocks: list[Block | None] = []
        self.streams = 1


_state = _State()


# ---------------------------------------------------------------------------------------------------------------------
# For the author of a network
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def valid_rows(mask: Bool[AnyArray, "*rows"] | None, only: str | None = None) -> Iterator[None]:
    """Says which rows of their inputs count, for the layers that are called inside the block.

    It is for every layer whose input begins with the axes of the mask, as they are or flattened to
    one: (batch, n) is for inputs (batch, n, …) and (batch·n, …). Other layers are not concerned. The
    innermost block that is for a layer counts.

    >>> with valid_rows(jnp.array([[True, False]])):
    ...     y = jnp.zeros((2, 5))  # layers are called here

    Args:
      mask: True for rows that are features, False for padding and empty proposals; None where all
        count, whatever the blocks around say.
      only: regular expression for the last part of the paths of the layers it is for, as in
        "key|value", where shapes alone do not tell.

    Raises:
      SiteError: while sites are sought, if it is for none of the layers inside.
    """
    with _inside(None if mask is None else Block(mask, only)):
        yield


@contextlib.contextmanager
def valid_pixels(size: Float[AnyArray, "batch 2"] | None, shape: tuple[int, int]) -> Iterator[None]:
    """Says which pixels of padded images count, for the layers on maps that are called inside the block.

    Cell (i, j) of a map with h × w cells counts if its first pixel, ⌊i·height/h⌋ and ⌊j·width/w⌋, lies in the
    image.

    Args:
      size: height and width of each image without its padding, in pixels; None where nothing is
        padded.
      shape: (height, width) of the padded images.
    """
    if size is None:
        yield
        return
    with _inside(Block(None, size=jnp.asarray(size), shape=shape)):
        yield


def clean_stream(values: T) -> T:
    """Returns the values unchanged; measured noise gives corrupted images those of their clean image.

    For values that say *where* to look, such as proposals: a row of features has to be the same
    place in the clean and in the corrupted image. Where they say it row by row already (pixels,
    tokens, queries), nothing is needed.

    >>> int(clean_stream(jnp.array([3]))[0])
    3

    Args:
      values: arrays, or a tree of them, whose first axis holds the images, or equally many rows of
        each.
    """
    streams = _state.streams
    if streams == 1:
        return values

    def of_clean(leaf: Shaped[AnyArray, "rows *shape"]) -> Any:
        if not leaf.shape or leaf.shape[0] % streams:
            raise SiteError(
                f"clean_stream got an array {tuple(leaf.shape)} whose first axis is not the images; give it arrays "
                "(images, …) or (images · rows, …)."
            )
        return jnp.tile(leaf[: leaf.shape[0] // streams], (streams, *(1,) * (leaf.ndim - 1)))

    return jax.tree_util.tree_map(of_clean, values)


@contextlib.contextmanager
def _inside(block: Block | None) -> Iterator[None]:
    _state.blocks.append(block)
    try:
        yield
        if block is not None and block.asked and not block.fitted:
            what = f"a mask {tuple(block.mask.shape)}" if block.size is None else f"sizes of {len(block.size)} images"
            raise SiteError(
                f"A network says which rows count by {what}, and none of the layers there reads such rows: "
                f"{', '.join(block.asked[:8])}. The input of a layer has to begin with the axes of the mask, or with their "
                "product; for pixels it is (batch, height, width, channels)."
            )
    finally:
        _state.blocks.pop()


# ---------------------------------------------------------------------------------------------------------------------
# For the core
# ---------------------------------------------------------------------------------------------------------------------


def block_of(name: str, positions: tuple[int, ...], *, seeking: bool = False) -> Block | None:
    """Returns the block that says which feature vectors of a layer count, or None if all do.

    Args:
      name: of the layer, the last part of its path.
      positions: shape of the array of its feature vectors, without their own axis.
      seeking: whether all layers ask, so that a block which is for none of them is an error.
    """
    for block in reversed(_state.blocks):
        if block is None:
            return None
        if block.only is not None and not re.fullmatch(block.only, name):
            continue
        if seeking:
            block.asked.append(name)
        if block.fits(positions):
            block.fitted.append(name)
            return block
    return None


def valid_vectors(name: str, positions: tuple[int, ...]) -> Bool[Array, "*positions"] | None:
    """Returns which feature vectors of a layer count, or None if all do; see `block_of`."""
    block = block_of(name, positions)
    return None if block is None else block.at(positions)


@contextlib.contextmanager
def streams_of(count: int) -> Iterator[None]:
    """Says that the rows of a batch are so many streams, the clean one first; see `clean_stream`."""
    before, _state.streams = _state.streams, count
    try:
        yield
    finally:
        _state.streams = before
