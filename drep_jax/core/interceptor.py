"""`nn.intercept_methods` that ends, also where Python runs without assertions."""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn


@contextlib.contextmanager
def intercepting(interceptor: Any) -> Iterator[None]:
    """Applies an interceptor to all methods of modules while the block runs.

    Flax 0.12 takes it away inside an `assert`, so under `python -O` every later call of a module
    would still go through it.

    Args:
      interceptor: see `flax.linen.intercept_methods`.
    """
    stack = nn.module._global_interceptor_stack
    depth = len(stack)
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        while len(stack) > depth:
            stack.pop()
