"""Layers that no output depends on: an auxiliary head in evaluation mode."""

from typing import Any

import flax.linen as nn
import jax

from drep_jax.core.reads import find_reads
from drep_jax.typing import Path, Tree


def find_idle(module: nn.Module, variables: Tree, *args: Any, **kwargs: Any) -> tuple[Path, ...]:
    """Returns the paths of the layers of a tree that its outputs do not depend on.

    They are the nodes of the parameters with a leaf `kernel` that no equation behind an output reads.
    Nothing is denoised there, and fusing leaves them as they are.

    Args:
      module: an unbound Linen module, called as for inference.
      variables: of the module, or their shapes.
      *args: its inputs, arrays or `jax.ShapeDtypeStruct`.
      **kwargs: passed on, not traced.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         auxiliary = nn.Dense(2, name="auxiliary")(x)
    ...         return nn.Dense(2, name="head")(x)
    >>> x = jnp.ones((1, 3))
    >>> find_idle(Net(), Net().init(jax.random.key(0), x), x)
    (('auxiliary',),)
    """
    key = jax.random.key(0)

    def forward(variables: Tree, *args: Any) -> Any:
        return module.apply(variables, *args, rngs={"dropout": key}, **kwargs)

    jaxpr = jax.make_jaxpr(forward)(variables, *args).jaxpr
    paths: list[Path | None] = [
        tuple(str(getattr(part, "key", part)) for part in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    ]
    reads = find_reads(jaxpr, [*paths, *[None] * (len(jaxpr.invars) - len(paths))], {}).elsewhere
    kernels = [path for path in paths if path is not None and path[0] == "params" and path[-1] == "kernel"]
    return tuple(path[1:-1] for path in kernels if path not in reads)
