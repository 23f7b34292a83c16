"""A backbone as equations with its layers marked, and the residual sums that layers end in.

- `trace` runs a Flax module abstractly and marks every selected layer as one equation, a jitted
  call named after the layer. Loops around such layers are unrolled, so that every copy of a layer
  is an equation of its own.
- `find_junctions` finds residual sums: the output y of a block's last layer meets the shortcut q in
  z = L(y) ± q. L scales channels and rearranges entries (batch normalization at inference, layer
  scale, reshapes). A change of y can then cancel noise in q; `correction` says which.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from drep_jax.core.calls import counted_vectors, positions_of
from drep_jax.core.intercept import place, visit_sites
from drep_jax.core.jaxpr import (
    INLINED,
    PREFIX,
    VALID,
    bind,
    bodies,
    body_of,
    holds_mark,
    mark_name,
    mark_of,
    marked,
    path_of,
    reach,
)
from drep_jax.core.layers import Layer, alone, leaves_of
from drep_jax.core.regression import kind_of
from drep_jax.core.sites import Site
from drep_jax.errors import SiteError
from drep_jax.rows import streams_of
from drep_jax.typing import Path, Tree

COPY = "~2"
"""Between the name of a layer, which cannot contain it, and the index of its copy under `nn.scan`."""


MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "convert_element_type", "neg")
"""Primitives that only rearrange entries, or change their sign or type."""


# ---------------------------------------------------------------------------------------------------------------------
# Equations
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """The equations of a backbone with its layers marked.

    Attributes:
      closed: the program.
      layers: {layer path: (leaves, x) ↦ output}, for inputs of any batch size. The marked equations
        are for one size: what Flax reshapes or pads has numbers of it in them.
      stacked: paths of the layers of which `nn.scan` has a copy for each round.
    """

    closed: core.ClosedJaxpr
    layers: Mapping[Path, Callable[[Tree, Any], Any]]
    stacked: Collection[Path] = ()

    @property
    def jaxpr(self) -> core.Jaxpr:
        """The equations."""
        return self.closed.jaxpr

    @property
    def consts(self) -> Sequence[Any]:
        """Values of the equations' constants."""
        return self.closed.consts


def check_measurable(sites: Sequence[Site]) -> None:
    """Checks that every layer of the sites is called on a batch of features.

    Raises:
      SiteError: listing the layers that measured noise cannot solve, each with the reason.
    """
    spread = dict.fromkeys(layer.name for site in sites for layer in site.layers if layer.spread)
    if spread:
        lines = "\n".join(f"  {name}: nn.vmap spreads its input; call it on the whole batch" for name in spread)
        raise SiteError(
            "Measured noise follows the images of a batch through every layer; narrow sites.pattern, or take another learner "
            f"(Algorithm 1, the closed form) for:\n{lines}"
        )


def trace(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    images: Any,
    kwargs: Mapping[str, Any] | None = None,
    streams: int = 1,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> Program:
    """Returns the equations of a backbone, with every layer of `sites` marked.

    Nested calls are inlined, and loops around marked layers unrolled. Where the network says which
    rows of a layer's input count (`drep_jax.rows`), a mark before the layer holds it.

    Args:
      backbone: an unbound Linen module.
      variables: its variables.
      sites: whose layers are marked.
      images: the batch, or its shape and type.
      kwargs: further arguments of the backbone, such as `train`.
      streams: equal parts of the batch: clean images, then corrupted versions of them. What the
        network says is the clean images' is theirs in all parts.
      arguments: further ones of the backbone with a row for each image, or their shapes and types.

    Returns:
      The program. Its inputs are the leaves of (variables, arguments, images), in tree order.

    Raises:
      SiteError: for a marked layer inside a branch or a `while` loop.
    """
    functions: dict[Path, Callable[[Tree, Any], Any]] = {}

    def mark(site: Site, layer: Layer, module: nn.Module, extra: Any, x: Any, call: Any) -> Any:
        del site, extra, call
        functions[layer.path] = alone(module)
        parts = [(part, part.layers[0], kind_of(part)) for part in sites if part.layers[0].path == layer.path]
        valid = [counted_vectors(*part, x) for part in parts]
        if any(one is not None for one in valid):
            every = [jnp.ones(positions_of(*part, x), bool) for part in parts]
            valid = [all_ if one is None else one for one, all_ in zip(valid, every, strict=True)]
            x = marked(VALID, lambda x, *_: x)(x, *valid)
        return marked(mark_name(layer.path), functions[layer.path])(leaves_of(module), x)

    def forward(variables: Tree, arguments: Mapping[str, Any], images: Any) -> Any:
        options = {**(kwargs or {}), **arguments}
        with streams_of(streams):
            return visit_sites(backbone, variables, sites, _no_extras(sites), mark, images, **options)

    closed = jax.make_jaxpr(forward)(variables, dict(arguments), images)
    flat = jax.make_jaxpr(lambda *args: _flat(closed.jaxpr, closed.consts, args, None))(*closed.in_avals)
    stacked = {layer.path for site in sites for layer in site.layers if layer.stack is not None}
    return Program(flat, functions, stacked)


def _no_extras(sites: Sequence[Site]) -> Tree:
    """Returns the extras of a visitor that needs none; every layer must have one, and with a stack its axis."""
    layers = [layer for site in sites for layer in site.layers]
    return {place(layer): jnp.zeros(() if layer.stack is None else layer.stack) for layer in layers}


def check_batch_axis(
    backbone: nn.Module,
    variables: Tree,
    sites: Sequence[Site],
    image: jax.ShapeDtypeStruct,
    kwargs: Mapping[str, Any] | None = None,
    arguments: Mapping[str, jax.ShapeDtypeStruct] = MappingProxyType({}),
) -> None:
    """Checks that the first axis of every layer's input has an equal number of rows of each image.

    Args:
      backbone, variables, sites, kwargs: see `trace`.
      image: shape of a batch of one.
      arguments: shapes of further arguments of the backbone, likewise.

    Raises:
      SiteError: naming the layer.
    """
    batch = 23  # numbers of tokens or channels are rarely a multiple of it

    def check(site: Site, layer: Layer, module: nn.Module, extra: Any, x: Any, call: Any) -> Any:
        del site, module, extra
        if not x.shape or x.shape[0] % batch:
            raise SiteError(
                f"{layer.name}: the first axis of its input {tuple(x.shape)} is not the batch of {batch} images, so clean and "
                "corrupted features cannot be told apart; narrow sites.pattern."
            )
        return call(x)

    def of_batch(one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *one.shape[1:]), one.dtype)

    def forward(variables: Tree, images: Any, arguments: Any) -> Any:
        options = {**(kwargs or {}), **arguments}
        return visit_sites(backbone, variables, sites, _no_extras(sites), check, images, **options)

    jax.eval_shape(forward, variables, of_batch(image), {name: of_batch(one) for name, one in arguments.items()})


def _flat(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], copy: int | None) -> list[Any]:
    """Evaluates a program with nested calls inlined, and loops around marked layers unrolled."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        inner, name = body_of(eqn), mark_of(eqn)
        if name is not None:
            named = eqn if copy is None else eqn.replace(params={**eqn.params, "name": f"{PREFIX}{name}{COPY}{copy}"})
            outs = bind(named, values)
        elif inner is not None and eqn.primitive.name in INLINED:
            outs = _flat(inner.jaxpr, inner.consts, values, copy)
        elif any(map(holds_mark, bodies(eqn))):
            outs = _unrolled(eqn, values)
        else:
            outs = bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _unrolled(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates the rounds of a `scan` one after another."""
    if eqn.primitive.name != "scan":
        raise SiteError(
            f"A selected layer runs inside {eqn.primitive.name}, where its features cannot be followed; narrow sites.pattern."
        )
    params, body = eqn.params, eqn.params["jaxpr"]
    const_count, carry_count = params["num_consts"], params["num_carry"]
    first_x = const_count + carry_count
    consts, carry, xs = values[:const_count], list(values[const_count:first_x]), values[first_x:]
    rounds: list[Any] = [None] * params["length"]
    for index in range(params["length"])[:: -1 if params["reverse"] else 1]:
        slices = [jax.lax.index_in_dim(x, index, keepdims=False) for x in xs]
        outs = _flat(body.jaxpr, body.consts, [*consts, *carry, *slices], index)
        carry, rounds[index] = outs[:carry_count], outs[carry_count:]
    return [*carry, *(jnp.stack(ys) for ys in zip(*rounds, strict=True))]


def layer_of(eqn: Any) -> tuple[Path, int | None] | None:
    """Returns the path of the layer that an equation computes and the index of its copy, or None."""
    name = mark_of(eqn)
    if name is None or name.startswith(VALID):
        return None
    path, _, copy = name.partition(COPY)
    return path_of(path), int(copy) if copy else None


def tree_of(leaves: Sequence[Any]) -> Tree:
    """Returns a layer's parameters, given in the order in which its equation reads them."""
    names = ("kernel",) if len(leaves) == 1 else ("bias", "kernel")  # as a tree is flattened
    return dict(zip(names, leaves, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Residual sums
# ---------------------------------------------------------------------------------------------------------------------


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
        if layer_of(eqn) is None:
            continue
        var = eqn.outvars[0]
        chain: list[int] = []
        downstream: set[Any] | None = None
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
                chain.append(user)
                var = following.outvars[0]
                continue
            if name in ("add", "add_any", "sub") and len(others) == 1 and user not in claimed:
                downstream = reach(jaxpr, {eqn.outvars[0]}) if downstream is None else downstream
                if others[0] not in downstream:
                    junctions[index] = Junction(tuple(chain), var, others[0], 1.0 if name != "sub" else -1.0)
                    claimed.add(user)
            break
    return junctions


def correction(chain: Callable[[Any], Any], y: Any, change: Any) -> Any:
    """Returns δ, so that L(y + δ) = L(y) + change.

    L scales by a and rearranges, so its inverse is Lᵀ(· / a²). Channels that L mutes get δ = 0.

    Args:
      chain: L.
      y: any array of the shape of the layer's output.
      change: of L(y).
    """
    _, scale = jax.jvp(chain, (y,), (jnp.ones_like(y),))
    size = jnp.abs(scale)
    passed = size > 1e-3 * size.max()
    _, transpose = jax.vjp(chain, y)
    return transpose(jnp.where(passed, change / jnp.where(passed, scale, 1.0) ** 2, 0.0).astype(scale.dtype))[0]
