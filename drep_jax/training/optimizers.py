"""Optimizers of a stage: kinds, learning rate over the steps, weight decay and rates by parameter."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from drep_jax.errors import ConfigError, lookup
from drep_jax.training import sharded_optimizer
from drep_jax.typing import Tree

Decays = Callable[[Tree], Tree] | None
"""A tree of parameters ↦ whether each decays; None for the optimizer's own choice."""


def _adam(rate: Any, weight_decay: float, decays: Decays) -> optax.GradientTransformation:
    del weight_decay, decays
    return optax.adam(rate)


def _adamw(rate: Any, weight_decay: float, decays: Decays) -> optax.GradientTransformation:
    def matrices(params: Tree) -> Tree:  # as is usual
        return jax.tree_util.tree_map(lambda leaf: leaf.ndim > 1, params)

    return optax.adamw(rate, weight_decay=weight_decay, mask=decays or matrices)


def _sgd(rate: Any, weight_decay: float, decays: Decays, nesterov: bool = True) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(weight_decay, mask=decays)
    return optax.chain(decay, optax.sgd(rate, momentum=0.9, nesterov=nesterov))


OPTIMIZERS: dict[str, Callable[[Any, float, Decays], optax.GradientTransformation]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
    "momentum": functools.partial(_sgd, nesterov=False),
}


def make_schedule(decay: str, learning_rate: float, steps: int, warmup: int = 0, floor: float = 0.0) -> optax.Schedule:
    """Returns step ↦ learning rate: a linear warm-up from 0 to the peak, then the decay to the floor.

    "cosine": floor + (peak − floor)·(1 + cos πx)/2 with x = k/T. "poly:p" is mmsegmentation's
    floor + (peak − floor)·(1 − k/(T − 1))^p. k counts the T steps after the warm-up. "steps:a,b"
    divides the rate by ten at the fractions a and b of all steps, and by no more than to the floor.

    >>> [round(float(make_schedule("poly:1", 1.0, 5, floor=0.2)(k)), 3) for k in range(5)]
    [1.0, 0.8, 0.6, 0.4, 0.2]

    Args:
      decay: "cosine", "poly:POWER" or "steps:FRACTION,…".
      learning_rate: the peak.
      steps: of the stage.
      warmup: of them, those of the warm-up.
      floor: last learning rate.

    Raises:
      ConfigError: for an unknown decay, or a floor that is negative or above the peak.
    """
    kind, _, power = decay.partition(":")
    if kind == "steps":
        return _stepped(decay, learning_rate, steps, warmup, floor)
    try:
        exponent = float(power) if kind == "poly" else 1.0
    except ValueError:
        exponent = math.nan
    if (kind == "cosine" and power) or kind not in ("cosine", "poly") or not 0 < exponent < math.inf:
        raise ConfigError(f'decay="{decay}" is neither cosine nor poly:POWER, such as poly:0.9, nor steps:FRACTION,….')
    if not 0 <= floor <= learning_rate:
        raise ConfigError(f"floor={floor} must lie between 0 and the learning rate, {learning_rate}.")
    length = max(steps - warmup, 1)
    if kind == "cosine":
        falling = optax.cosine_decay_schedule(learning_rate, length, floor / learning_rate if learning_rate else 0.0)
    else:
        falling = optax.polynomial_schedule(learning_rate, floor, exponent, max(length - 1, 1))
    return (
        optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), falling], [warmup])
        if warmup
        else falling
    )


def _stepped(decay: str, learning_rate: float, steps: int, warmup: int, floor: float) -> optax.Schedule:
    """Returns the schedule of "steps:a,b"."""
    try:
        fractions = [float(text) for text in decay.partition(":")[2].split(",")]
    except ValueError:
        fractions = []
    if not fractions or sorted(set(fractions)) != fractions or not 0 < fractions[0] <= fractions[-1] < 1:
        raise ConfigError(f'decay="{decay}": expected rising fractions of the steps, such as steps:0.67,0.92.')
    if not 0 <= floor <= learning_rate:
        raise ConfigError(f"floor={floor} must lie between 0 and the learning rate, {learning_rate}.")
    at = np.array([round(fraction * steps) for fraction in fractions])

    def rate(step: Any) -> Any:
        falls = jnp.sum(jnp.asarray(step) >= at)
        rising = jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
        return jnp.maximum(rising * learning_rate * 10.0**-falls, jnp.minimum(floor, rising * learning_rate))

    return rate


def make_optimizer(
    name: str,
    *,
    learning_rate: float,
    steps: int,
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    sharded: bool = False,
    decay: str = "cosine",
    floor: float = 0.0,
    no_decay: Sequence[str] = (),
    rates: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """Returns an optimizer with linear warm-up and a decay of the learning rate over `steps`.

    Args:
      name: "adam", "adamw", "sgd" (Nesterov momentum 0.9) or "momentum" (without Nesterov's step).
      learning_rate: the peak.
      steps: total number of steps.
      warmup: steps of linear warm-up.
      weight_decay: for all but adam.
      clip: largest global gradient norm; 0 for none.
      sharded: whether its state is sharded, see `drep_jax.training.sharded_optimizer`.
      decay, floor: of the learning rate, see `make_schedule`.
      no_decay: regular expressions that match whole paths of parameters, without the name of their
        subtree. All others decay. () for the optimizer's own choice: matrices with adamw, else all.
      rates: (such a regular expression, factor on the learning rate of what it matches); the first
        that matches counts.

    Raises:
      ConfigError: for an unknown name, weight decay with adam, a warm-up as long as the stage, or
        settings of `make_schedule`. When parameters are seen: for an expression that matches none.
    """
    build = lookup(OPTIMIZERS, name, "optimizer")
    if name == "adam" and weight_decay:
        raise ConfigError("adam has no weight decay; use adamw.")
    if no_decay and not weight_decay:
        raise ConfigError("no_decay names parameters without weight decay, but weight_decay is 0.")
    if not 0 <= warmup < max(steps, 1):
        raise ConfigError(f"warmup={warmup} must be less than the stage's {steps} steps.")
    rate = make_schedule(decay, learning_rate, max(steps, 1), warmup, floor)
    decays = parameter_groups("no_decay", [(pattern, False) for pattern in no_decay], True) if no_decay else None
    tx = build(rate, weight_decay, decays)
    if rates:
        tx = optax.chain(tx, _scaled(parameter_groups("rates", rates, 1.0)))
    clipping = sharded_optimizer.clip_by_global_norm if sharded else optax.clip_by_global_norm
    return optax.chain(clipping(clip), tx) if clip else tx


def parameter_groups(setting: str, groups: Sequence[tuple[str, Any]], other: Any) -> Callable[[Tree], Tree]:
    """Returns {subtree: parameters} ↦ the value of the first expression that matches each parameter's whole path.

    Args:
      setting: name of the setting, for errors.
      groups: (regular expression, value).
      other: value where none matches.

    Raises:
      ConfigError: for what is no regular expression. When called: for one that matches no parameter.

    >>> parameter_groups("rates", [(".*norm.*", 2.0)], 1.0)({"backbone": {"norm1": 0, "fc": 0}})
    {'backbone': {'fc': 1.0, 'norm1': 2.0}}
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in groups]
    except re.error as error:
        raise ConfigError(
            f"{setting}: one of {[pattern for pattern, _ in groups]} is no regular expression: {error}."
        ) from error

    def assign(params: Tree) -> Tree:
        used: set[str] = set()

        def value_of(path: Any, _: Any) -> Any:
            name = "/".join(str(getattr(key, "key", key)) for key in path[1:])
            for pattern, value in compiled:
                if pattern.fullmatch(name):
                    used.add(pattern.pattern)
                    return value
            return other

        tree = jax.tree_util.tree_map_with_path(value_of, params)
        if unused := [pattern for pattern, _ in groups if pattern not in used]:
            raise ConfigError(
                f"{setting}: {unused[0]!r} matches no parameter's whole path, such as encoder/norm1/scale."
            )
        return tree

    return assign


def _scaled(factors: Callable[[Tree], Tree]) -> optax.GradientTransformation:
    """Returns a transformation that scales updates by each parameter's factor."""

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        del params
        return jax.tree_util.tree_map(lambda update, factor: update * factor, updates, factors(updates)), state

    def init(params: Tree) -> Any:
        factors(params)
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)
