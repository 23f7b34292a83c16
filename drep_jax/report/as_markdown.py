"""report.md: the blocks of a report as Markdown."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

from tabulate import tabulate

from drep_jax.report.blocks import Block, Code, Details, Heading, Picture, Table, Text, Verdict, as_text
from drep_jax.report.sections import sections


def markdown(report: Mapping[str, Any], plots: Collection[str] = ()) -> str:
    """Returns report.md for a complete report, with links to plots/NAME.png for NAME in `plots`."""
    parts = ["# DenoiseRep report"]
    for title, blocks in sections(report).items():
        parts += [f"## {title}", *drawn(blocks, plots)]
    return "\n\n".join(parts) + "\n"


def drawn(blocks: Collection[Block], plots: Collection[str] = ()) -> list[str]:
    """Returns every block as Markdown; pictures are shown if they are among `plots`."""
    return [_draw(block, plots) for block in blocks if not isinstance(block, Picture) or block.name in plots]


@functools.singledispatch
def _draw(block: Any, plots: Collection[str]) -> str:
    raise TypeError(f"report.md has no form for a {type(block).__name__}.")


@_draw.register
def _(block: Heading, plots: Collection[str]) -> str:
    return f"### {block.text}"


@_draw.register
def _(block: Text, plots: Collection[str]) -> str:
    return f"**{block.text}**" if block.strong else block.text


@_draw.register
def _(block: Verdict, plots: Collection[str]) -> str:
    return f"- {block.text}"


@_draw.register
def _(block: Code, plots: Collection[str]) -> str:
    return f"```\n{block.text}\n```"


@_draw.register
def _(block: Table, plots: Collection[str]) -> str:
    cells = [[as_text(cell).replace("|", "\\|") for cell in row] for row in block.rows]
    align = ["left" if letter == "l" else "right" for letter in block.align]
    headers = [header.replace("|", "\\|") for header in block.headers]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True, colalign=align if cells else None)


@_draw.register
def _(block: Picture, plots: Collection[str]) -> str:
    return f"![{block.description}](plots/{block.name}.png)"


@_draw.register
def _(block: Details, plots: Collection[str]) -> str:
    inside = "\n\n".join(drawn(block.blocks, plots))
    return f"<details><summary>{block.summary}</summary>\n\n{inside}\n\n</details>"
