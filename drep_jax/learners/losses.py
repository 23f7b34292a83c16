"""Training losses: Algorithm 1's (Eq. 11), the task's, both (Eq. 12), and distillation."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.fusion import fuse_variables
from drep_jax.errors import ConfigError
from drep_jax.parallel import devices
from drep_jax.run.setup import Setup
from drep_jax.training.state import extra_params
from drep_jax.typing import Config, Tree

Outcome = tuple[Any, tuple[dict[str, Any], Tree]]
"""(loss, (metrics, other collections)), the result of a step's loss function."""


def denoising_objective(
    setup: Setup, options: Config, params: Tree, others: Tree, batch: Tree, key: jax.Array
) -> Outcome:
    """Returns Algorithm 1's loss summed over sites (frozen backbone); each site is a metric."""
    losses = algorithm1_losses(
        computing(setup, options),
        {**others, "params": params["backbone"]},
        params["denoise"],
        setup.sites,
        setup.schedule,
        key,
        batch["index"],
        setup.inputs(batch),
        loss=options["loss"],
        tokens=options["tokens"],
        **setup.arguments(batch),
    )
    scalars = {
        name if value.ndim == 0 else f"{name}[{copy}]": value if value.ndim == 0 else value[copy]
        for name, value in losses.items()
        for copy in range(value.size)
    }
    return sum(jnp.sum(value) for value in losses.values()), (scalars, others)


def label_objective(
    setup: Setup,
    options: Config,
    weights: Tree,
    others: Tree,
    batch: Tree,
    key: jax.Array,
    *,
    train: bool,
    extra: Mapping[str, Tree] = MappingProxyType({}),
) -> Outcome:
    """Returns the task's loss of the backbone with the given weights, and the task's metrics.

    Args:
      setup, options: of the run and the stage; `options["label_smoothing"]` is used.
      weights: the backbone's parameters, for example fused ones.
      others: its other collections.
      batch: images and labels; both labels of mixed images, see
        `drep_jax.tasks.losses.cross_entropy`.
      key: of dropout.
      train: whether the backbone is in training mode, with dropout and updated batch statistics.
      extra: further trained parameters of the loss, such as the centers of identities.
    """
    backbone = computing(setup, options)
    images, task = setup.inputs(batch), setup.task
    if train:
        if getattr(backbone, "axis_name", "") is None:  # batch statistics over all devices
            backbone = backbone.clone(axis_name=devices.AXIS)
        rngs = {"dropout": jax.random.fold_in(key, devices.device_index())}
        outputs, others = task.apply(
            backbone, {**others, "params": weights}, images, batch, train=True, rngs=rngs, mutable=list(others)
        )
    else:
        outputs = task.apply(backbone, {**others, "params": weights}, images, batch)
    loss, metrics = task.loss(outputs, batch, options["label_smoothing"], extra)
    return loss, (metrics, dict(others))


def distillation_objective(
    setup: Setup, options: Config, student: Tree, teacher: Tree, others: Tree, batch: Tree
) -> Outcome:
    """Returns the task's distance of a network on corrupted images from the backbone on clean ones.

    Both networks are in inference mode.

    Args:
      setup, options: of the run and the stage.
      student: variables of the network that learns, for example fused ones.
      teacher: parameters of the frozen backbone.
      others: its other collections.
      batch: "image" and "corrupted", and the columns of side information.
    """
    backbone, task = computing(setup, options), setup.task

    def outputs(variables: Tree, images: str) -> Any:
        inputs = setup.inputs({**batch, "image": batch[images]})
        return task.predict(backbone, variables, inputs, batch)

    clean = jax.lax.stop_gradient(outputs({**others, "params": teacher}, "image"))
    return task.distillation_loss(outputs(student, "corrupted"), clean), ({}, dict(others))


def augmented_objective(
    setup: Setup,
    options: Config,
    params: Tree,
    others: Tree,
    batch: Tree,
    key: jax.Array,
    *,
    weight: float,
    train: bool,
) -> Outcome:
    """Returns (1 − λ)·Loss_label + λ·Loss_denoise (Eq. 12), the former of the fused weights.

    Gradients pass through `fuse`, so labels train the denoisers. Loss_denoise uses the unfused
    backbone.

    Args:
      setup, options, params, others, batch, key: see above; rule and steps of fusion are the run's.
      weight: λ, from 0 (labels only) to 1 (Algorithm 1).
      train: whether the backbone is in training mode.
    """
    if weight == 1.0:
        return denoising_objective(setup, options, params, others, batch, key)
    variables = {**others, "params": params["backbone"]}
    fusing = {"rule": options["rule"], "steps": options["steps"]}
    fused = fuse_variables(variables, params["denoise"], setup.sites, setup.schedule, **fusing)
    weights, fused_others = fused["params"], {name: tree for name, tree in fused.items() if name != "params"}
    label, (metrics, updated) = label_objective(
        setup, options, weights, fused_others, batch, key, train=train, extra=extra_params(params)
    )
    updated = _of_unfused(updated, others, fused_others)
    if not weight:
        return label, (metrics, updated)
    denoising, (losses, _) = denoising_objective(setup, options, params, others, batch, key)
    parts = {"label_loss": label, "denoising_loss": denoising}
    return (1.0 - weight) * label + weight * denoising, ({**metrics, **parts, **losses}, updated)


def _of_unfused(updated: Tree, others: Tree, fused: Tree) -> Tree:
    """Returns updated collections with the running means of the unfused backbone.

    A fused running mean lacks the constants of the denoisers, before its update and after it.
    """
    if "batch_stats" not in others:
        return updated

    def add(new: Any, before: Any, after: Any) -> Any:
        return new if before is after else new + (before - after)

    statistics = (tree["batch_stats"] for tree in (updated, others, fused))
    return {**updated, "batch_stats": jax.tree_util.tree_map(add, *statistics)}


def computing(setup: Setup, options: Config) -> nn.Module:
    """Returns the backbone that computes in `options["compute"]`, with float32 parameters."""
    dtype = jnp.dtype(options["compute"])
    backbone = setup.backbone
    if dtype == jnp.float32 and not options["remat"]:
        return backbone
    changes: dict[str, Any] = {} if dtype == jnp.float32 else {"dtype": dtype}
    if options["remat"]:
        changes["remat"] = True
    return backbone.clone(**changes)


COMPUTE = ("float32", "bfloat16")
"""Types that a stage can compute in; parameters, optimizer and fusion stay float32."""


def check_computing(options: Config, section: str, setup: Setup, batch: int) -> None:
    """Refuses `compute`, `remat` or `accumulate` if the backbone or the batch does not support it.

    Raises:
      ConfigError: naming the setting.
    """
    fields = {field.name for field in dataclasses.fields(setup.backbone)}
    if options["compute"] not in COMPUTE:
        raise ConfigError(f"{section}.compute={options['compute']!r}; expected one of {', '.join(COMPUTE)}.")
    for name, needed, requested in (
        ("compute", "dtype", options["compute"] != "float32"),
        ("remat", "remat", options["remat"]),
    ):
        if requested and needed not in fields:
            raise ConfigError(
                f"{section}.{name}={options[name]!r} needs a backbone with an attribute `{needed}`, which "
                f"{type(setup.backbone).__name__} does not have."
            )
    parts = options["accumulate"]
    if parts < 1 or batch // devices.device_count() % parts:
        raise ConfigError(
            f"{section}.accumulate={parts} must be at least 1 and divide each device's share of the batch, "
            f"{batch // devices.device_count()} images."
        )
