"""How labels take part: Eq. 12, alternating fine-tuning (appendix A), plain fine-tuning as control, and DenoiseRep⁻ (Fig. 1b).

| learner | what it trains | what with |
|---|---|---|
| `label_augmented` | the denoisers | (1 − λ)·label loss of the fused network + λ·Algorithm 1's (Eq. 12) |
| `alternating` | denoisers and backbone in turn | Eq. 12, then the label loss of the fused network (appendix A) |
| `continued` | the backbone alone: the control arm, exported | its label loss |
| `final_only` | one explicit denoiser of the final feature, DenoiseRep⁻ | Algorithm 1's minimum; it cannot be fused |
"""

import dataclasses
import os
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from drep_jax.core import closed_form
from drep_jax.core.denoisers import init_denoise
from drep_jax.core.explicit import explicit_apply
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.layers import find_layers
from drep_jax.core.sites import assign_times, select_sites
from drep_jax.errors import ConfigError
from drep_jax.learners.base import Learned, Task, against_optimum, keep, train, trained_section
from drep_jax.learners.losses import augmented_objective, label_objective
from drep_jax.run.moments import moment_images, moments_of
from drep_jax.run.setup import Setting
from drep_jax.run.stages import batch_size_of, run_training, starting, training_steps
from drep_jax.tasks import Retrieval
from drep_jax.training.logging import MetricWriter
from drep_jax.training.state import extra_params
from drep_jax.typing import Config, Tree

LABELLED = ("label_augmented", "alternating", "continued")
"""Learners that train with labels, each beside a control arm of the same budget."""

EXPLICIT = ("final_only",)
"""Learners whose result stays beside the network and cannot be exported."""


def train_labelled(
    config: Config, setting: Setting, stage: str, variables: Tree, directory: str, writer: MetricWriter
) -> tuple[Tree, float]:
    """Trains the whole backbone with labels and returns it and the seconds; stage "control" is the arm of equal budget."""
    options = config[stage]

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return label_objective(
            setting, options, params["backbone"], others, batch, key, train=True, beside=extra_params(params)
        )

    params, others = starting(config, setting, stage, variables)
    state, seconds = run_training(config, setting.train, stage, params, others, loss_fn, directory, writer)
    return {**state.others, "params": state.params["backbone"]}, seconds


def by_labels(task: Task) -> Learned:
    """Trains the denoisers of the frozen backbone with Eq. 12."""
    config, setting = task.config, task.setting

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return _through_fusion(config, setting, params, others, batch, key)

    state, section = train(task, "label_augmented", loss_fn)
    denoise = state.averaged["denoise"]
    section |= {"label_lambda": config["denoise"]["label_lambda"], **against_optimum(task, denoise)}
    return Learned(denoise, config["denoise"]["rule"], config["denoise"]["steps"], section)


def by_turns(task: Task) -> Learned:
    """Trains denoisers and backbone in turn, the backbone through the fused weights."""
    config, setting = task.config, task.setting
    fusing = {name: config["denoise"][name] for name in ("rule", "steps", "loss", "tokens")}
    options = {**config["control"], **fusing}

    def denoisers(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return _through_fusion(config, setting, params, others, batch, key)

    def backbone(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return augmented_objective(setting, options, params, others, batch, key, weight=0.0, train=True)

    state, section = train(task, "alternating", {"denoise": denoisers, "backbone": backbone})
    section |= {"label_lambda": config["denoise"]["label_lambda"], "per_site": {}, "optimum": None}
    learned = state.averaged
    variables = {**state.others, "params": learned["backbone"]}
    how = config["denoise"]["rule"], config["denoise"]["steps"]
    return Learned(learned["denoise"], *how, section, variables=variables)


def by_continuing(task: Task) -> Learned:
    """Takes the control arm itself, with denoisers that do nothing."""
    config, setting = task.config, task.setting
    if task.continued is None:
        raise ConfigError('Learner "continued" is the control arm, and there is none; set --config.control.steps=N.')
    variables, seconds = task.continued
    section = trained_section(task, "control", training_steps(config, "control"), seconds)
    section |= {"per_site": {}, "optimum": None}
    learned = Learned(init_denoise(setting.sites), "affine", 1, section, variables=variables)
    keep("continued", task, learned)
    return learned


def by_final_feature(task: Task) -> Learned:
    """Solves Algorithm 1 for one denoiser on the final feature, which is applied explicitly.

    That is the input of the head; of a backbone for retrieval, which runs without one, it is what the backbone gives, and a
    linear layer that does nothing is put behind it for the denoiser to work at.
    """
    config, setting = task.config, task.setting
    began = time.perf_counter()
    variables = task.variables
    if isinstance(setting.task, Retrieval):
        setting = dataclasses.replace(setting, backbone=WithFinal(setting.backbone))
        variables = with_final(setting, task.variables)
    head = find_layers(setting.backbone, setting.images)[-1:]
    options = config["denoise"]
    sites = assign_times(
        select_sites(head, ".*"),
        timesteps=setting.schedule.timesteps,
        steps=options["steps"],
        time_scale=options["time_scale"],
    )
    moments = moments_of(config, setting, variables, os.path.join(task.directory, "final_moments.npz"), sites)
    denoise = closed_form.closed_form(moments, sites, setting.schedule)
    nothing = closed_form.expected_losses(moments, sites, setting.schedule, init_denoise(sites))
    best = closed_form.expected_losses(moments, sites, setting.schedule)
    section = {
        "steps": 0,
        "seconds": time.perf_counter() - began,
        "loss": [],
        "images": moment_images(config, setting),
        "per_site": {name: [nothing[name], best[name]] for name in nothing},
        "optimum": best,
    }
    how = {"rule": options["rule"], "steps": options["steps"]}

    def before_the_head(variables: Tree, images: Any) -> Any:
        return explicit_apply(setting.backbone, variables, denoise, sites, setting.schedule, images, **how)

    def behind_the_backbone(variables: Tree, images: Any) -> Any:
        inside = with_final(setting, variables)
        return setting.backbone.apply({**inside, "params": {**inside["params"], "final": final}}, images)

    network = before_the_head
    if isinstance(setting.task, Retrieval):  # where a layer that does nothing and its denoiser are one linear layer
        final = fuse_exact({"backbone": variables["params"], "denoise": denoise}, sites, setting.schedule, **how)[
            "final"
        ]
        network = behind_the_backbone
    return Learned(denoise, options["rule"], options["steps"], section, network=network)


class WithFinal(nn.Module):
    """A backbone with a linear layer behind it, `final`."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Returns final(backbone(x))."""
        feature = self.backbone(x, train=train)
        return nn.Dense(feature.shape[-1], param_dtype=feature.dtype, name="final")(feature)


def with_final(setting: Setting, variables: Tree) -> Tree:
    """Returns the variables of a `WithFinal` whose last layer does nothing.

    Args:
      setting: whose backbone is the `WithFinal`.
      variables: of the backbone inside.
    """
    shape = jax.eval_shape(setting.backbone.backbone.apply, variables, setting.images)
    width = shape.shape[-1]
    inside = {name: {"backbone": tree} for name, tree in variables.items()}
    final = {"kernel": jnp.eye(width, dtype=shape.dtype), "bias": jnp.zeros(width, shape.dtype)}
    return {**inside, "params": {**inside["params"], "final": final}}


def check_labelled(config: Config, setting: Setting) -> None:
    """Refuses learners that the images, the backbone or the budget do not allow, before any work.

    Raises:
      ConfigError: naming the learner and the setting.
    """
    asked = (config["learner"], *config["compare"])
    alternate = config["alternate"]
    order = tuple(alternate["order"])
    if sorted(order) != ["backbone", "denoise"] or alternate["period"] < 1:
        raise ConfigError(
            f"alternate.order={order} has to name denoise and backbone once each, and alternate.period="
            f"{alternate['period']} has to be at least 1 step."
        )
    if config["learner"] in EXPLICIT:
        raise ConfigError(
            f'Learner "{config["learner"]}" is evaluated on the explicit path and leaves nothing to fuse or export; put it in '
            "--config.compare, beside another learner."
        )
    if "final_only" in asked and setting.features and not isinstance(setting.task, Retrieval):
        raise ConfigError('Learner "final_only" denoises the input of the head, and this backbone has none.')
    if not 0.0 <= config["denoise"]["label_lambda"] <= 1.0:
        raise ConfigError(
            f"denoise.label_lambda={config['denoise']['label_lambda']} is λ of Eq. 12 and lies in [0, 1]."
        )
    for name in (name for name in LABELLED if name in asked):
        if setting.features or setting.train.num_classes is None:
            what = "the backbone has no head" if setting.features else f"{setting.train.name} has none"
            raise ConfigError(f'Learner "{name}" trains with labels, but {what}. Choose a label-free learner.')
        stage = "control" if name == "continued" else name
        steps, control = training_steps(config, stage), config["control"]["steps"]
        if not steps:
            setting_of = {"alternating": "alternate.steps", "continued": "control.steps"}.get(
                name, "denoise.train_steps"
            )
            raise ConfigError(f'Learner "{name}" would take no step; set --config.{setting_of}=N.')
        budget = (steps, batch_size_of(config, stage))
        if control and budget != (control, config["control"]["batch_size"]):
            raise ConfigError(
                f'Learner "{name}" takes {budget[0]} steps of {budget[1]} images and the control arm {control} of '
                f"{config['control']['batch_size']}: with another budget it is no control. Make them equal, or leave the arm "
                "out with --config.control.steps=0."
            )


def _through_fusion(config: Config, setting: Setting, params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
    options = {**config["denoise"], "label_smoothing": config["control"]["label_smoothing"]}
    weight = config["denoise"]["label_lambda"]
    loss, (metrics, _) = augmented_objective(setting, options, params, others, batch, key, weight=weight, train=False)
    return loss, (metrics, others)
