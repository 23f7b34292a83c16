"""Which marked values of a traced program depend on its inputs, found by following the equations.

What cannot be followed counts as dependent: only a value that certainly is the same for all inputs is told apart.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

MARK = "drep_value:"


def mark(name: str, value: Any) -> Any:
    """Returns the value unchanged, through an equation that `independent` recognises."""

    def same(value: Any) -> Any:
        return value

    same.__name__ = MARK + name
    return jax.jit(same)(value)


def independent(function: Callable[..., Any], fixed: Any, *args: Any) -> set[str]:
    """Traces `function(fixed, *args)` abstractly and returns the names of the marked values that none of `args` reaches."""
    closed = jax.make_jaxpr(function)(fixed, *args)
    still = len(jax.tree_util.tree_leaves(fixed))
    reached: dict[str, bool] = {}
    _follow(closed.jaxpr, [i >= still for i in range(len(closed.jaxpr.invars))], reached)
    return {name for name, flag in reached.items() if not flag}


def _follow(jaxpr: Any, inputs: Sequence[bool], reached: dict[str, bool]) -> list[bool]:
    """Returns which outputs depend on the inputs so flagged, and notes the marks."""
    flags = dict(zip(jaxpr.invars, inputs, strict=True))

    def flag(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and flags.get(atom, False)

    for eqn in jaxpr.eqns:
        given = [flag(atom) for atom in eqn.invars]
        outs = [any(given)] * len(eqn.outvars)
        if str(eqn.params.get("name", "")).startswith(MARK):
            name = eqn.params["name"][len(MARK) :]
            reached[name] = reached.get(name, False) or any(given)
        else:
            inner = list(_inner(eqn))
            if len(inner) == 1 and len(inner[0].invars) == len(given) and len(inner[0].outvars) == len(outs):
                outs = _call(eqn, inner[0], given, reached)
            else:
                for body in inner:
                    _follow(body, [any(given)] * len(body.invars), reached)
        flags.update(zip(eqn.outvars, outs, strict=True))
    return [flag(atom) for atom in jaxpr.outvars]


def _call(eqn: Any, body: Any, given: list[bool], reached: dict[str, bool]) -> list[bool]:
    """Follows a call, or a scan until what it carries no longer changes."""
    outs = _follow(body, given, reached)
    if eqn.primitive.name == "scan":
        first, count = eqn.params["num_consts"], eqn.params["num_carry"]
        carried = [a or b for a, b in zip(given[first : first + count], outs, strict=False)]
        if carried != given[first : first + count]:
            return _call(eqn, body, [*given[:first], *carried, *given[first + count :]], reached)
    return outs


def _inner(eqn: Any) -> Iterator[Any]:
    """Yields the programs within an equation."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
