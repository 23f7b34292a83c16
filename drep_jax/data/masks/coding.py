"""`Coding`: which class each stored value of a mask stands for, and which values are ignored."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from drep_jax.data.geometry import IGNORED
from drep_jax.errors import ConfigError, DataError

MOST_CLASSES = IGNORED
"""Labels are uint8 and 255 is ignored, so that 0 … 254 remain."""

UNKNOWN = -1
SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Coding:
    """Stored value of a pixel ↦ its label, 0 … classes − 1, or 255 where it is ignored.

    >>> coding = Coding((1, 2), frozenset({0}))
    >>> coding.labels(np.array([[0, 1, 2]], np.uint8), "a mask")
    array([[255,   0,   1]], dtype=uint8)
    >>> coding.words
    'Stored values 1 … 2 become classes 0 … 1, and 0 is ignored (reduce_zero_label).'

    Attributes:
      values: stored value of each class, in the order of the labels.
      ignored: stored values that are ignored; None for all that are no class.
      colors: for masks in RGB, the color of each stored value from 0 on, (r, g, b); () where masks
        hold values.
      advice: what to do where a mask holds another value, for the message.

    Raises:
      ConfigError: for no class, more than 255, or a value that is there twice.
    """

    values: tuple[int, ...]
    ignored: frozenset[int] | None
    colors: tuple[tuple[int, int, int], ...] = ()
    advice: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.values) <= MOST_CLASSES:
            raise ConfigError(
                f"Masks are of 1 to {MOST_CLASSES} classes, since labels are 8 bits and 255 is ignored; got {len(self.values)}."
            )
        if len(set(self.values)) < len(self.values) or not all(0 <= value <= 255 for value in self.values):
            raise ConfigError(f"Stored values of classes are different numbers from 0 to 255; got {self.values}.")
        both = sorted(set(self.values) & (self.ignored or set()))
        if both:
            raise ConfigError(f"The stored value {both[0]} is a class and is ignored; choose one.")

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Stored value ↦ label, int16 (256,); -1 for a value that is neither a class nor ignored."""
        table = np.full(256, IGNORED if self.ignored is None else UNKNOWN, np.int16)
        table[list(self.ignored or ())] = IGNORED
        table[list(self.values)] = np.arange(len(self.values))
        return table

    def labels(self, stored: np.ndarray, where: str) -> np.ndarray:
        """Returns the labels of a mask, uint8 (H, W).

        Args:
          stored: uint8 (H, W).
          where: what to call the mask in messages.

        Raises:
          DataError: for a value that is neither a class nor ignored.
        """
        labels = self.table[stored]
        if labels.min(initial=0) < 0:
            counts = np.bincount(stored[labels < 0], minlength=256)
            strange = np.flatnonzero(counts).tolist()
            share = 100 * counts.sum() / stored.size
            raise DataError(
                f"{where} holds {_listed(strange)} ({share:.2g} % of its pixels), which is neither a class nor ignored. "
                f"{self.words} {self.advice_on(strange)}"
            )
        return labels.astype(np.uint8)

    def advice_on(self, strange: Sequence[int]) -> str:
        """Returns what may be wrong where masks hold these values, and the way out."""
        if self.advice:
            return self.advice
        count = len(self.values)
        if 0 in self.values and min(strange) == count == max(strange):
            return f"If 0 means no class, give the option reduce_zero=yes; if {count} does, ignore={count}."
        return (
            f"Give the values that mean no class as ignore={','.join(map(str, strange[:SHOWN]))}, or list all classes in "
            "classes.txt."
        )

    @property
    def words(self) -> str:
        """A sentence on it, for users."""
        first, last, count = self.values[0], self.values[-1], len(self.values)
        in_a_row = self.values == tuple(range(first, first + count))
        shown = f"{first} … {last}" if in_a_row and count > 1 else ", ".join(map(str, self.values[:SHOWN]))
        shown += ", …" if not in_a_row and count > SHOWN else ""
        kept = in_a_row and first == 0
        classes = "are the classes" if kept else f"become classes 0 … {count - 1}"
        if self.ignored is None:
            rest = "all others are ignored"
        elif not self.ignored:
            rest = "none is ignored"
        else:
            some = sorted(self.ignored)
            rest = f"{_listed(some)} {'is' if len(some) == 1 else 'are'} ignored"
        reduced = " (reduce_zero_label)" if in_a_row and first == 1 and 0 in (self.ignored or ()) else ""
        return f"Stored values {shown} {classes}, and {rest}{reduced}."


def in_a_row(classes: int, ignored: Sequence[int] = (IGNORED,), *, first: int = 0, advice: str = "") -> Coding:
    """Returns the coding of masks whose classes are stored as `first`, `first` + 1, …."""
    if not 1 <= classes <= MOST_CLASSES:
        raise ConfigError(f"Masks are of 1 to {MOST_CLASSES} classes; got {classes}.")
    values = tuple(range(first, first + classes))
    return Coding(values, frozenset(ignored) - set(values), advice=advice)


def from_table(stored_to_label: Mapping[int, int]) -> Coding:
    """Returns the coding of a table of stored value ↦ label; all other values are ignored."""
    return Coding(tuple(sorted(stored_to_label, key=stored_to_label.__getitem__)), None)


def _listed(values: Sequence[int]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(str, values[:SHOWN])) + more
