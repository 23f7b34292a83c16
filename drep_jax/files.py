"""Files that are written whole or not at all.

What is written goes to a temporary name in the same directory, and gets its own name when it is
complete. A process that is killed in between leaves the earlier file untouched, and at most
NAME.tmp, which the next attempt overwrites.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import IO, Any

from drep_jax.errors import ConfigError


def home() -> str | None:
    """Returns the user's home directory; None without HOME and without an entry in the list of users."""
    place = os.path.expanduser("~")
    return None if place in ("", "~") else place


def expanded(path: str) -> str:
    """Returns a path with `~` and `~USER` at its start replaced by the home directory.

    >>> expanded("runs/digits")
    'runs/digits'

    Raises:
      ConfigError: if that home directory is unknown; a folder called `~` is written `./~`.
    """
    result = os.path.expanduser(path)
    if result.startswith("~"):
        first = path.replace(os.sep, "/").partition("/")[0]
        raise ConfigError(
            f"{path}: the home directory {first} is unknown on this machine (no variable HOME, and no such user). Set HOME, or "
            "give the whole path."
        )
    return result


def temporary_of(path: str) -> str:
    """Returns the name under which a file is written before it is complete.

    >>> temporary_of("runs/digits/report.json")
    'runs/digits/report.json.tmp'
    """
    return f"{path}.tmp"


@contextlib.contextmanager
def replacing(path: str, *, directory: bool = False) -> Iterator[str]:
    """Gives a temporary path to write to; what is there when the block ends becomes `path`.

    If the block raises, the temporary file is removed and an earlier `path` stays.

    Args:
      path: of a file, or of a directory.
      directory: whether it is a directory. An earlier one is removed just before the new one takes
        its name.
    """
    temporary = temporary_of(path)
    if directory:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        if directory:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except BaseException:
        if directory:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # the first error is the one to report
                os.remove(temporary)
        raise


@contextlib.contextmanager
def whole(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """Gives an open file that becomes `path` when the block ends; see `replacing`.

    Args:
      path: of the file.
      mode: "w" for text in UTF-8, or "wb".
    """
    encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
    with replacing(path) as temporary, open(temporary, mode, encoding=encoding, errors=errors) as file:
        yield file


def utf8(text: str) -> bytes:
    r"""Returns text in UTF-8; what it cannot hold, of file names in another encoding, as `\udc..`, also in JSON.

    >>> utf8("caf\udce9")
    b'caf\\udce9'
    """
    return text.encode("utf-8", "backslashreplace")


def write_bytes(path: str, content: bytes) -> None:
    """Writes bytes whole or not at all."""
    with whole(path, "wb") as file:
        file.write(content)


def write_text(path: str, text: str) -> None:
    """Writes text in UTF-8 whole or not at all."""
    with whole(path) as file:
        file.write(text)


def write_json(path: str, value: Any) -> None:
    """Writes indented JSON whole or not at all."""
    with whole(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")
