"""What a training step minimises: Algorithm 1's losses (Eq. 11), the labels', and both through fused weights (Eq. 12)."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drep_jax.core.algorithm1 import algorithm1_losses
from drep_jax.core.fusion import fuse
from drep_jax.errors import ConfigError
from drep_jax.parallel import devices
from drep_jax.run.setup import Setting
from drep_jax.training.state import extra_params
from drep_jax.typing import Config, Tree

Outcome = tuple[Any, tuple[dict[str, Any], Tree]]
"""(loss, (metrics, other collections)), what a step's loss function returns."""


def denoising_objective(
    setting: Setting, options: Config, params: Tree, others: Tree, batch: Tree, key: jax.Array
) -> Outcome:
    """Returns the sum of Algorithm 1's losses over the sites, on the frozen backbone's features, with each one as a metric."""
    losses = algorithm1_losses(
        computing(setting, options),
        {**others, "params": params["backbone"]},
        params["denoise"],
        setting.sites,
        setting.schedule,
        key,
        batch["index"],
        setting.inputs(batch),
        loss=options["loss"],
        tokens=options["tokens"],
    )
    scalars = {
        name if value.ndim == 0 else f"{name}[{copy}]": value if value.ndim == 0 else value[copy]
        for name, value in losses.items()
        for copy in range(value.size)
    }
    return sum(jnp.sum(value) for value in losses.values()), (scalars, others)


def label_objective(
    setting: Setting,
    options: Config,
    weights: Tree,
    others: Tree,
    batch: Tree,
    key: jax.Array,
    *,
    train: bool,
    beside: Mapping[str, Tree] = MappingProxyType({}),
) -> Outcome:
    """Returns the task's loss of the backbone with the given weights, with its accuracy as a metric.

    Args:
      setting, options: of the run and the stage; `options["label_smoothing"]` is used.
      weights: the backbone's parameters, such as fused ones.
      others: its other collections.
      batch: images and labels; of mixed images both labels, see `drep_jax.tasks.classification.loss`.
      key: of dropout.
      train: whether the backbone is in training mode: dropout, and batch statistics that are updated.
      beside: what else the loss trains, such as the centres of identities.
    """
    backbone = computing(setting, options)
    images, task = setting.inputs(batch), setting.task
    if train:
        if getattr(backbone, "axis_name", "") is None:  # batch statistics of the whole batch, on however many devices
            backbone = backbone.clone(axis_name=devices.AXIS)
        rngs = {"dropout": jax.random.fold_in(key, devices.device_index())}
        outputs, others = task.outputs(
            backbone, {**others, "params": weights}, images, train=True, rngs=rngs, mutable=list(others)
        )
    else:
        outputs = task.outputs(backbone, {**others, "params": weights}, images)
    loss, metrics = task.loss(outputs, batch, options["label_smoothing"], beside)
    return loss, (metrics, dict(others))


def augmented_objective(
    setting: Setting,
    options: Config,
    params: Tree,
    others: Tree,
    batch: Tree,
    key: jax.Array,
    *,
    weight: float,
    train: bool,
) -> Outcome:
    """Returns (1 − λ)·Loss_label + λ·Loss_denoise (Eq. 12), the label loss that of the fused weights.

    `fuse` is differentiated through, so labels reach the denoisers; Loss_denoise is on the backbone as it is, unfused.

    Args:
      setting, options, params, others, batch, key: see above; rule and steps of fusion are the run's.
      weight: λ, from 0 (labels only) to 1 (Algorithm 1).
      train: whether the backbone is in training mode.
    """
    if weight == 1.0:
        return denoising_objective(setting, options, params, others, batch, key)
    fused = fuse(params, setting.sites, setting.schedule, rule=options["rule"], steps=options["steps"])
    label, (metrics, updated) = label_objective(
        setting, options, fused, others, batch, key, train=train, beside=extra_params(params)
    )
    if not weight:
        return label, (metrics, updated)
    denoising, (losses, _) = denoising_objective(setting, options, params, others, batch, key)
    parts = {"label_loss": label, "denoising_loss": denoising}
    return (1.0 - weight) * label + weight * denoising, ({**metrics, **parts, **losses}, updated)


def computing(setting: Setting, options: Config) -> nn.Module:
    """Returns the backbone as a stage computes with it: in its `compute` type, with float32 parameters."""
    dtype = jnp.dtype(options["compute"])
    backbone = setting.backbone
    if dtype == jnp.float32 and not options["remat"]:
        return backbone
    changes: dict[str, Any] = {} if dtype == jnp.float32 else {"dtype": dtype}
    if options["remat"]:
        changes["remat"] = True
    return backbone.clone(**changes)


COMPUTE = ("float32", "bfloat16")
"""Types a stage can compute in; parameters, optimiser and fusion stay float32."""


def check_computing(options: Config, section: str, setting: Setting, batch: int) -> None:
    """Refuses how a stage is to compute where its backbone or its batch does not allow it.

    Raises:
      ConfigError: naming the setting.
    """
    fields = {field.name for field in dataclasses.fields(setting.backbone)}
    if options["compute"] not in COMPUTE:
        raise ConfigError(f"{section}.compute={options['compute']!r}; expected one of {', '.join(COMPUTE)}.")
    for name, needed, asked in (
        ("compute", "dtype", options["compute"] != "float32"),
        ("remat", "remat", options["remat"]),
    ):
        if asked and needed not in fields:
            raise ConfigError(
                f"{section}.{name}={options[name]!r} needs a backbone with an attribute `{needed}`, which "
                f"{type(setting.backbone).__name__} has not."
            )
    parts = options["accumulate"]
    if parts < 1 or batch // devices.device_count() % parts:
        raise ConfigError(
            f"{section}.accumulate={parts} must be at least 1 and divide each device's share of the batch, "
            f"{batch // devices.device_count()} images."
        )
