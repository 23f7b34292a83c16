"""The training state and the training step, which changes some subtrees of the parameters.

Parameters are {"backbone": …, "denoise": …}. Gradients are taken with respect to the trainable
subtrees alone, so frozen parameters cost no backward pass. The optimizer is partitioned over the
same names and has no state for them. Where two subtrees are trained in alternating phases, each has
its own optimizer, whose state is frozen during the other's phase.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from drep_jax.errors import ConfigError
from drep_jax.parallel import devices
from drep_jax.training import sharded_optimizer
from drep_jax.typing import Tree

LossFn = Callable[[Tree, Tree, Mapping[str, Any], jax.Array], tuple[Any, tuple[dict[str, Any], Tree]]]


TEACHER = "teacher"
"""Subtree of the unchanged backbone in a stage that trains a backbone to give its answers; always frozen."""


class TrainState(flax.struct.PyTreeNode):
    """What a step changes.

    Attributes:
      step: steps taken so far.
      params: the trainable subtree, {name: tree}.
      others: other variable collections of the backbone, such as batch statistics.
      opt_state: of the optimizer, over the trainable parameters.
      key: random key of the stage as raw data; step n uses `fold_in(key, n)`.
      ema: exponential moving averages of some of `params`; {} for none.
    """

    step: Any
    params: Tree
    others: Tree
    opt_state: Tree
    key: jax.Array
    ema: Tree = flax.struct.field(default_factory=dict)

    @property
    def averaged(self) -> Tree:
        """The trained parameters, with moving averages in place of last values, if any."""
        return {**self.params, **self.ema}


def partitioned(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation], trainable: Sequence[str]
) -> optax.GradientTransformation:
    """Returns an optimizer over {name: tree} that updates trainable subtrees only.

    Args:
      tx: one optimizer for all trainable subtrees together, or {name: optimizer}.
      trainable: names of subtrees.
    """
    several = isinstance(tx, Mapping)

    def labels(params: Tree) -> Tree:
        def label(name: str) -> str:
            return "freeze" if name not in trainable else name if several else "train"

        return {name: jax.tree_util.tree_map(lambda _, n=name: label(n), tree) for name, tree in params.items()}

    parts = {name: tx[name] for name in trainable} if isinstance(tx, Mapping) else {"train": tx}
    return optax.partition({**parts, "freeze": optax.set_to_zero()}, labels)


def extra_params(params: Tree) -> dict[str, Tree]:
    """Returns the parameters of none of the networks and denoisers, such as those of a loss.

    >>> extra_params({"backbone": {}, "denoise": {}, "scale": {"log": 0.5}})
    {'scale': {'log': 0.5}}
    """
    return {name: tree for name, tree in params.items() if name not in ("backbone", "denoise", TEACHER)}


def frozen_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation with the state of `tx` that changes nothing."""

    def update(grads: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        del params
        return jax.tree_util.tree_map(jnp.zeros_like, grads), state

    return optax.GradientTransformation(tx.init, update)


def split(params: Tree, trainable: Sequence[str]) -> tuple[Tree, Tree]:
    """Returns the trainable and the frozen part of {name: tree}.

    >>> split({"backbone": {"w": 1}, "denoise": {"w": 2}}, ["denoise"])
    ({'denoise': {'w': 2}}, {'backbone': {'w': 1}})
    """
    if missing := set(trainable) - set(params):
        raise ConfigError(f"There is no parameter subtree {sorted(missing)}; there are {sorted(params)}.")
    chosen = {name: tree for name, tree in params.items() if name in trainable}
    return chosen, {name: tree for name, tree in params.items() if name not in trainable}


def create_state(
    params: Tree,
    others: Tree,
    tx: optax.GradientTransformation,
    frozen: Tree,
    key: jax.Array,
    *,
    averaged: Sequence[str] = (),
) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: the trainable subtrees.
      others: other variable collections.
      tx: a `partitioned` optimizer over trainable and frozen parameters.
      frozen: the subtrees that are not trained.
      key: of the stage.
      averaged: names of trainable subtrees that have a moving average.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        others=others,
        opt_state=tx.init({**params, **frozen}),
        key=jax.random.key_data(key),
        ema={name: params[name] for name in averaged},
    )


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    active: Sequence[str] | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
    sharded: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Returns the training step, compiled for all local devices.

    Args:
      loss_fn: (params, others, batch, key) ↦ (loss, (metrics, others)), with all of {"backbone",
        "denoise"} in params.
      tx: a `partitioned` optimizer.
      active: names of the trainable subtrees that this step changes; None for all.
      accumulate: number of microbatches that each device's part of the batch is cut into. They run
        one after the other: the memory of one, the mean gradient of all. Batch statistics are those
        of a microbatch.
      ema: decay of the moving averages in the state; at step n at most (1 + n) / (10 + n).
      sharded: whether the optimizer's state is sharded, as in `placed`.

    Returns:
      (state, frozen, batch) ↦ (state, metrics), all with a leading axis of devices. Loss,
      gradients, metrics and other collections are averaged over the devices. The input state is
      donated: use the returned one.
    """

    def step(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        moving = {name: tree for name, tree in state.params.items() if active is None or name in active}

        def gradients(others: Tree, part: Tree) -> Any:
            def objective(trained: Tree) -> Any:
                return loss_fn({**frozen, **state.params, **trained}, others, part, key)

            (loss, (metrics, others)), grads = jax.value_and_grad(objective, has_aux=True)(moving)
            return others, (grads, {"loss": loss, **metrics})

        others, (grads, metrics) = _accumulated(gradients, state.others, batch, accumulate)
        others, metrics = devices.mean((others, metrics))
        grads, local = (
            (sharded_optimizer.mean_slice(grads), sharded_optimizer.local_slice(moving))
            if sharded
            else (devices.mean(grads), moving)
        )
        fixed = {**frozen, **{name: tree for name, tree in state.params.items() if name not in moving}}
        nothing = jax.tree_util.tree_map(jnp.zeros_like, fixed)  # never read: masked or frozen
        updates, opt_state = tx.update({**grads, **nothing}, state.opt_state, {**state.params, **frozen, **local})
        moved = optax.apply_updates(local, {name: updates[name] for name in moving})
        params = {**state.params, **(sharded_optimizer.gathered(moved, moving) if sharded else moved)}
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        now = {name: params[name] for name in state.ema}
        average = optax.incremental_update(now, state.ema, 1.0 - decay)
        return state.replace(
            step=state.step + 1, params=params, others=others, opt_state=opt_state, ema=average
        ), metrics

    return devices.on_devices(step, donate_argnums=0)


def placed(state: TrainState, *, sharded: bool = False) -> TrainState:
    """Returns a state replicated on every device.

    With `sharded`, each device holds a slice of the optimizer's part.
    """
    if not sharded:
        return devices.replicate(state)
    return devices.replicate(state.replace(opt_state=())).replace(
        opt_state=sharded_optimizer.shard_state(state.opt_state)
    )


def collected(placed_state: TrainState, like: TrainState, *, sharded: bool = False) -> TrainState:
    """Inverse of `placed`: NumPy arrays in the shapes of `like`."""
    if not sharded:
        return devices.unreplicate(placed_state)
    one = devices.unreplicate(placed_state.replace(opt_state=()))
    return one.replace(opt_state=sharded_optimizer.gather_state(placed_state.opt_state, like.opt_state))


def _accumulated(gradients: Callable[..., Any], others: Tree, batch: Tree, parts: int) -> Any:
    """Runs `gradients(others, part) ↦ (others, values)` over the parts of a batch.

    Returns the last others and mean values.
    """
    if parts == 1:
        return gradients(others, batch)
    cut = jax.tree_util.tree_map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), batch)

    def one(carry: Any, part: Tree) -> Any:
        others, total = carry
        others, values = gradients(others, part)
        return (others, jax.tree_util.tree_map(jnp.add, total, values)), None

    first = jax.tree_util.tree_map(lambda leaf: leaf[0], cut)
    zeros = jax.tree_util.tree_map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, others, first)[1]
    )
    (others, total), _ = jax.lax.scan(one, (others, zeros), cut)
    return others, jax.tree_util.tree_map(lambda leaf: leaf / parts, total)
