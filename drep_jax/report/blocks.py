"""The blocks of a report, which report.md, report.html and the console each draw in their way."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias, Union

from drep_jax.report.comparisons import Comparison


@dataclasses.dataclass(frozen=True)
class Word:
    """An outcome in one word; `tone` is "higher", "lower", "passed", "failed" or ""."""

    text: str
    tone: str


Cell: TypeAlias = str | Comparison | Word
"""A cell of a table; a comparison shows its difference and interval."""


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A sentence on an outcome, in a paragraph of its own; `tone` as in `Word`."""

    text: str
    tone: str


@dataclasses.dataclass(frozen=True)
class Code:
    """Preformatted text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      headers: of the columns.
      rows: the cells of every row.
      align: one letter per column, "l" or "r".
      groups: indices of the first rows of groups of rows.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    align: str
    groups: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """The plot plots/NAME.png, left out if it was not drawn.

    Photographs keep their colors on dark pages.
    """

    name: str
    description: str
    photographs: bool = False


@dataclasses.dataclass(frozen=True)
class Details:
    """Blocks collapsed under a summary."""

    summary: str
    blocks: "Sequence[Block]"


Block: TypeAlias = Union[Heading, Text, Verdict, Code, Table, Picture, Details]  # noqa: UP007, names a later class


def as_text(cell: Cell) -> str:
    """Returns a cell of a table as plain text."""
    if isinstance(cell, Comparison):
        return cell.text()
    return cell.text if isinstance(cell, Word) else cell
