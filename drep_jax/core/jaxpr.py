"""Traced programs (jaxprs): marks on equations, inlining, and which values depend on which inputs.

A mark is a jitted call with a name of ours. It survives tracing under scan, remat and jit. So an
equation of a Flax module can be recognized in the program that it is traced to, whatever else the
module does.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from drep_jax.typing import Path

PREFIX = "drep:"
"""Beginning of the names of marked calls."""


VALID = "~valid"
"""Name of a mark (x, which feature vectors count, …) ↦ x before a layer; no path begins so."""


INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
"""Primitives of calls that `inline` replaces by their bodies; loops and branches stay."""


# ---------------------------------------------------------------------------------------------------------------------
# Marks
# ---------------------------------------------------------------------------------------------------------------------


def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function as one equation with a name that `mark_of` recognizes."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = PREFIX + name
    return jax.jit(call)


def mark_name(path: Path) -> str:
    """Returns a path as the name of a mark; parts that contain a slash stay apart.

    >>> mark_name(("a/b", "c")), path_of(mark_name(("a/b", "c")))
    ('a~1b/c', ('a/b', 'c'))
    """
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)


def path_of(name: str) -> Path:
    """Inverse of `mark_name`."""
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in name.split("/"))


def name_of(eqn: Any) -> str | None:
    """Returns the name of a marked equation, or None."""
    name = str(eqn.params.get("name", ""))
    return name[len(PREFIX) :] if name.startswith(PREFIX) else None


def mark_of(eqn: Any) -> str | None:
    """Returns the name of a marked equation that computes something, or None.

    Flax traces the body of a scan once more to find what does not change in it, and drops the
    outputs of that trace. What is left of a mark is an equation without outputs.
    """
    return name_of(eqn) if eqn.outvars else None


def holds_mark(jaxpr: Any) -> bool:
    """Returns whether a program contains a marked equation, at any depth."""
    return any(mark_of(eqn) is not None or any(map(holds_mark, bodies(eqn))) for eqn in jaxpr.eqns)


# ---------------------------------------------------------------------------------------------------------------------
# Equations
# ---------------------------------------------------------------------------------------------------------------------


def inline(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Replaces nested calls by their bodies, except marked ones."""

    def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            inner = body_of(eqn)
            if inner is not None and eqn.primitive.name in INLINED and mark_of(eqn) is None:
                outs = run(inner.jaxpr, inner.consts, values)
            else:
                outs = bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    return jax.make_jaxpr(lambda *args: run(closed.jaxpr, closed.consts, args))(*closed.in_avals)


def body_of(eqn: Any) -> core.ClosedJaxpr | None:
    """Returns the program that a call or a scan runs, or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(name)
        if isinstance(body, core.ClosedJaxpr):
            return body
        if isinstance(body, core.Jaxpr):
            return core.ClosedJaxpr(body, ())
    return None


def bodies(eqn: Any) -> list[Any]:
    """Returns the programs inside an equation: bodies of loops and calls, and branches."""

    def is_jaxpr(value: Any) -> bool:
        return isinstance(value, core.Jaxpr | core.ClosedJaxpr)

    leaves = jax.tree_util.tree_leaves(list(eqn.params.values()), is_leaf=is_jaxpr)
    return [getattr(value, "jaxpr", value) for value in leaves if is_jaxpr(value)]


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


# ---------------------------------------------------------------------------------------------------------------------
# Dependence
# ---------------------------------------------------------------------------------------------------------------------


def reach(jaxpr: Any, start: set[Any]) -> set[Any]:
    """Returns the variables at this level that depend on those in `start`, and `start` itself."""
    reached = set(start)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, core.Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return reached


def live_equations(jaxpr: Any) -> set[int]:
    """Returns the indices of the equations at this level that an output depends on."""
    needed, live = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}, set[int]()
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        if needed.intersection(jaxpr.eqns[index].outvars):
            live.add(index)
            needed.update(v for v in jaxpr.eqns[index].invars if not isinstance(v, core.Literal))
    return live


def varying_vars(jaxpr: Any, inputs: Sequence[bool]) -> set[Any]:
    """Returns the variables at this level that depend on the inputs so flagged."""
    return reach(jaxpr, {var for var, flag in zip(jaxpr.invars, inputs, strict=True) if flag})


def mark(name: str, value: Any) -> Any:
    """Returns the value unchanged, through an equation that `independent` recognizes."""
    return marked(name, lambda same: same)(value)


def independent(function: Callable[..., Any], fixed: Any, *args: Any) -> set[str]:
    """Returns the names of the marked values of `function(fixed, *args)` that ignore `args`.

    The function is traced abstractly. A value counts as dependent unless it is certain that it is
    the same for all `args`.

    >>> import jax.numpy as jnp
    >>> def function(w, x):
    ...     return mark("weights", 2 * w) + mark("features", w * x)
    >>> independent(function, jnp.ones(()), jnp.ones(()))
    {'weights'}
    """
    closed = jax.make_jaxpr(function)(fixed, *args)
    return independent_marks(closed.jaxpr, len(jax.tree_util.tree_leaves(fixed)))


def independent_marks(jaxpr: Any, fixed_count: int) -> set[str]:
    """Returns the names of the marks of a program that none of its inputs after the first ones reaches.

    Args:
      jaxpr: the program.
      fixed_count: number of its first inputs that do not count.
    """
    reached: dict[str, bool] = {}

    def see(eqn: Any, flags: Sequence[bool]) -> None:
        # Marks without outputs count too: `jax.grad` leaves no others of the forward pass.
        if (name := name_of(eqn)) is not None:
            reached[name] = reached.get(name, False) or any(flags)

    follow(jaxpr, [index >= fixed_count for index in range(len(jaxpr.invars))], see)
    return {name for name, depends in reached.items() if not depends}


def follow(jaxpr: Any, inputs: Sequence[bool], see: Callable[[Any, Sequence[bool]], None]) -> list[bool]:
    """Follows a program's equations from the inputs that are flagged as dependent.

    Args:
      jaxpr: the program.
      inputs: flag of each input.
      see: called with every equation and the flags of its inputs, at any depth; the equations of a
        loop are seen several times. Marked calls are not entered.

    Returns:
      The flag of each output.
    """
    flags = dict(zip(jaxpr.invars, inputs, strict=True))

    def flag(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and flags.get(atom, False)

    for eqn in jaxpr.eqns:
        in_flags = [flag(atom) for atom in eqn.invars]
        out_flags = [any(in_flags)] * len(eqn.outvars)
        see(eqn, in_flags)
        if name_of(eqn) is None:
            inner = list(_parts(eqn))
            if len(inner) == 1 and len(inner[0].invars) == len(in_flags) and len(inner[0].outvars) == len(out_flags):
                out_flags = _follow_call(eqn, inner[0], in_flags, see)
            else:
                for body in inner:
                    follow(body, [any(in_flags)] * len(body.invars), see)
        flags.update(zip(eqn.outvars, out_flags, strict=True))
    return [flag(atom) for atom in jaxpr.outvars]


def _follow_call(eqn: Any, body: Any, in_flags: list[bool], see: Any) -> list[bool]:
    """Follows a call, or a scan until the flags of its carry no longer change."""
    out_flags = follow(body, in_flags, see)
    if eqn.primitive.name == "scan":
        first, count = eqn.params["num_consts"], eqn.params["num_carry"]
        carry = [before or after for before, after in zip(in_flags[first : first + count], out_flags, strict=False)]
        if carry != in_flags[first : first + count]:
            return _follow_call(eqn, body, [*in_flags[:first], *carry, *in_flags[first + count :]], see)
    return out_flags


def _parts(eqn: Any) -> Iterator[Any]:
    """Yields the programs that are an equation's own parameters, in their order."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
