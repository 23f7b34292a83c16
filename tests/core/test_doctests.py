"""The examples in the docstrings of the core print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import drep_jax.core

NAMES = [module.name for module in pkgutil.iter_modules(drep_jax.core.__path__, "drep_jax.core.")]


@pytest.mark.parametrize("name", NAMES)
def test_examples_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_core_has_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    with_examples = [
        name for name in NAMES if any(test.examples for test in finder.find(importlib.import_module(name)))
    ]
    assert {f"drep_jax.core.{name}" for name in ("schedule", "sites", "denoisers", "fusion", "closed_form")} <= {
        *with_examples
    }
    assert len(with_examples) >= 5
