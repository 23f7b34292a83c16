"""Errors that a user can act on: they say what was given, what was expected, where, and what to do.

`train.py` and `fuse.py` print a `DrepError` as one message without a traceback. Any other exception
is a bug.
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class DrepError(Exception):
    """Base class of all errors caused by bad input."""


class ConfigError(DrepError, ValueError):
    """A configuration value or name that cannot be used."""


class SiteError(DrepError, ValueError):
    """A layer that cannot be a denoising site, or a pattern that selects none."""


class FusionError(DrepError, ValueError):
    """Denoisers and a backbone that do not fit together, or must not be fused."""


class DataError(DrepError, ValueError):
    """Images or labels that are missing, unreadable or malformed."""


class UnreadableError(DataError):
    """A single image that cannot be read.

    Attributes:
      where: path or index of the image.
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class CheckpointError(DrepError, ValueError):
    """A checkpoint or work directory that is missing, damaged, foreign or not writable."""


class EvaluationError(DrepError, RuntimeError):
    """An evaluation that failed after everything was learned and written."""


class ExportError(DrepError, ValueError):
    """A network that cannot be exported in a format, or would compute something else there."""


class NonFiniteError(DrepError, FloatingPointError):
    """NaN or Inf where finite numbers are required."""


def reason_of(error: BaseException) -> str:
    """Returns the reason of an error in a few words, without TensorStore's list of files.

    >>> reason_of(OSError(28, "No space left on device"))
    'No space left on device'
    """
    text = (str(error).splitlines() or [type(error).__name__])[0]
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES):
        if re.search(rf"os_error_code='{number}'|os error {number}\b|\[Errno {number}\]", text):
            return os.strerror(number)
    return text[:200]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns ` Did you mean "x"?` with the nearest option, or the list of options.

    >>> did_you_mean("digit", ["digits", "folder"])
    ' Did you mean "digits"?'
    >>> did_you_mean("x", ["digits", "folder"])
    ' Known: digits, folder.'
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f' Did you mean "{near[0]}"?'
    return f" Known: {', '.join(known)}." if known else ""


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`.

    Args:
      table: of named things.
      name: as the user gave it.
      what: the kind of thing, for the message.

    Raises:
      ConfigError: if there is no such entry; names the nearest one.
    """
    if name not in table:
        raise ConfigError(f'Unknown {what} "{name}".{did_you_mean(name, table)}')
    return table[name]
