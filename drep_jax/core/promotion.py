"""Types of numbers are promoted as JAX does by default, whatever the caller has set."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def standard_promotion(function: Callable[P, T]) -> Callable[P, T]:
    """Lets a function mix types of numbers also under `jax_numpy_dtype_promotion=strict`.

    Fusion works in float64 on float32 weights, by intention. The strict mode is for the caller's
    own code.
    """

    @functools.wraps(function)
    def promoting(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return promoting
