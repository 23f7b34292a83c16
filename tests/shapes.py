"""The type checker of the tests: beartype, with ints where floats are expected, as Python's typing allows.

The tests of the core and the finished job run under it; in other jobs it took a sixth of the time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[Any, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks a function's annotations when it is called; for `install_import_hook`.

    A function inside another is defined anew at every call of the outer one. Its checker is made
    once, because beartype takes some milliseconds for each.
    """
    hints = tuple(function.__annotations__.items())
    key = (function.__module__, function.__qualname__, hints)
    try:
        return _checked[key]
    except KeyError:
        return _checked.setdefault(key, _check(function))
    except TypeError:  # a hint that cannot be hashed
        return _check(function)


_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_if_checking(*arguments: Any, **options: Any) -> Any:
    """Leaves a function as it is while nothing is checked: one inside another is decorated at every call of the outer."""
    if jaxtyping.config.jaxtyping_disable:
        return lambda function: function
    return _jaxtyped(*arguments, **options)


def install() -> None:
    """Checks what the annotations of the core state at every call; before anything imports the core."""
    jaxtyping.jaxtyped = _jaxtyped_if_checking
    jaxtyping.install_import_hook("drep_jax.core", f"{__name__}.checked")


@contextlib.contextmanager
def checking(enabled: bool = True) -> Iterator[None]:
    """Checks calls inside, or does not, and then as before."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", not enabled)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def unchecked() -> contextlib.AbstractContextManager[None]:
    """Calls as a user makes them, without the checker: for arguments that the function itself refuses."""
    return checking(False)
