"""A traced backbone cut at its sites: stretches of equations, each a short program of its own.

Solving goes from site to site, see `drep_jax.core.measured`. A *cut* lies before the first call of
a site's layers. Between two cuts lies a *stretch*. It reads what is alive at its beginning, the
fused layers in it and some parameters, and gives what is alive at its end. Stretches with equal
equations and shapes have equal keys and share one compiled program.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from drep_jax.core.interpreter import Junction, Program, correction, find_junctions, layer_of, tree_of
from drep_jax.core.jaxpr import VALID, bind, bodies, live_equations, mark_of, reach, varying_vars
from drep_jax.core.order import Order, Place, Start
from drep_jax.core.working import bytes_of
from drep_jax.typing import Path, Tree

SMALL = 2**16
"""Bytes up to which what depends on parameters alone is computed anew in each stretch."""


SLICING = ("slice", "dynamic_slice", "gather", "squeeze", "split")
"""Primitives that take parameters apart; inside a stretch the index would make it unlike others."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stretch:
    """Equations that run together.

    Attributes:
      eqns: in order, those of parameters alone first; and whether each is a layer to be fused.
      places: of the marked layers among them, in order.
      live: variables that it reads and that depend on the images.
      fixed: variables that it reads and that do not.
      outputs: variables that it gives.
      key: text that is equal for stretches that compute the same of different inputs.
    """

    eqns: tuple[tuple[Any, bool], ...]
    places: tuple[Place, ...]
    live: tuple[Any, ...]
    fixed: tuple[Any, ...]
    outputs: tuple[Any, ...]
    key: str

    def run(
        self, live: Sequence[Any], fixed: Sequence[Any], apply: Callable[[int, Any], Any] | None = None
    ) -> list[Any]:
        """Evaluates the equations.

        Args:
          live, fixed: values of the variables.
          apply: (index of a marked layer in `places`, its input) ↦ its output; needed where
            there are such layers.
        """
        env: dict[Any, Any] = dict(zip([*self.live, *self.fixed], [*live, *fixed], strict=True))
        layers = 0
        for eqn, fused in self.eqns:
            if fused and apply is not None:
                outs = [apply(layers, env[eqn.invars[-1]])]
                layers += 1
            else:
                outs = bind(eqn, [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [env[v] for v in self.outputs]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a site's first layer.

    Attributes:
      x: variable that holds the layer's input.
      y: variable that holds its output; of interest are shape and type.
      valid: variables that say which feature vectors count, one for each part of the layer; () if
        all do.
      other: variable that holds the shortcut q, or None if the call is in no residual sum.
      chain: the stretch from y to L(y), or None.
      sign: of q in the sum.
    """

    x: Any
    y: Any
    valid: tuple[Any, ...] = ()
    other: Any = None
    chain: Stretch | None = None
    sign: float = 1.0

    @property
    def wanted(self) -> tuple[Any, ...]:
        """Variables that solving needs."""
        return (self.x, *self.valid, *(() if self.other is None else (self.other,)))

    def correction(self, fixed: Sequence[Any], change: Any) -> Any:
        """Returns the change of y that changes the sum as `change` of q does, see `correction`."""
        zeros = jnp.zeros(self.y.aval.shape, self.y.aval.dtype)
        return correction(
            lambda y: y if self.chain is None else self.chain.run([y], fixed)[0], zeros, self.sign * change
        )


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a site is solved.

    Attributes:
      place: of its first layer.
      calls: all calls of it.
      live: variables that depend on the images, are computed before it and needed at it or later.
      ahead: what computes the inputs of the calls that depend on the layer's own output, from the
        layers as they are here; None if there are none.
    """

    place: Place
    calls: tuple[Call, ...]
    live: tuple[Any, ...]
    ahead: Stretch | None = None


class Network:
    """The equations of a backbone, in the order in which its sites are solved.

    Attributes:
      cuts: one for each site and copy, in order.
      stretches: one more than cuts; number i ends at cut i, and the last one at the outputs.
      leaves: {place: variables of the layer's parameters}, of every marked layer that depends on the
        images.
      layers: {layer path: (leaves, x) ↦ output}.
      image: variable that holds the images.
      arguments: variables that hold what the backbone is given beside them.
      outputs: variables, or literals, that the backbone gives.
    """

    def __init__(
        self, program: Program, first_of: Mapping[Path, Path], junctions: Collection[Path], arguments: int = 0
    ) -> None:
        """Cuts a program.

        Args:
          program: from `trace`; its last input are the images, those before it `arguments`.
          first_of: {path of a layer: that of the first layer of its site}.
          junctions: paths of the layers whose residual sums are of interest.
          arguments: number of what the backbone is given beside the images.
        """
        self._jaxpr, self._consts, self.layers = program.jaxpr, program.consts, program.layers
        jaxpr = self._jaxpr
        *before, self.image = jaxpr.invars
        self._params, self.arguments = before[: len(before) - arguments], before[len(before) - arguments :]
        self.outputs = tuple(jaxpr.outvars)
        self._producer = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
        self._leaf_inputs = {*jaxpr.invars, *jaxpr.constvars}
        self._varying, self._places = self._find_places(program)
        self._junctions: dict[int, Junction] = {
            index: junction
            for index, junction in find_junctions(jaxpr, self._varying).items()
            if index in self._places and self._places[index][0] in junctions and self._varies(junction.other)
        }
        self.leaves = {place: tuple(jaxpr.eqns[index].invars[:-1]) for index, place in self._places.items()}
        self._needed_fixed: dict[Any, None] = {}
        first_layers = set(first_of.values())
        calls = {index: self._call(index) for index, (path, _) in self._places.items() if path in first_layers}
        wanted = {index: call.wanted for index, call in calls.items()}
        self._need([v for leaves in self.leaves.values() for v in leaves])
        self._need([*jaxpr.outvars, *(v for variables in wanted.values() for v in variables)])
        self._order = Order(jaxpr, self._varying, self._places, first_of, wanted.__getitem__)
        order, starts = self._order.indices, self._order.starts
        bounds = [0, *(start.position for start in starts), len(order)]
        self._pieces = [order[first:end] for first, end in itertools.pairwise(bounds)]
        ready = [[v for call in start.calls if call not in start.ahead for v in wanted[call]] for start in starts]
        alive = self._alive(ready)
        self.stretches = tuple(self._stretch(piece, alive[number + 1]) for number, piece in enumerate(self._pieces))
        self.cuts = tuple(self._cut(start, calls, alive[number + 1]) for number, start in enumerate(starts))

    def _find_places(self, program: Program) -> tuple[set[Any], dict[int, Place]]:
        """Returns the variables that depend on the images, and the marked layers that do, by the index of their equation.

        If one call of a layer depends on the images, all do that an output depends on: what they compute changes
        when the layer is fused.
        """
        jaxpr = self._jaxpr
        found = {index: place for index, eqn in enumerate(jaxpr.eqns) if (place := layer_of(eqn)) is not None}
        found = {index: (path, copy if path in program.stacked else None) for index, (path, copy) in found.items()}
        count = len(self._params)
        varying = varying_vars(jaxpr, [False] * count + [True] * (len(jaxpr.invars) - count))
        live = live_equations(jaxpr)
        while True:
            moves = {index for index in found if jaxpr.eqns[index].invars[-1] in varying}
            moving = {found[index] for index in moves}
            places = {i: place for i, place in found.items() if i in moves or (i in live and place in moving)}
            outputs = {jaxpr.eqns[index].outvars[0] for index in places}
            if outputs <= varying:
                return varying, places
            varying = reach(jaxpr, varying | outputs)

    def _varies(self, atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and atom in self._varying

    def _need(self, atoms: Iterable[Any]) -> None:
        """Notes what is computed of parameters alone and read outside of stretches."""
        self._needed_fixed |= {
            v: None
            for v in atoms
            if not isinstance(v, core.Literal) and v not in self._varying and v not in self._leaf_inputs
        }

    def _alive(self, ready: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Returns what is alive before each stretch and after the last one, in order of computation.

        Args:
          ready: variables that solving needs at each cut.
        """
        eqns = self._jaxpr.eqns
        needed = dict.fromkeys(v for v in self._jaxpr.outvars if self._varies(v))
        alive = [tuple(needed)]
        for piece, solving in zip(self._pieces[::-1], [*ready[::-1], ()], strict=True):
            for var in (v for i in piece for v in eqns[i].outvars):
                needed.pop(var, None)
            used = [*(v for i in piece for v in eqns[i].invars), *solving]
            inside = {v for i in piece for v in eqns[i].outvars}
            needed |= dict.fromkeys(v for v in used if self._varies(v) and v not in inside)
            alive.append(tuple(sorted(needed, key=self._when)))
        return alive[::-1]

    def _when(self, var: Any) -> int:
        """Returns the index of the equation that computes a variable; −1 for the images."""
        return self._producer.get(var, -1)

    def _call(self, index: int) -> Call:
        eqn = self._jaxpr.eqns[index]
        call = Call(eqn.invars[-1], eqn.outvars[0], self._valid(eqn.invars[-1]))
        if (junction := self._junctions.get(index)) is None:
            return call
        if junction.chain:
            chain = self._stretch(junction.chain, [junction.end])
        else:
            chain = Stretch((), (), (call.y,), (), (call.y,), "")
        return dataclasses.replace(call, other=junction.other, chain=chain, sign=junction.sign)

    def _valid(self, x: Any) -> tuple[Any, ...]:
        """Returns the variables that say which rows of a layer's input count, from the mark before it."""
        eqn = self._jaxpr.eqns[self._producer[x]] if x in self._producer else None
        return tuple(eqn.invars[1:]) if eqn is not None and (mark_of(eqn) or "").startswith(VALID) else ()

    def _cut(self, start: Start, calls: Mapping[int, Call], alive: tuple[Any, ...]) -> Cut:
        cut = Cut(start.place, tuple(calls[index] for index in start.calls), alive)
        if not start.ahead:
            return cut
        wanted = [v for index in start.ahead for v in calls[index].wanted]
        piece = self._order.before(wanted, self._order.indices[: start.position])
        return dataclasses.replace(cut, ahead=self._stretch(piece, dict.fromkeys(wanted)))

    def _stretch(self, piece: Sequence[int], wanted: Iterable[Any]) -> Stretch:
        """Makes a stretch of varying equations, with what it needs of parameters alone."""
        eqns = self._jaxpr.eqns
        inside = {v for i in piece for v in eqns[i].outvars}
        live: dict[Any, None] = {}
        fixed: dict[Any, None] = {}
        helpers: set[int] = set()
        pending: list[Any] = []
        for index in piece:
            marked = index in self._places
            for v in eqns[index].invars[-1:] if marked else eqns[index].invars:
                if self._varies(v):
                    live |= {} if v in inside else {v: None}
                elif not isinstance(v, core.Literal):
                    pending.append(v)
        while pending:
            var = pending.pop(0)
            if var in self._leaf_inputs or self._is_computed_once(var):
                fixed[var] = None
                if var not in self._leaf_inputs:
                    self._needed_fixed[var] = None
            elif (producer := self._producer[var]) not in helpers:
                helpers.add(producer)
                pending += [v for v in eqns[producer].invars if not isinstance(v, core.Literal)]
        rows = [*sorted(helpers), *piece]
        outputs = tuple(v for v in wanted if v in inside)
        places = tuple(self._places[i] for i in piece if i in self._places)
        listing = tuple((eqns[i], i in self._places) for i in rows)
        key = _key(listing, [*live, *fixed], outputs)
        return Stretch(listing, places, tuple(live), tuple(fixed), outputs, key)

    def _is_computed_once(self, var: Any) -> bool:
        """Returns whether a fixed variable is computed before all stretches, and not again in each."""
        eqn = self._jaxpr.eqns[self._producer[var]]
        inputs = [v for v in eqn.invars if not isinstance(v, core.Literal)]
        if not inputs:
            return False
        if eqn.primitive.name in SLICING:
            return True
        size = bytes_of(var)
        grows = eqn.primitive.name == "broadcast_in_dim" and size > max(map(bytes_of, inputs))
        return size > SMALL and not grows

    def fixed_values(self, args: Sequence[Any]) -> dict[Any, Any]:
        """Returns the value of every variable that stretches and layers need and no image changes.

        Args:
          args: the leaves of the variables.
        """
        jaxpr = self._jaxpr
        known = dict(zip([*jaxpr.constvars, *self._params], [*self._consts, *args], strict=True))
        wanted = list(self._needed_fixed)
        if not wanted:
            return known
        needed: set[int] = set()
        pending = list(wanted)
        while pending:
            index = self._producer.get(pending.pop())
            if index is not None and index not in needed:
                needed.add(index)
                pending += [v for v in jaxpr.eqns[index].invars if not isinstance(v, core.Literal)]
        used = {v for i in needed for v in jaxpr.eqns[i].invars if not isinstance(v, core.Literal)}
        inputs = [v for v in known if v in used]

        def compute(*values: Any) -> list[Any]:
            env = dict(zip(inputs, values, strict=True))
            for index in sorted(needed):
                eqn = jaxpr.eqns[index]
                outs = bind(eqn, [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars])
                env.update(zip(eqn.outvars, outs, strict=True))
            return [env[v] for v in wanted]

        return {**known, **dict(zip(wanted, jax.jit(compute)(*(known[v] for v in inputs)), strict=True))}

    def working_bytes(self) -> int:
        """Returns the bytes that the largest stretch holds at once of what depends on the images."""
        largest = 0
        ahead = [cut.ahead for cut in self.cuts if cut.ahead is not None]
        for stretch in [*self.stretches, *ahead]:
            eqns = [eqn for eqn, _ in stretch.eqns if any(map(self._varies, eqn.outvars))]
            last = {v: number for number, eqn in enumerate(eqns) for v in eqn.invars if self._varies(v)}
            last |= dict.fromkeys(stretch.outputs, len(eqns))
            ends: dict[int, set[Any]] = {}
            for var, number in last.items():
                ends.setdefault(number, set()).add(var)
            alive = sum(map(bytes_of, stretch.live))
            for number, eqn in enumerate(eqns):
                alive += sum(map(bytes_of, eqn.outvars))
                largest = max(largest, alive)
                alive -= sum(map(bytes_of, ends.get(number, set())))
                alive -= sum(bytes_of(v) for v in eqn.outvars if v not in last)
        return largest


def _key(rows: Sequence[tuple[Any, bool]], inputs: Sequence[Any], outputs: Sequence[Any]) -> str:
    """Returns equations as text, with variables numbered in order of appearance.

    Args:
      rows: (equation, whether it is a marked layer, whose own parameters are left out).
      inputs, outputs: variables.
    """
    numbers: dict[Any, int] = {}

    def name(atom: Any) -> str:
        if isinstance(atom, core.Literal):
            value = np.asarray(atom.val)
            return f"{value.dtype}{value.shape}{value.tobytes().hex()}"
        return f"v{numbers.setdefault(atom, len(numbers))}"

    lines = [f"{name(v)}:{v.aval}" for v in inputs]
    for eqn, marked in rows:
        params = {k: v for k, v in eqn.params.items() if not (marked and k == "name")}
        atoms = " ".join(name(v) for v in (eqn.invars[-1:] if marked else eqn.invars))
        if marked:
            atoms += " of " + " ".join(str(v.aval) for v in eqn.invars[:-1])
        outs = " ".join(f"{name(v)}:{v.aval}" for v in eqn.outvars)
        lines.append(f"{outs} = {eqn.primitive.name} {atoms} {params} {_constants(eqn)}")
    return "\n".join([*lines, *map(name, outputs)])


def _constants(eqn: Any) -> list[int]:
    """Returns identities of the arrays that programs inside an equation hold: text does not show them."""
    held = [
        id(const)
        for value in jax.tree_util.tree_leaves(
            list(eqn.params.values()), is_leaf=lambda v: isinstance(v, core.ClosedJaxpr)
        )
        if isinstance(value, core.ClosedJaxpr)
        for const in value.consts
    ]
    return held + [number for body in bodies(eqn) for inner in body.eqns for number in _constants(inner)]


def name_of(place: Place) -> str:
    """Returns a place as text."""
    path, copy = place
    return "/".join(path) if copy is None else f"{'/'.join(path)}[{copy}]"


def parameters(place_leaves: Sequence[Any], values: dict[Any, Any]) -> Tree:
    """Returns a layer's parameters as NumPy arrays."""
    return tree_of([np.asarray(v.val if isinstance(v, core.Literal) else values[v]) for v in place_leaves])
