"""What formats share whose networks differ between the projects that publish them, or whose names differ with the release."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from drep_jax.errors import CheckpointError
from drep_jax.weights.translation import Rule

Rules = tuple[Rule, ...]


def rules_of(
    implementation: str, rules: Rules | Callable[[Any], Rules], why: Callable[[str, Any], str]
) -> Callable[[Any], Rules]:
    """Returns the rules for the networks of one implementation only.

    Args:
      implementation: the `implementation` of the networks that files in this format fit.
      rules: of these networks, or (network) ↦ rules.
      why: (implementation, network of another one) ↦ what the error says.
    """

    def find(net: Any) -> Rules:
        if net.implementation != implementation:
            raise CheckpointError(why(implementation, net))
        return rules(net) if callable(rules) else rules

    return find


def renaming(table: Sequence[tuple[str, Any]]) -> Callable[[str], str]:
    """Returns name ↦ name after all replacements, in their order.

    Args:
      table: (regular expression, replacement or function of the match), as of `re.sub`.
    """

    def renamed(name: str) -> str:
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        return name

    return renamed
