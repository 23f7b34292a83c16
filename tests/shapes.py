"""The type checker of the tests: beartype, with ints where floats are expected, as Python's typing allows."""

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


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Calls as a user makes them, without the checker: for arguments that the function itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
