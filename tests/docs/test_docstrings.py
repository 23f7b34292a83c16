"""Docstrings document the parameters that functions have, and no others: the site shows them as they are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "drep_jax").rglob("*.py"))


def parameters_of(node):
    """Names of a function's parameters, or of a class's fields and of its `__init__`."""
    if isinstance(node, ast.ClassDef):
        names = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        return names.union(*(parameters_of(item) for item in node.body if getattr(item, "name", "") == "__init__"))
    arguments = node.args
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg for argument in listed if argument is not None}


def documented(docstring):
    """Names in the section `Args:`; several may share an entry, as in `rows, columns: …`."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)+)", docstring + "\n", re.MULTILINE)
    entries = re.findall(r"^  (?! )([^:\n]+):", section[1], re.MULTILINE) if section else []
    return [name.strip(" *`") for entry in entries for name in entry.split(",")]


@pytest.mark.parametrize("module", MODULES)
def test_documented_parameters_exist(module):
    wrong = []
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = documented(ast.get_docstring(node) or "")
            wrong += [f"{node.name}: {name}" for name in names if name not in parameters_of(node)]
    assert wrong == []


def test_what_is_documented_is_found():
    text = "Line.\n\nArgs:\n  rows, columns: of it,\n    and more: of it.\n  **options: further.\n\nReturns:\n  x: a number."
    assert documented(text) == ["rows", "columns", "options"]
