"""docs/troubleshooting.md: each message that it quotes is one of the code's, and its test exists."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = "docs/troubleshooting.md"
HEADER = ("message", "cause", "way out", "test")
MANY = 25


@functools.cache
def rows():
    """The rows of all tables of the page, as tuples of cells."""
    lines = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines if line.startswith("|")]
    return [row for row in cells if row != HEADER and not set(row[0]) <= set("-:|")]


@functools.cache
def messages():
    """Every text in the source, one a line; … stands for what it fills in."""
    texts = []
    for path in [*(ROOT / "drep_jax").rglob("*.py"), ROOT / "train.py", ROOT / "fuse.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(" ".join(text.split()) for text in texts)


def pattern_of(message):
    """A regular expression for a quoted message; … stands for anything in the same text."""
    return ".*".join(re.escape(piece) for piece in re.split(r"\s*…\s*", message) if piece)


def test_the_table_is_long_and_has_no_row_twice():
    assert all(len(row) == len(HEADER) and all(row) for row in rows()), [row for row in rows() if len(row) != 4]
    quoted = [row[0] for row in rows()]
    assert len(quoted) == len(set(quoted)) >= MANY


def test_each_message_is_one_of_the_code():
    unknown = []
    for message, *_ in rows():
        match = re.fullmatch(r"`(.+)`", message)
        letters = re.sub(r"[\W…]", "", message)
        if match is None or len(letters) < 8 or re.search(pattern_of(match[1]), messages()) is None:
            unknown.append(message)
    assert unknown == []


def test_each_test_exists():
    missing = []
    for *_, name in rows():
        path, _, function = name.strip("`").partition("::")
        file = ROOT / path
        if not file.is_file() or f"\ndef {function}(" not in file.read_text(encoding="utf-8"):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("message", ["`There is no such message …`", "`There is no directory … of cheese`"])
def test_a_message_that_nothing_raises_is_noticed(message):
    assert re.search(pattern_of(message.strip("`")), messages()) is None
