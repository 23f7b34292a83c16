"""The arithmetic that a certificate's bound follows: what a network can be widened to, and what it rounds to."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.interceptor import intercepting
from drep_jax.core.jaxpr import bodies, follow
from drep_jax.errors import FusionError
from drep_jax.typing import Tree

SAFETY = 32.0
"""Factor on ε in the bound: in a deep network rounding errors accumulate over layers and sums."""


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """Runs modules that have a `dtype` in float64, however deep in a network they are.

    Recurrent cells make their first state in their `param_dtype`, which is replaced as well.

    A network passes its own `dtype` on to its layers, but a layer may also be given one in the code.
    What the code rounds otherwise, such as by `x.astype(jnp.bfloat16)`, stays; see `rounding`.
    """

    def widen(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module: Any = context.module
        # A recurrent loop asks its cell for the first state by a method that cannot be intercepted.
        parts = [value for value in _values(module).values() if isinstance(value, nn.Module)]
        before = [
            (owner, name, value)
            for owner in (module, *parts)
            for name, value in _values(owner).items()
            if name in ("dtype", "param_dtype") and _is_floating(value)
        ]
        try:
            for owner, name, _ in before:
                object.__setattr__(owner, name, jnp.float64)  # modules are frozen against it
            return next_fun(*args, **kwargs)
        finally:
            for owner, name, value in before:
                object.__setattr__(owner, name, value)

    with intercepting(widen):
        yield


def _values(module: Any) -> dict[str, Any]:
    return {field.name: getattr(module, field.name) for field in dataclasses.fields(module) if field.name != "parent"}


def _is_floating(dtype: Any) -> bool:
    try:
        return dtype is not None and bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def epsilon(dtypes: Iterable[Any]) -> float:
    """Returns the largest ε of the floating types among these, or 0.

    >>> epsilon([np.dtype(np.float32), np.dtype(np.int32)]) == 2.0**-23
    True
    """
    return max((float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)), default=0.0)


def rounding(apply: Callable[[Any, Any], Any], variables: Tree, args: Any) -> Any:
    """Returns the coarsest type that a network rounds its features to.

    Only what depends on the images counts: tables that are the same for all images are rounded
    alike, whatever the weights are.

    Args:
      apply: (variables, args) ↦ outputs.
      variables, args: what it is called with.

    Returns:
      The type, or None if no equation makes a coarser type of a finer one.

    Raises:
      FusionError: if the network cannot be run in the types that it is given.
    """
    coarse: list[Any] = []

    def see(eqn: Any, flags: Sequence[bool]) -> None:
        if bodies(eqn):  # their own equations are seen
            return
        finest = [epsilon([atom.aval.dtype]) for atom, flag in zip(eqn.invars, flags, strict=True) if flag]
        finest = [value for value in finest if value > 0]
        coarse.extend(
            var.aval.dtype
            for var in eqn.outvars
            if finest and hasattr(var.aval, "dtype") and epsilon([var.aval.dtype]) > min(finest)
        )

    try:
        jaxpr = jax.make_jaxpr(apply)(variables, args).jaxpr
    except TypeError as error:  # such as a loop whose state is made in float32
        raise FusionError(
            "The certificate compares in float64, in which this network cannot be run. Make arrays in its code in the type "
            f"of its input, as in jnp.zeros(shape, x.dtype), and not in a fixed one. {str(error).strip().splitlines()[0]}"
        ) from error
    fixed_count = len(jax.tree_util.tree_leaves(variables))
    follow(jaxpr, [index >= fixed_count for index in range(len(jaxpr.invars))], see)
    return max(coarse, key=lambda dtype: epsilon([dtype]), default=None)


def type_name(leaves: Iterable[Any]) -> str:
    """Returns the name of the type that holds all of the leaves' numbers.

    >>> type_name([np.zeros(2, np.float32), np.zeros(2, jnp.bfloat16)])
    'float32'
    """
    dtypes = [np.asarray(leaf).dtype if not isinstance(leaf, jax.Array) else leaf.dtype for leaf in leaves]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = jnp.promote_types(result, dtype)
    return str(np.dtype(result))


def held_line(held: str) -> str:
    """Returns what a network that rounds to the type `held` means for its certificate."""
    return (
        f"The network's code rounds to {held}, so its outputs cannot show float64: they are held to the bound of {held}, and "
        f"each layer by itself to that of float64. For a decisive comparison end to end, take the casts to {held} out of "
        "the code; a field dtype is widened by itself."
    )
