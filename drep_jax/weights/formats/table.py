r"""A table of names of a user's own: a Python file, or module, that defines `FORMAT`, or a list `FORMATS`.

from drep_jax.weights.translation import Format, Rule

FORMAT = Format(name="mynet", rules=(Rule(r"block(\d+)/conv", r"blocks.\1.0"), Rule("head", "fc")))
"""

import re
from collections.abc import Sequence
from typing import Any

from drep_jax.errors import ConfigError
from drep_jax.imports import import_module
from drep_jax.weights.translation import Format, Rule


def read_table(where: str) -> tuple[Format, ...]:
    """Returns the formats that a table defines.

    Args:
      where: path of a .py file, or dotted name of a module.

    Raises:
      ConfigError: if there is no such table, or it defines something else; says what.
    """
    module = import_module(where)
    if hasattr(module, "FORMAT") == hasattr(module, "FORMATS"):
        raise ConfigError(
            f"The name table {where} must define FORMAT, a drep_jax.weights.Format, or a list FORMATS of several, "
            f"and defines {'both' if hasattr(module, 'FORMAT') else 'neither'}."
        )
    defined: Any = [module.FORMAT] if hasattr(module, "FORMAT") else module.FORMATS
    if not isinstance(defined, Sequence) or not defined:
        raise ConfigError(f"FORMATS in {where} must be a list of drep_jax.weights.Format, got {defined!r}.")
    for fmt in defined:
        _check(fmt, where)
    return tuple(defined)


def _check(fmt: Any, where: str) -> None:
    if not isinstance(fmt, Format):
        raise ConfigError(f"A format in {where} is a {type(fmt).__name__}, and must be a drep_jax.weights.Format.")
    rules = () if callable(fmt.rules) else fmt.rules
    if not callable(fmt.rules) and (not rules or not all(isinstance(rule, Rule) for rule in rules)):
        raise ConfigError(
            f'The rules of format "{fmt.name}" in {where} must be drep_jax.weights.Rule, at least one, or a function of the '
            "module that makes them."
        )
    for rule in rules:
        try:
            rule.place("")
        except re.error as error:
            raise ConfigError(
                f'A rule of format "{fmt.name}" in {where} is no regular expression: {rule.ours!r}: {error}.'
            ) from error
