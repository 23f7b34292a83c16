"""Which tensors a layer's input is a concatenation of, along its channels.

A decoder reads features of several stages side by side. One denoiser over all of them mixes what
has little in common, and grows with the square of their sum; one a source is small and well
conditioned. The sources are found in the traced equations: the `concatenate` that feeds the layer.

Slices of one tensor are one source. Swin's patch merging reads four of them, which is a window and
no concatenation of sources.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core

from drep_jax.core.jaxpr import bodies, body_of, mark_of

SAME = ("copy", "copy_p", "convert_element_type", "sharding_constraint", "optimization_barrier")
"""Primitives that leave every entry where it is."""


RESHAPED = ("reshape", "squeeze", "expand_dims", "transpose")
"""Primitives that rearrange entries; channels stay if the last axis does."""


TAKEN = ("slice", "dynamic_slice", "gather", "split", "rev", "pad")
"""Primitives whose result is part of one tensor."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor on its way through the equations; slices of it are the same source."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """What a variable holds.

    Attributes:
      pieces: (source, channels) along its last axis.
    """

    pieces: tuple[tuple[_Tensor, int], ...]


def find_sources(jaxpr: Any) -> dict[str, tuple[int, ...]]:
    """Returns the channels of each source of the inputs of marked layers.

    Args:
      jaxpr: a program in which layers are marked calls, whose last operand is the layer's input.

    Returns:
      {name of a mark: channels of its sources, in order}; without layers that read no concatenation,
      or not the same one in every call.
    """
    seen: dict[str, set[tuple[int, ...]]] = {}
    _follow(jaxpr, [_alone(v) for v in jaxpr.invars], seen)
    return {name: sizes.pop() for name, sizes in seen.items() if len(sizes) == 1 and sizes != {()}}


def _follow(jaxpr: Any, inputs: Sequence[_Value], seen: dict[str, set[tuple[int, ...]]]) -> list[_Value]:
    """Follows a program; returns what its outputs hold."""
    values: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: _alone(v) for v in jaxpr.constvars}

    def value_of(atom: Any) -> _Value:
        return _alone(atom) if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [value_of(atom) for atom in eqn.invars]
        name = mark_of(eqn)
        if name is not None and operands:
            seen.setdefault(name, set()).add(_sizes(operands[-1]))
        values.update(zip(eqn.outvars, _results(eqn, operands, seen, marked=name is not None), strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _results(
    eqn: Any, operands: Sequence[_Value], seen: dict[str, set[tuple[int, ...]]], *, marked: bool
) -> Sequence[_Value]:
    """Returns what the outputs of an equation hold."""
    name = eqn.primitive.name
    fresh = [_alone(v) for v in eqn.outvars]
    if marked or not operands:
        return fresh
    if name in SAME and len(fresh) == len(operands):
        return operands
    shape = getattr(eqn.invars[0].aval, "shape", ())
    if name in RESHAPED and shape and eqn.outvars[0].aval.shape[-1:] == shape[-1:]:
        kept = name != "transpose" or eqn.params["permutation"][-1] == len(shape) - 1
        return operands[:1] if kept else fresh
    if name in TAKEN and len({tensor for tensor, _ in operands[0].pieces}) == 1:
        tensor = operands[0].pieces[0][0]
        return [_Value(((tensor, _channels(v)),)) for v in eqn.outvars]
    if name == "concatenate" and eqn.params["dimension"] == len(shape) - 1:
        return [_Value(tuple(piece for value in operands for piece in value.pieces))]
    body = body_of(eqn)
    if body is not None and name != "scan" and _fits(body.jaxpr, eqn):
        return _follow(body.jaxpr, operands, seen)
    for inside in bodies(eqn):
        _follow(inside, [_alone(v) for v in inside.invars], seen)
    return fresh


def _fits(jaxpr: Any, eqn: Any) -> bool:
    return len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)


def _sizes(value: _Value) -> tuple[int, ...]:
    """Returns the channels of each source; adjacent pieces of one tensor are one source."""
    sizes = [sum(size for _, size in group) for _, group in itertools.groupby(value.pieces, key=lambda piece: piece[0])]
    return tuple(sizes) if len(sizes) > 1 else ()


def _alone(atom: Any) -> _Value:
    return _Value(((_Tensor(), _channels(atom)),))


def _channels(atom: Any) -> int:
    shape: Mapping[str, Any] | tuple[int, ...] = getattr(atom.aval, "shape", ())
    return int(shape[-1]) if shape else 1  # type: ignore[index]
