"""A backbone as a flat list of equations in which its layers can be recognised, and what is added to a layer's output.

`trace` runs a Flax module abstractly and marks every selected layer as one equation (a jitted call named after the layer),
whatever else the module does. `walk` then evaluates the equations and hands each marked layer to a visitor, which may answer
with another output. Between them stands `find_junctions`: in a residual network the output y of a block's last layer meets
the shortcut q in a sum, z = L(y) ± q, where L scales channels and moves numbers about (batch normalisation at inference,
layer scale, reshapes). What disturbs q can then be answered by y.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from drep_jax.core.intercept import visit_sites
from drep_jax.core.jaxpr import bind, body_of, holds_mark, inline, mark_of, marked, reach, varying_vars
from drep_jax.core.layers import Layer
from drep_jax.core.sites import Site
from drep_jax.errors import SiteError
from drep_jax.typing import Path, Tree

Visitor = Callable[["Call"], Any]


MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "convert_element_type", "neg")
"""Primitives that only move numbers about, or change their sign or type."""


@dataclasses.dataclass(frozen=True)
class Junction:
    """Where a layer's output y becomes z = L(y) + sign·q."""

    chain: tuple[int, ...]
    end: Any
    other: Any
    sign: float


@dataclasses.dataclass
class Call:
    """A marked layer about to be evaluated.

    Attributes:
      path: of the layer.
      x: its input.
      leaves: its kernel and bias.
      apply: (leaves, x) ↦ output.
      leaves_of: {layer path: leaves} of the marked layers at this level, for sites of several layers.
      correction: None, or a function of y and the arithmetic that a visitor applies to q; see `_correction`.
    """

    path: Path
    x: Any
    leaves: Tree
    apply: Callable[[Tree, Any], Any]
    leaves_of: Callable[[Path], Tree]
    correction: Callable[[Any, Callable[[Any], Any]], Any] | None


def trace(backbone: nn.Module, variables: Tree, sites: Sequence[Site], images: Any) -> core.ClosedJaxpr:
    """Returns the equations of `backbone.apply(variables, images)`, with every layer of `sites` as a single marked one.

    Nested calls are written out, except those of loops. Inputs are the leaves of (variables, images), in tree order.
    """

    def mark(site: Site, layer: Layer, module: nn.Module, extra: Any, x: Any, call: Any) -> Any:
        del site, extra, call
        leaves: Tree = {
            name: module.get_variable("params", name)
            for name in ("kernel", "bias")
            if module.has_variable("params", name)
        }
        alone = module.clone(parent=None, name=None)

        def run(leaves: Tree, x: Any) -> Any:
            return alone.apply({"params": leaves}, x)

        return marked(layer.name, run)(leaves, x)

    empty = {layer.path: jnp.zeros(()) for site in sites for layer in site.layers}

    def forward(variables: Tree, images: Any) -> Any:
        extras = {path: zero for path, zero in empty.items() if path not in stacked}
        extras.update({path: jnp.zeros(stack) for path, stack in stacked.items()})
        return visit_sites(backbone, variables, sites, extras, mark, images)

    stacked = {layer.path: layer.stack for site in sites for layer in site.layers if layer.stack is not None}
    return inline(jax.make_jaxpr(forward)(variables, images))


def _path(eqn: Any) -> Path | None:
    """Returns the path of the layer that an equation is, or None."""
    name = mark_of(eqn)
    return None if name is None else tuple(name.split("/"))


def find_junctions(jaxpr: Any, varying: set[Any]) -> dict[int, Junction]:
    """Returns, by equation number of a marked layer, where its output is added to something that does not depend on it.

    Layers whose output goes elsewhere first (a nonlinearity, two users, a norm that mixes channels) have none. Where two layers
    meet in one sum (a block's last convolution and a projected shortcut), the first one answers for the other.
    """
    users: dict[Any, list[int]] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for var in {v for v in eqn.invars if not isinstance(v, core.Literal)}:
            users.setdefault(var, []).append(number)
    ends = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    found: dict[int, Junction] = {}
    answered: set[int] = set()
    for number, eqn in enumerate(jaxpr.eqns):
        if mark_of(eqn) is None:
            continue
        var = eqn.outvars[0]
        chain: list[int] = []
        behind = reach(jaxpr, {var})
        while var not in ends and len(users.get(var, ())) == 1:
            after = jaxpr.eqns[users[var][0]]
            name = after.primitive.name
            others = [v for v in after.invars if v is not var]
            fixed = [isinstance(v, core.Literal) or v not in varying for v in others]
            if (
                name in MOVES
                or (name in ("mul", "add", "add_any", "sub") and fixed == [True])
                or (name == "div" and fixed == [True] and after.invars[0] is var)
            ):
                pass
            elif name in ("add", "add_any", "sub") and len(others) == 1 and others[0] not in behind:
                if users[var][0] not in answered:
                    sign = 1.0 if name != "sub" else -1.0
                    found[number] = Junction(tuple(chain), var, others[0], sign)
                    answered.add(users[var][0])
                break
            else:
                break
            chain.append(users[var][0])
            var = after.outvars[0]
    return found


def _correction(
    jaxpr: Any, junction: Junction, start: Any, read: Callable[[Any], Any], other: Any
) -> Callable[[Any, Callable[[Any], Any]], Any]:
    """Returns (y, change) ↦ δ with L(y + δ) ± q = L(y) ± (q + change(q)) where L can: channels that L mutes get 0.

    L is a scaling by a and a rearrangement, so its inverse is Lᵀ(· / a²).
    """

    def chain(y: Any) -> Any:
        env = {start: y}
        for number in junction.chain:
            eqn = jaxpr.eqns[number]
            values = [v.val if isinstance(v, core.Literal) else env[v] if v in env else read(v) for v in eqn.invars]
            env[eqn.outvars[0]] = bind(eqn, values)[0]
        return env[junction.end]

    def correct(y: Any, change: Callable[[Any], Any]) -> Any:
        _, scale = jax.jvp(chain, (y,), (jnp.ones_like(y),))
        size = jnp.abs(scale)
        heard = size > 1e-3 * size.max()
        wanted = junction.sign * change(other)
        _, back = jax.vjp(chain, y)
        return back(jnp.where(heard, wanted / jnp.where(heard, scale, 1.0) ** 2, 0.0).astype(scale.dtype))[0]

    return correct


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def walk(closed: core.ClosedJaxpr, args: Sequence[Any], varying: Sequence[bool], visit: Visitor) -> Any:
    """Evaluates the equations, handing each marked layer that depends on the images to `visit`.

    Args:
      closed: from `trace`.
      args: its inputs.
      varying: which of them are the images.
      visit: Call ↦ (output of the layer, what is to be kept of it: a tree of arrays or None).

    Returns:
      (outputs, {layer path: what was kept}); layers inside a loop are kept stacked.

    Raises:
      SiteError: for a marked layer inside a branch or a `while` loop.
    """
    jaxpr = closed.jaxpr
    moving = varying_vars(jaxpr, varying)
    junctions = find_junctions(jaxpr, moving)
    producer = {var: number for number, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    layers = {path: eqn for eqn in jaxpr.eqns if (path := _path(eqn)) is not None}
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    done: set[int] = set()
    kept: dict[Path, Any] = {}

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom.val
        if atom not in env:
            need(atom)
        return env[atom]

    def need(var: Any) -> None:
        """Evaluates what `var` needs and has not been evaluated yet, in order."""
        wanted, seen = [producer[var]], set()
        while wanted:
            number = wanted.pop()
            if number in done or number in seen:
                continue
            seen.add(number)
            wanted += [
                producer[v] for v in jaxpr.eqns[number].invars if not isinstance(v, core.Literal) and v not in env
            ]
        for number in sorted(seen):
            evaluate(number)

    def leaves_of(path: Path) -> Tree:
        eqn = layers[path]
        *leaves, _ = [read(v) for v in eqn.invars]
        return _unflatten(eqn, leaves)

    def evaluate(number: int) -> None:
        if number in done:
            return
        done.add(number)
        eqn = jaxpr.eqns[number]
        values = [read(v) for v in eqn.invars]
        if (path := _path(eqn)) is not None and eqn.invars[-1] in moving:
            *leaves, x = values
            correction = None
            if number in junctions:
                junction = junctions[number]
                correction = _correction(jaxpr, junction, eqn.outvars[0], read, read(junction.other))

            def apply(tree: Tree, x: Any) -> Any:
                inner = eqn.params["jaxpr"]
                flat = [tree[name] for name in sorted(tree)]
                return jax.jit(core.jaxpr_as_fun(inner))(*flat, x)[0]

            out, keep = visit(Call(path, x, _unflatten(eqn, leaves), apply, leaves_of, correction))
            outs = [out]
            if keep is not None:
                kept[path] = keep
        elif (inner := body_of(eqn)) is not None and holds_mark(inner.jaxpr):
            outs, below = _walk_loop(eqn, values, [_moves(v, moving) for v in eqn.invars], visit)
            kept.update(below)
        else:
            outs = bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))

    for number in range(len(jaxpr.eqns)):
        evaluate(number)
    return [read(v) for v in jaxpr.outvars], kept


def _moves(atom: Any, moving: set[Any]) -> bool:
    return not isinstance(atom, core.Literal) and atom in moving


def _unflatten(eqn: Any, leaves: Sequence[Any]) -> Tree:
    names = ("kernel",) if len(leaves) == 1 else ("bias", "kernel")  # the order in which a tree is flattened
    del eqn
    return dict(zip(names, leaves, strict=True))


def _walk_loop(
    eqn: Any, values: Sequence[Any], varying: Sequence[bool], visit: Visitor
) -> tuple[list[Any], Mapping[Path, Any]]:
    """Walks the body of a `scan` in a scan of its own; what is kept comes out stacked."""
    if eqn.primitive.name != "scan":
        raise SiteError(
            f"A selected layer runs inside {eqn.primitive.name}, where its features cannot be followed; narrow sites.pattern."
        )
    p = eqn.params
    fixed, carried = p["num_consts"], p["num_carry"]
    consts, start, xs = values[:fixed], values[fixed : fixed + carried], values[fixed + carried :]
    body = inline(p["jaxpr"])
    flags = [*varying[:fixed], *[True] * carried, *varying[fixed + carried :]]

    def step(carry: Any, x: Any) -> Any:
        outs, kept = walk(body, [*consts, *carry, *x], flags, visit)
        return outs[:carried], (outs[carried:], kept)

    carry, (ys, kept) = jax.lax.scan(step, start, xs, length=p["length"], reverse=p["reverse"])
    return [*carry, *ys], kept
