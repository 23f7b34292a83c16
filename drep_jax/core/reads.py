"""Which parameters a forward pass reads, and how often: what a fused layer may rely on.

Fusing changes a layer's kernel and bias. That changes the network as intended only if the layer
reads these leaves as they are, and nothing else reads them. A traced program shows both. It is
followed from its parameters, through calls, loops and branches, to the equations that read them;
what no output depends on is not counted.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from drep_jax.core.jaxpr import bodies, body_of, name_of
from drep_jax.typing import Path

UNCHANGED = ("copy", "copy_p", "sharding_constraint", "optimization_barrier")
"""Primitives whose results are their operands."""


class Marked(NamedTuple):
    """A layer whose calls are marked.

    Attributes:
      leaves: paths of its kernel and bias, in tree order.
      shapes: of its inputs where it is called.
    """

    leaves: tuple[Path, ...]
    shapes: set[tuple[int, ...]]


class Leaf(NamedTuple):
    """A parameter on its way through a program.

    Attributes:
      path: of the parameter.
      sliced: product of the lengths of the loops that have sliced its first axes.
    """

    path: Path
    sliced: int = 1


@dataclasses.dataclass
class Use:
    """How a layer is used in one forward pass.

    Attributes:
      calls: number of calls of each copy.
      changed: whether a call gets leaves that are not its own, as they are.
      branch: whether a call stands in a branch or a `while` loop.
      spread: shapes of inputs that differ from those where the layer was called: `nn.vmap` has
        added an axis.
    """

    calls: int = 0
    changed: bool = False
    branch: bool = False
    spread: list[tuple[int, ...]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Reads:
    """Who reads the parameters in one forward pass.

    Attributes:
      uses: {mark of a layer: its use}.
      elsewhere: parameters that are read outside of the calls of their layers.
    """

    uses: dict[str, Use]
    elsewhere: set[Path]


def find_reads(jaxpr: Any, leaves: Sequence[Path | None], layers: Mapping[str, Marked]) -> Reads:
    """Follows the parameters of a program to the equations that read them.

    Args:
      jaxpr: the program, in which layers are marked calls of (leaves in tree order, input).
      leaves: path of the parameter that each of its inputs is, or None.
      layers: {name of a mark: the layer}.
    """
    reads = Reads({name: Use() for name in layers}, set())
    _follow(
        jaxpr,
        [None if path is None else Leaf(path) for path in leaves],
        [True] * len(jaxpr.outvars),
        _Place(1, False),
        layers,
        reads,
    )
    return reads


class _Place(NamedTuple):
    times: int
    branch: bool


def _follow(
    jaxpr: Any, inputs: Sequence[Leaf | None], live: Sequence[bool], place: _Place, layers: Any, reads: Reads
) -> list[Leaf | None]:
    """Follows one program; returns which leaf each of its outputs is, as it was."""
    leaves: dict[Any, Leaf | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def leaf_of(atom: Any) -> Leaf | None:
        return None if isinstance(atom, core.Literal) else leaves.get(atom)

    for eqn, out_live in _live(jaxpr, live):
        operands = [leaf_of(atom) for atom in eqn.invars]
        name = name_of(eqn)
        if name is not None and name in layers:
            _call(eqn, operands, place, layers[name], reads.uses[name], reads)
            continue
        for var, leaf in zip(eqn.outvars, _pass_on(eqn, operands, out_live, place, layers, reads), strict=True):
            leaves[var] = leaf
    return [leaf_of(atom) for atom in jaxpr.outvars]


def _call(eqn: Any, operands: Sequence[Leaf | None], place: _Place, layer: Marked, use: Use, reads: Reads) -> None:
    """Records the call of a layer: (leaves, input)."""
    *weights, x = operands
    if x is not None:
        reads.elsewhere.add(x.path)
    if [None if leaf is None else leaf.path for leaf in weights] != [*layer.leaves]:
        use.changed = True
        reads.elsewhere.update(leaf.path for leaf in weights if leaf is not None and leaf.path not in layer.leaves)
    use.calls += place.times // (weights[-1].sliced if weights and weights[-1] is not None else 1)
    use.branch = use.branch or place.branch
    shape = eqn.invars[-1].aval.shape
    if tuple(shape) not in layer.shapes:
        use.spread.append(tuple(shape))


def _pass_on(
    eqn: Any, operands: Sequence[Leaf | None], live: Sequence[bool], place: _Place, layers: Any, reads: Reads
) -> Sequence[Leaf | None]:
    """Follows leaves through an equation; returns which leaf each of its outputs is."""
    nothing: list[Leaf | None] = [None] * len(eqn.outvars)
    primitive, params = eqn.primitive.name, eqn.params
    if primitive in UNCHANGED and len(operands) == len(nothing):
        return operands
    if primitive == "scan":
        first, count = params["num_consts"], params["num_carry"]
        length = params["length"]
        sliced = [leaf and Leaf(leaf.path, leaf.sliced * length) for leaf in operands[first + count :]]
        reads.elsewhere.update(leaf.path for leaf in operands[first : first + count] if leaf is not None)
        inner = [*operands[:first], *[None] * count, *sliced]
        inner_live = [*[True] * count, *live[count:]]
        _follow(params["jaxpr"].jaxpr, inner, inner_live, _Place(place.times * length, place.branch), layers, reads)
        return nothing
    if primitive == "cond":
        for branch in params["branches"]:
            _follow(branch.jaxpr, operands[1:], live, _Place(place.times, True), layers, reads)
        return nothing
    if primitive == "while":
        first, second = params["cond_nconsts"], params["body_nconsts"]
        carry: list[Leaf | None] = [None] * (len(operands) - first - second)
        reads.elsewhere.update(leaf.path for leaf in operands[first + second :] if leaf is not None)
        for body, consts in (
            (params["cond_jaxpr"], operands[:first]),
            (params["body_jaxpr"], operands[first : first + second]),
        ):
            inside = body.jaxpr
            _follow(inside, [*consts, *carry], [True] * len(inside.outvars), _Place(place.times, True), layers, reads)
        return nothing
    body = body_of(eqn)
    if body is not None and len(body.jaxpr.invars) == len(operands) and len(body.jaxpr.outvars) == len(nothing):
        return _follow(body.jaxpr, operands, live, place, layers, reads)
    reads.elsewhere.update(leaf.path for leaf in operands if leaf is not None)
    for inside in bodies(eqn):  # whatever it does with them
        unknown: list[Leaf | None] = [None] * len(inside.invars)
        _follow(inside, unknown, [True] * len(inside.outvars), _Place(place.times, True), layers, reads)
    return nothing


def _live(jaxpr: Any, live: Sequence[bool]) -> Iterator[tuple[Any, list[bool]]]:
    """Yields the equations that the live outputs depend on, each with which of its outputs are live."""
    needed = {v for v, wanted in zip(jaxpr.outvars, live, strict=True) if wanted and not isinstance(v, core.Literal)}
    result = []
    for eqn in reversed(jaxpr.eqns):
        out_live = [var in needed for var in eqn.outvars]
        if any(out_live) or eqn.effects:
            needed.update(v for v in eqn.invars if not isinstance(v, core.Literal))
            result.append((eqn, out_live))
    yield from reversed(result)
