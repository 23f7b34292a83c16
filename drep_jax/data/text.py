"""Text files that people bring: any encoding with a mark, names that are not UTF-8, tables of any separator."""

import codecs
import os
from collections.abc import Sequence
from pathlib import Path

from drep_jax.errors import DataError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks and their encodings; that of UTF-16 begins that of UTF-32."""

SEPARATORS = (",", ";", "\t")


def read_text_lines(file: Path | str) -> list[str]:
    """Returns the lines of a text file, without their ends.

    A byte order mark says the encoding; without one it is UTF-8. Bytes that are not become
    surrogates, as in the names of files that Python lists, so that such names are found.

    Raises:
      DataError: for a file that is absent or no text.
    """
    try:
        content = Path(file).read_bytes()
        encoding = "utf-8"
        for mark, name in MARKS:
            if content.startswith(mark):
                content, encoding = content[len(mark) :], name
                break
        text = content.decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except FileNotFoundError as error:
        raise DataError(f"There is no file {file} (looked for {os.path.abspath(file)}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}.") from error
    if "\0" in text:
        raise DataError(f"{file} cannot be read as text: it holds zero bytes. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def separator_of(header: str, column: str) -> str | None:
    """Returns what separates the columns of a header that names this one; None if it does not.

    >>> separator_of("label;path", "path"), separator_of("a.png owl", "path")
    (';', None)
    """
    if header.strip() == column:
        return SEPARATORS[0]
    for separator in SEPARATORS:
        cells = [cell.strip().strip('"') for cell in header.split(separator)]
        if len(cells) > 1 and column in cells:
            return separator
    return None


def existing(folder: Path, names: Sequence[str]) -> list[Path]:
    r"""Returns the paths of files named relative to a folder; `\` separates folders where no name has it.

    Args:
      folder: that the names are relative to.
      names: as they are written, possibly on Windows.
    """
    paths = []
    for name in names:
        path = folder / name
        if "\\" in name and not path.is_file():
            path = folder / name.replace("\\", "/")
        paths.append(path)
    return paths
