"""Training state, and masks by which only one subtree of the parameters is trained.

Parameters are {"backbone": …, "denoise": …}. Gradients are taken with respect to the trainable subtree alone, so frozen
parameters cost no backward pass; the optimiser is partitioned over the same labels and holds nothing for them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from drep_jax.errors import ConfigError, lookup
from drep_jax.training import parallel

Tree = Any
LossFn = Callable[[Tree, Tree, Mapping[str, Any], jax.Array], tuple[Any, tuple[dict[str, Any], Tree]]]


class TrainState(flax.struct.PyTreeNode):
    """What a step changes.

    Attributes:
      step: steps taken so far.
      params: the trainable subtree, {name: tree}.
      others: other variable collections of the backbone, such as batch statistics.
      opt_state: the optimiser's, over the trainable parameters.
      key: random key of the stage as raw data; step n uses `fold_in(key, n)`.
    """

    step: Any
    params: Tree
    others: Tree
    opt_state: Tree
    key: jax.Array


def _adam(rate: Any, weight_decay: float) -> optax.GradientTransformation:
    del weight_decay
    return optax.adam(rate)


def _adamw(rate: Any, weight_decay: float) -> optax.GradientTransformation:
    def decayed(params: Tree) -> Tree:  # matrices only, as is usual
        return jax.tree_util.tree_map(lambda leaf: leaf.ndim > 1, params)

    return optax.adamw(rate, weight_decay=weight_decay, mask=decayed)


def _sgd(rate: Any, weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9, nesterov=True))


OPTIMIZERS: dict[str, Callable[[Any, float], optax.GradientTransformation]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
}


def make_optimizer(
    name: str, *, learning_rate: float, steps: int, warmup: int = 0, weight_decay: float = 0.0, clip: float = 0.0
) -> optax.GradientTransformation:
    """Returns an optimiser with linear warm-up and cosine decay to zero over `steps`.

    Args:
      name: "adam", "adamw" or "sgd" (Nesterov momentum 0.9).
      learning_rate: its peak.
      steps: total number of steps.
      warmup: steps of linear warm-up.
      weight_decay: for adamw and sgd.
      clip: largest global gradient norm; 0 for none.
    """
    build = lookup(OPTIMIZERS, name, "optimizer")
    if name == "adam" and weight_decay:
        raise ConfigError("adam has no weight decay; use adamw.")
    if not 0 <= warmup < max(steps, 1):
        raise ConfigError(f"warmup={warmup} must be less than the stage's {steps} steps.")
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, 1))
    if not warmup:
        rate = optax.cosine_decay_schedule(learning_rate, max(steps, 1))
    tx = build(rate, weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx


def partitioned(tx: optax.GradientTransformation, trainable: Sequence[str]) -> optax.GradientTransformation:
    """Returns `tx` for the subtrees named in `trainable` and no update, and no state, for all others."""

    def labels(params: Tree) -> Tree:
        return {
            name: jax.tree_util.tree_map(lambda _, n=name: "train" if n in trainable else "freeze", tree)
            for name, tree in params.items()
        }

    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)


def split(params: Tree, trainable: Sequence[str]) -> tuple[Tree, Tree]:
    """Returns the trainable and the frozen part of {name: tree}."""
    if missing := set(trainable) - set(params):
        raise ConfigError(f"There is no parameter subtree {sorted(missing)}; there are {sorted(params)}.")
    chosen = {name: tree for name, tree in params.items() if name in trainable}
    return chosen, {name: tree for name, tree in params.items() if name not in trainable}


def create_state(
    params: Tree, others: Tree, tx: optax.GradientTransformation, frozen: Tree, key: jax.Array
) -> TrainState:
    """Returns the state before the first step; `tx` is a `partitioned` optimiser over both parts."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        others=others,
        opt_state=tx.init({**params, **frozen}),
        key=jax.random.key_data(key),
    )


def make_step(loss_fn: LossFn, tx: optax.GradientTransformation) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Returns the training step, compiled for all local devices.

    Args:
      loss_fn: (params, others, batch, key) ↦ (loss, (metrics, others)), with all of {"backbone", "denoise"} in params.
      tx: a `partitioned` optimiser.

    Returns:
      (state, frozen, batch) ↦ (state, metrics), everything with a leading axis of devices; loss, gradients, metrics and
      other collections are averaged over them. The state given is donated: use the one returned.
    """

    def step(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def objective(trained: Tree) -> Any:
            return loss_fn({**frozen, **trained}, state.others, batch, key)

        (loss, (metrics, others)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        grads, others, metrics = parallel.mean((grads, others, {"loss": loss, **metrics}))
        nothing = jax.tree_util.tree_map(jnp.zeros_like, frozen)  # never read: those leaves are masked
        updates, opt_state = tx.update({**grads, **nothing}, state.opt_state, {**state.params, **frozen})
        updates = {name: updates[name] for name in state.params}
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, others=others, opt_state=opt_state), metrics

    return parallel.on_devices(step, donate_argnums=0)
