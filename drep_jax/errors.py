"""Errors that a user can act on: each says what was given, what was expected, where, and what to do.

`train.py` and `fuse.py` print a `DrepError` as one message without a traceback; anything else is a bug of ours.
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class DrepError(Exception):
    """Base class of every error that bad input can cause."""


class ConfigError(DrepError, ValueError):
    """A configuration value or name that cannot be used."""


class SiteError(DrepError, ValueError):
    """A layer that cannot be a denoising site, or a pattern that selects none."""


class FusionError(DrepError, ValueError):
    """Denoisers and backbone that do not fit together, or that must not be fused."""


class DataError(DrepError, ValueError):
    """Images or labels that are absent, unreadable or of the wrong form."""


class UnreadableError(DataError):
    """One image that cannot be read, where others can.

    Attributes:
      where: which image.
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class CheckpointError(DrepError, ValueError):
    """A checkpoint or work directory that is absent, damaged, foreign or not writable."""


class ExportError(DrepError, ValueError):
    """A network that cannot be written in the form asked for, or that would not compute the same there."""


class NonFiniteError(DrepError, FloatingPointError):
    """NaN or Inf where finite numbers are required."""


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error's text, without TensorStore's account of the files around it."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES):
        if re.search(rf"os_error_code='{number}'|os error {number}\b|\[Errno {number}\]", text):
            return os.strerror(number)
    return text[:200]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns ` Did you mean "x"?` for the nearest of `options`, or the whole list when none is near."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f' Did you mean "{near[0]}"?'
    return f" Known: {', '.join(known)}." if known else ""


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`.

    Raises:
      ConfigError: when there is no such entry; the message names the nearest one.
    """
    if name not in table:
        raise ConfigError(f'Unknown {what} "{name}".{did_you_mean(name, table)}')
    return table[name]
