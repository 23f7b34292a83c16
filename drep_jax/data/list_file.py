"""Images named in a text file: lines of `path label`, or CSV with a header `path,label,split`."""

import csv
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from drep_jax.data.folder import FolderSource, tenth
from drep_jax.data.labels import MISSING
from drep_jax.data.splits import SPLITS, plan
from drep_jax.data.text import existing, read_text_lines, separator_of
from drep_jax.errors import ConfigError, DataError, did_you_mean
from drep_jax.files import expanded

COLUMNS = ("path", "label", "split")
SHOWN = 5
MOST_CLASSES = 1_000_000


class Entry(NamedTuple):
    """One line: its number, the image as written, its label and its split, if they are given."""

    line: int
    path: str
    label: str | None
    split: str | None


def open_list(
    argument: str, split: str, image_size: tuple[int, int], resize: str, data_dir: str | None
) -> FolderSource:
    """Opens `list:FILE`; FILE may be relative to `data_dir`, the paths in it to FILE.

    Without a column of splits, 80 % are train, 10 % validation and 10 % test, by a hash of the path
    as written.

    Raises:
      DataError: naming the line that cannot be used.
    """
    if not argument:
        raise ConfigError('The data source "list" needs a file: "list:FILE".')
    file = Path(expanded(data_dir or "")) / expanded(argument)
    entries = read_list(file)
    # Over all splits, so that a class which one of them lacks does not shift the labels of the
    # others.
    class_names = _classes(file, entries)
    stored = {entry.split or "train" for entry in entries}
    labeled = {entry.split or "train" for entry in entries if entry.label is not None}
    part = plan(stored, split, str(file), stored - labeled)
    chosen = [
        entry
        for entry in entries
        if (entry.split or "train") == part.stored and part.start <= tenth(Path(entry.path)) < part.stop
    ]
    if not chosen:
        raise DataError(
            f"None of the {len(entries)} images of {file} falls into the {split} part. Name more images, or give the file a "
            f"column split with {', '.join(SPLITS)}."
        )
    paths = existing(file.parent, [entry.path for entry in chosen])
    absent = [entry for entry, path in zip(chosen, paths, strict=True) if not path.is_file()]
    if absent:
        shown = ", ".join(f"{entry.path} (line {entry.line})" for entry in absent[:SHOWN])
        more = f", and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        raise DataError(
            f"{len(absent)} of the {len(chosen)} images of {file} are not there: {shown}{more}. Paths are relative to the "
            "folder of the file; write those with spaces in quotes. A table needs a header that names the column path, as in "
            "path,label,split; without one a line is a path and then its label."
        )
    numbers = {name: number for number, name in enumerate(class_names or ())}
    return FolderSource(
        paths,
        [MISSING if entry.label is None else numbers[entry.label] for entry in chosen]
        if part.stored in labeled
        else None,
        class_names,
        name=f"list:{argument}",
        note=part.note,
        image_size=image_size,
        resize=resize,
        stored=part.stored,
    )


def read_list(file: Path) -> list[Entry]:
    """Returns the entries of a list file, of either form.

    Raises:
      DataError: naming the line that is not understood, or twice there.
    """
    lines = read_text_lines(file)
    first = next((line for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    separator = separator_of(first, "path")
    entries = list(_from_words(file, lines) if separator is None else _from_csv(file, lines, separator))
    if not entries:
        raise DataError(
            f'{file} names no images: expected lines of "path label", or CSV with the header path,label,split.'
        )
    seen: dict[str, int] = {}
    for entry in entries:
        if entry.path in seen:
            raise DataError(f"{file}, line {entry.line}: {entry.path} is already in line {seen[entry.path]}.")
        seen[entry.path] = entry.line
    lacking = [entry.line for entry in entries if entry.split is None]
    if lacking and len(lacking) < len(entries):
        raise DataError(
            f"{file}, line {lacking[0]}: no split, but other lines have one ({len(lacking)} of {len(entries)} lines lack "
            "it). Give it for all images or for none."
        )
    return entries


def _from_words(file: Path, lines: Sequence[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, ""
        # Of Windows paths the backslash is a part, unless it stands before a space or a quote.
        lexer.escape = "\\" if re.search(r"""\\[\s"'\\]""", line) else ""
        try:
            words = list(lexer)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: {error}: {line.strip()!r}.") from error
        if len(words) > 2:
            raise DataError(
                f'{file}, line {number}: {len(words)} words, expected "path" or "path label": {line.strip()!r}. Write paths '
                "and class names with spaces in quotes."
            )
        yield Entry(number, words[0], _label(words[1] if len(words) == 2 else ""), None)


def _from_csv(file: Path, lines: Sequence[str], separator: str) -> Iterator[Entry]:
    columns: list[str] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip() or (columns is None and line.lstrip().startswith("#")):
            continue
        try:
            cells = [
                cell.strip()
                for cell in next(csv.reader([line], strict=True, skipinitialspace=True, delimiter=separator))
            ]
        except csv.Error as error:
            raise DataError(f"{file}, line {number}: {error}: {line.strip()!r}.") from error
        if columns is None:
            columns = cells
            unknown = [name for name in columns if name not in COLUMNS]
            if unknown or len(set(columns)) < len(columns):
                wrong = f'unknown column "{unknown[0]}"' if unknown else "a column is there twice"
                raise DataError(
                    f"{file}, line {number}: {wrong}; columns are {', '.join(COLUMNS)}, the first alone is needed."
                )
            continue
        if len(cells) != len(columns):
            raise DataError(
                f"{file}, line {number}: {len(cells)} cells, expected {len(columns)} ({','.join(columns)})."
            )
        row = dict(zip(columns, cells, strict=True))
        if not row["path"]:
            raise DataError(f"{file}, line {number}: no path.")
        part = row.get("split") or None
        part = "validation" if part == "val" else part
        if part is not None and part not in SPLITS:
            raise DataError(f'{file}, line {number}: unknown split "{part}".{did_you_mean(part, SPLITS)}')
        yield Entry(number, row["path"], _label(row.get("label", "")), part)


def _label(text: str) -> str | None:
    """Returns the label of a line; None for a missing one, which is nothing or -1."""
    return None if text in ("", str(MISSING)) else text


def _classes(file: Path, entries: Sequence[Entry]) -> tuple[str, ...] | None:
    """Returns the class names in the order of the labels: the numbers from 0, or sorted names."""
    labels = {entry.label for entry in entries if entry.label is not None}
    if not labels:
        return None
    numbers = [label for label in labels if label.isdecimal()]
    if len(numbers) == len(labels):
        if any(str(int(label)) != label for label in labels):
            wrong = next(entry for entry in entries if entry.label is not None and str(int(entry.label)) != entry.label)
            raise DataError(f"{file}, line {wrong.line}: the class {wrong.label} is written with leading zeros.")
        largest = max(labels, key=int)
        if int(largest) >= MOST_CLASSES:
            wrong = next(entry for entry in entries if entry.label == largest)
            raise DataError(
                f"{file}, line {wrong.line}: classes are numbered 0, 1, 2, …, below {MOST_CLASSES:,}; got {largest}."
            )
        return tuple(map(str, range(int(largest) + 1)))
    negative = next(
        (e for e in entries if e.label is not None and e.label.lstrip("-").isdecimal() and e.label[0] == "-"), None
    )
    if negative is not None:
        raise DataError(
            f"{file}, line {negative.line}: the class {negative.label} is negative; classes are 0, 1, 2, …."
        )
    if numbers:
        odd = next(entry for entry in entries if entry.label is not None and not entry.label.isdecimal())
        raise DataError(
            f'{file}, line {odd.line}: the class "{odd.label}" is a name, but others are numbers. Use one of the two.'
        )
    return tuple(sorted(labels))
