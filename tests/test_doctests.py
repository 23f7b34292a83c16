"""What the docstrings show is what happens."""

import doctest
import importlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "drep_jax"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", [name_of(path) for path in MODULES])
def test_examples_of_a_module(name):
    exact = name.startswith("drep_jax.core.")
    options = 0 if exact else doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    outcome = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert outcome.attempted and not outcome.failed  # what failed is printed


def test_the_core_has_examples():
    modules = {name_of(path): importlib.import_module(name_of(path)) for path in (PACKAGE / "core").glob("*.py")}
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {name for name, module in modules.items() if any(test.examples for test in finder.find(module))}
    expected = {f"drep_jax.core.{name}" for name in ("schedule", "sites", "denoisers", "fusion", "closed_form")}
    assert expected <= found
    assert len(found) >= 5
