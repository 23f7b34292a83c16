"""A backbone as equations with its layers marked, and an interpreter that visits them.

- `trace` runs a Flax module abstractly and marks every selected layer as one equation, a jitted
  call named after the layer.
- `walk` evaluates the equations. It hands each marked layer to a visitor, which may return another
  output.
- `find_junctions` finds residual sums: the output y of a block's last layer meets the shortcut q in
  z = L(y) ± q. L scales channels and rearranges entries (batch normalization at inference, layer
  scale, reshapes). A change of y can then cancel noise in q.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from drep_jax.core.intercept import visit_sites
from drep_jax.core.jaxpr import (
    bind,
    body_of,
    holds_mark,
    inline,
    mark_name,
    mark_of,
    marked,
    path_of,
    reach,
    varying_vars,
)
from drep_jax.core.layers import Layer, alone, leaves_of
from drep_jax.core.sites import Site
from drep_jax.errors import SiteError
from drep_jax.typing import Path, Tree

Visitor = Callable[["Call"], Any]
"""Call ↦ (output of the layer, tree of arrays to record or None)."""


MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "convert_element_type", "neg")
"""Primitives that only rearrange entries, or change their sign or type."""


@dataclasses.dataclass(frozen=True)
class Junction:
    """A residual sum: a layer's output y becomes z = L(y) + sign·q.

    Attributes:
      chain: indices of the equations of L, in order.
      end: variable that holds L(y).
      other: variable that holds q.
      sign: 1 or −1.
    """

    chain: tuple[int, ...]
    end: Any
    other: Any
    sign: float


@dataclasses.dataclass
class Call:
    """A marked layer that is about to be evaluated.

    Attributes:
      path: of the layer.
      x: its input.
      leaves: its kernel and bias.
      apply: (leaves, x) ↦ output.
      leaves_of: layer path ↦ leaves, of any marked layer at this level; for sites of several
        layers.
      correction: None, or (y, change) ↦ δ as returned by `_correction`.
    """

    path: Path
    x: Any
    leaves: Tree
    apply: Callable[[Tree, Any], Any]
    leaves_of: Callable[[Path], Tree]
    correction: Callable[[Any, Callable[[Any], Any]], Any] | None


@dataclasses.dataclass(frozen=True)
class Program:
    """The equations of a backbone with its layers marked.

    Attributes:
      closed: the program.
      layers: {layer path: (leaves, x) ↦ output}, for inputs of any batch size. The marked equations
        are for one size: what Flax reshapes or pads has numbers of it in them.
    """

    closed: core.ClosedJaxpr
    layers: Mapping[Path, Callable[[Tree, Any], Any]]

    @property
    def jaxpr(self) -> core.Jaxpr:
        """The equations."""
        return self.closed.jaxpr

    @property
    def consts(self) -> Sequence[Any]:
        """Values of the equations' constants."""
        return self.closed.consts


def check_measurable(sites: Sequence[Site]) -> None:
    """Checks that every layer of the sites is called once, on a batch of features.

    Learning, fusion and the certificate pool the calls of a layer. Measured noise solves a layer
    where it is called, with what the layers before it leave of the noise, which differs from call
    to call.

    Raises:
      SiteError: listing the layers that measured noise cannot solve, each with the reason.
    """
    reasons = {
        layer.name: f"it is called {layer.calls} times in one forward pass"
        if layer.calls > 1
        else "nn.vmap spreads its input over calls; call it on the whole batch"
        for site in sites
        for layer in site.layers
        if layer.calls > 1 or layer.spread
    }
    if reasons:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        raise SiteError(
            "Measured noise solves a layer at its one call in a forward pass; narrow sites.pattern, or take another learner "
            f"(Algorithm 1, the closed form) for:\n{lines}"
        )


def trace(
    backbone: nn.Module, variables: Tree, sites: Sequence[Site], images: Any, kwargs: Mapping[str, Any] | None = None
) -> Program:
    """Returns the equations of a backbone, with every layer of `sites` marked.

    Nested calls are inlined, except loops.

    Args:
      backbone: an unbound Linen module.
      variables: its variables.
      sites: whose layers are marked.
      images: the batch.
      kwargs: further arguments of the backbone, such as `train`.

    Returns:
      The program. Its inputs are the leaves of (variables, images), in tree order.
    """
    functions: dict[Path, Callable[[Tree, Any], Any]] = {}

    def mark(site: Site, layer: Layer, module: nn.Module, extra: Any, x: Any, call: Any) -> Any:
        del site, extra, call
        functions[layer.path] = alone(module)
        return marked(mark_name(layer.path), functions[layer.path])(leaves_of(module), x)

    def forward(variables: Tree, images: Any) -> Any:
        # The visitor needs no extras. But every layer must have one, and with a stack its axis.
        layers = [layer for site in sites for layer in site.layers]
        extras = {layer.path: jnp.zeros(() if layer.stack is None else layer.stack) for layer in layers}
        return visit_sites(backbone, variables, sites, extras, mark, images, **(kwargs or {}))

    return Program(inline(jax.make_jaxpr(forward)(variables, images)), functions)


def _path(eqn: Any) -> Path | None:
    """Returns the path of the layer that an equation computes, or None."""
    name = mark_of(eqn)
    return None if name is None else path_of(name)


def find_junctions(jaxpr: Any, varying: set[Any]) -> dict[int, Junction]:
    """Finds the residual sums in which a layer's output meets something that does not depend on it.

    A layer has none if its output first goes elsewhere: to a nonlinearity, to two users, to a norm
    that mixes channels. Where the outputs of two layers are added (a block's last convolution and a
    projected shortcut), the junction belongs to the first layer.

    Args:
      jaxpr: from `trace`.
      varying: variables that depend on the images, see `drep_jax.core.jaxpr.varying_vars`.

    Returns:
      {equation index of a marked layer: its junction}.
    """
    users: dict[Any, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for var in {v for v in eqn.invars if not isinstance(v, core.Literal)}:
            users.setdefault(var, []).append(index)
    outputs = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    junctions: dict[int, Junction] = {}
    claimed: set[int] = set()  # sums that are some layer's junction
    for index, eqn in enumerate(jaxpr.eqns):
        if mark_of(eqn) is None:
            continue
        var = eqn.outvars[0]
        chain: list[int] = []
        downstream = reach(jaxpr, {var})
        while var not in outputs and len(users.get(var, ())) == 1:
            user = users[var][0]
            following = jaxpr.eqns[user]
            name = following.primitive.name
            others = [v for v in following.invars if v is not var]
            fixed = [isinstance(v, core.Literal) or v not in varying for v in others]
            if (
                name in MOVES
                or (name in ("mul", "add", "add_any", "sub") and fixed == [True])
                or (name == "div" and fixed == [True] and following.invars[0] is var)
            ):
                pass
            elif name in ("add", "add_any", "sub") and len(others) == 1 and others[0] not in downstream:
                if user not in claimed:
                    sign = 1.0 if name != "sub" else -1.0
                    junctions[index] = Junction(tuple(chain), var, others[0], sign)
                    claimed.add(user)
                break
            else:
                break
            chain.append(user)
            var = following.outvars[0]
    return junctions


def _correction(
    jaxpr: Any, junction: Junction, start: Any, read: Callable[[Any], Any], other: Any
) -> Callable[[Any, Callable[[Any], Any]], Any]:
    """Returns (y, change) ↦ δ, so that L(y + δ) ± q = L(y) ± (q + change(q)).

    L scales by a and rearranges, so its inverse is Lᵀ(· / a²). Channels that L mutes get δ = 0.

    Args:
      jaxpr: the program.
      junction: of the layer.
      start: variable that holds y.
      read: variable ↦ value.
      other: q.
    """

    def chain(y: Any) -> Any:
        env = {start: y}
        for index in junction.chain:
            eqn = jaxpr.eqns[index]
            values = [v.val if isinstance(v, core.Literal) else env[v] if v in env else read(v) for v in eqn.invars]
            env[eqn.outvars[0]] = bind(eqn, values)[0]
        return env[junction.end]

    def correct(y: Any, change: Callable[[Any], Any]) -> Any:
        _, scale = jax.jvp(chain, (y,), (jnp.ones_like(y),))
        size = jnp.abs(scale)
        passed = size > 1e-3 * size.max()
        target = junction.sign * change(other)
        _, transpose = jax.vjp(chain, y)
        return transpose(jnp.where(passed, target / jnp.where(passed, scale, 1.0) ** 2, 0.0).astype(scale.dtype))[0]

    return correct


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def walk(
    program: Program, args: Sequence[Any], varying: Sequence[bool], visit: Visitor
) -> tuple[list[Any], dict[Path, Any]]:
    """Evaluates the equations, with `visit` in place of marked layers that depend on the images.

    Args:
      program: from `trace`.
      args: its inputs.
      varying: which of them are images.
      visit: Call ↦ (output of the layer, tree of arrays to record or None).

    Returns:
      (outputs, {layer path: record}). Records of layers inside a loop are stacked.

    Raises:
      SiteError: for a marked layer inside a branch or a `while` loop.
    """
    jaxpr = program.jaxpr
    varying_here = varying_vars(jaxpr, varying)
    junctions = find_junctions(jaxpr, varying_here)
    producer = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    layers = {path: eqn for eqn in jaxpr.eqns if (path := _path(eqn)) is not None}
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *args], strict=True))
    evaluated: set[int] = set()
    records: dict[Path, Any] = {}

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom.val
        if atom not in env:
            evaluate_up_to(atom)
        return env[atom]

    def evaluate_up_to(var: Any) -> None:
        """Evaluates, in order, the equations that `var` still needs."""
        pending, needed = [producer[var]], set()
        while pending:
            index = pending.pop()
            if index in evaluated or index in needed:
                continue
            needed.add(index)
            pending += [
                producer[v] for v in jaxpr.eqns[index].invars if not isinstance(v, core.Literal) and v not in env
            ]
        for index in sorted(needed):
            evaluate(index)

    def leaves_of(path: Path) -> Tree:
        *leaves, _ = [read(v) for v in layers[path].invars]
        return _unflatten(leaves)

    def evaluate(index: int) -> None:
        if index in evaluated:
            return
        evaluated.add(index)
        eqn = jaxpr.eqns[index]
        values = [read(v) for v in eqn.invars]
        if (path := _path(eqn)) is not None and eqn.invars[-1] in varying_here:
            *leaves, x = values
            correction = None
            if index in junctions:
                junction = junctions[index]
                correction = _correction(jaxpr, junction, eqn.outvars[0], read, read(junction.other))

            def apply(tree: Tree, x: Any) -> Any:
                return jax.jit(program.layers[path])(tree, x)

            output, record = visit(Call(path, x, _unflatten(leaves), apply, leaves_of, correction))
            outs = [output]
            if record is not None:
                records[path] = record
        elif (body := body_of(eqn)) is not None and holds_mark(body.jaxpr):
            outs, inner_records = _walk_loop(eqn, values, [_is_in(v, varying_here) for v in eqn.invars], visit, program)
            records.update(inner_records)
        else:
            outs = bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))

    for index in range(len(jaxpr.eqns)):
        evaluate(index)
    return [read(v) for v in jaxpr.outvars], records


def _is_in(atom: Any, variables: set[Any]) -> bool:
    return not isinstance(atom, core.Literal) and atom in variables


def _unflatten(leaves: Sequence[Any]) -> Tree:
    names = ("kernel",) if len(leaves) == 1 else ("bias", "kernel")  # as a tree is flattened
    return dict(zip(names, leaves, strict=True))


def _walk_loop(
    eqn: Any, values: Sequence[Any], varying: Sequence[bool], visit: Visitor, program: Program
) -> tuple[list[Any], Mapping[Path, Any]]:
    """Walks the body of a `scan` in a scan of its own; its records come out stacked."""
    if eqn.primitive.name != "scan":
        raise SiteError(
            f"A selected layer runs inside {eqn.primitive.name}, where its features cannot be followed; narrow sites.pattern."
        )
    params = eqn.params
    const_count, carry_count = params["num_consts"], params["num_carry"]
    first_x = const_count + carry_count
    consts, start, xs = values[:const_count], values[const_count:first_x], values[first_x:]
    body = Program(inline(params["jaxpr"]), program.layers)
    flags = [*varying[:const_count], *[True] * carry_count, *varying[first_x:]]

    def step(carry: Any, x: Any) -> Any:
        outs, records = walk(body, [*consts, *carry, *x], flags, visit)
        return outs[:carry_count], (outs[carry_count:], records)

    carry, (ys, records) = jax.lax.scan(step, start, xs, length=params["length"], reverse=params["reverse"])
    return [*carry, *ys], records
