"""Bytes that features take on a device while a network runs, and how much of them runs at once."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core

from drep_jax.core.jaxpr import bodies, inline, varying_vars
from drep_jax.typing import Tree

WORKING = 2**28
"""Bytes that features may take on a device at once; more images go through one after another."""


def bytes_of(var: Any) -> int:
    """Returns the size of a variable of traced equations."""
    return math.prod(var.aval.shape) * np.dtype(getattr(var.aval, "dtype", np.float32)).itemsize


def forward_bytes(backbone: nn.Module, variables: Tree, images: Any) -> int:
    """Returns the bytes of features that are alive at once in a forward pass, at most.

    Args:
      backbone, variables: the network.
      images: a batch, or its shape and type.
    """
    closed = inline(jax.make_jaxpr(lambda v, x: backbone.apply(v, x))(variables, images))
    count = len(jax.tree_util.tree_leaves(images))
    return _peak(closed.jaxpr, [False] * (len(closed.jaxpr.invars) - count) + [True] * count)


def _peak(jaxpr: Any, inputs: Sequence[bool]) -> int:
    varying = varying_vars(jaxpr, inputs)

    def variables(atoms: Any) -> set[Any]:
        return {v for v in atoms if not isinstance(v, core.Literal) and v in varying}

    last = {v: number for number, eqn in enumerate(jaxpr.eqns) for v in variables(eqn.invars)}
    last |= dict.fromkeys(variables(jaxpr.outvars), len(jaxpr.eqns))
    alive = sum(bytes_of(v) for v in variables(jaxpr.invars))
    largest = alive
    for number, eqn in enumerate(jaxpr.eqns):
        made = variables(eqn.outvars)
        alive += sum(map(bytes_of, made))
        inside = max((_peak(body, [True] * len(body.invars)) for body in bodies(eqn) if made), default=0)
        largest = max(largest, alive + inside)
        alive -= sum(bytes_of(v) for v in variables(eqn.invars) if last[v] == number)
        alive -= sum(bytes_of(v) for v in made if v not in last)
    return largest


def fitting_batch(batch: int, devices: int, image_bytes: float) -> int:
    """Returns the largest part of a batch whose features fit on each device: a divisor of it, so that none are cut.

    Args:
      batch: images over all devices; a multiple of their number.
      devices: their number.
      image_bytes: of the features of one image.

    >>> fitting_batch(64, 2, 2**24), fitting_batch(64, 2, 2**26), fitting_batch(60, 1, 2**30)
    (32, 8, 1)
    """
    most = max(1, int(WORKING // max(1.0, image_bytes)))
    each = batch // devices
    return devices * max(n for n in range(1, each + 1) if each % n == 0 and (n <= most or n == 1))
