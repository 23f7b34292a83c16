"""Learners with labels, their control arm, and DenoiseRep⁻ (Fig. 1b).

| learner | trains | loss |
|---|---|---|
| `label_augmented` | the denoisers | (1 − λ)·label loss after fusion + λ·Algorithm 1's (Eq. 12) |
| `alternating` | denoisers and backbone in turn | Eq. 12; label loss after fusion (appendix A) |
| `continued` | the backbone alone: the exported control arm | label loss |
| `final_only` | DenoiseRep⁻, one denoiser of the final feature | Algorithm 1's; cannot be fused |
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
from drep_jax.core.fusion import fuse_variables_exact
from drep_jax.core.layers import find_layers
from drep_jax.core.sites import assign_times, select_sites
from drep_jax.errors import ConfigError
from drep_jax.learners.base import (
    Learned,
    LearnerInputs,
    against_optimum,
    direct_maps,
    keep,
    noise_predictors,
    train,
    trained_section,
)
from drep_jax.learners.losses import augmented_objective, label_objective
from drep_jax.run.moments import moment_images, moments_of
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup
from drep_jax.run.stages import run_training, stage_of, starting
from drep_jax.training.state import extra_params
from drep_jax.typing import Config, Tree


def train_labeled(run: Run, stage: str, variables: Tree) -> tuple[Tree, float]:
    """Trains the whole backbone with labels in stage "backbone" or "control".

    Returns:
      The trained variables and the seconds of training.
    """
    setup, options = run.setup, run.config[stage]

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return label_objective(
            setup, options, params["backbone"], others, batch, key, train=True, extra=extra_params(params)
        )

    params, others = starting(run, stage, variables)
    state, seconds = run_training(run, stage, params, others, loss_fn)
    return {**state.others, "params": state.params["backbone"]}, seconds


def learn_label_augmented(inputs: LearnerInputs) -> Learned:
    """Trains the denoisers of the frozen backbone with Eq. 12."""
    config, setup = inputs.config, inputs.setup

    def loss_fn(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return _through_fusion(config, setup, params, others, batch, key)

    state, section = train(inputs, "label_augmented", loss_fn)
    denoise = state.averaged["denoise"]
    section |= {"label_lambda": config["denoise"]["label_lambda"], **against_optimum(inputs, denoise)}
    return Learned(noise_predictors(config, denoise), section)


def learn_alternating(inputs: LearnerInputs) -> Learned:
    """Trains denoisers and backbone in turn, the backbone through the fused weights."""
    config, setup = inputs.config, inputs.setup
    fusing = {name: config["denoise"][name] for name in ("rule", "steps", "loss", "tokens")}
    options = {**config["control"], **fusing}

    def denoisers(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return _through_fusion(config, setup, params, others, batch, key)

    def backbone(params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
        return augmented_objective(setup, options, params, others, batch, key, weight=0.0, train=True)

    state, section = train(inputs, "alternating", {"denoise": denoisers, "backbone": backbone})
    section |= {"label_lambda": config["denoise"]["label_lambda"], "per_site": {}, "optimum": None}
    learned = state.averaged
    variables = {**state.others, "params": learned["backbone"]}
    return Learned(noise_predictors(config, learned["denoise"]), section, variables=variables)


def learn_continued(inputs: LearnerInputs) -> Learned:
    """Returns the control arm itself, with zero denoisers."""
    config, setup = inputs.config, inputs.setup
    if inputs.continued is None:
        raise ConfigError('Learner "continued" is the control arm, and there is none; set --config.control.steps=N.')
    variables, seconds = inputs.continued
    section = trained_section(inputs.run, "control", stage_of("control").steps(config), seconds)
    section |= {"per_site": {}, "optimum": None}
    learned = Learned(direct_maps(init_denoise(setup.sites)), section, variables=variables)
    keep("continued", inputs, learned)
    return learned


def learn_final_only(inputs: LearnerInputs) -> Learned:
    """Solves Algorithm 1 for one denoiser of the final feature, applied explicitly.

    The final feature is the input of the head. A backbone scored without a head outputs it; there
    an identity layer is appended as the site of the denoiser.
    """
    config, setup = inputs.config, inputs.setup
    began = time.perf_counter()
    variables = inputs.variables
    if not setup.task.test_needs_head:
        setup = dataclasses.replace(setup, backbone=WithFinal(setup.backbone))
        variables = with_final(setup, inputs.variables)
    head = find_layers(setup.backbone, setup.images)[-1:]
    options = config["denoise"]
    sites = assign_times(
        select_sites(head, ".*", concatenated="full"),  # one denoiser of the whole feature
        timesteps=setup.schedule.timesteps,
        steps=options["steps"],
        time_scale=options["time_scale"],
    )
    moments = moments_of(
        inputs.run, variables, os.path.join(inputs.run.directory, "final_moments.npz"), sites, setup.backbone
    )
    denoisers = noise_predictors(config, closed_form.closed_form(moments, sites, setup.schedule))
    nothing = closed_form.expected_losses(moments, sites, setup.schedule, init_denoise(sites))
    best = closed_form.expected_losses(moments, sites, setup.schedule)
    section = {
        "steps": 0,
        "seconds": time.perf_counter() - began,
        "loss": [],
        "images": moment_images(inputs.run),
        "per_site": {name: [nothing[name], best[name]] for name in nothing},
        "optimum": best,
    }

    def before_the_head(variables: Tree, images: Any) -> Any:
        return explicit_apply(setup.backbone, variables, denoisers, sites, setup.schedule, images)

    def behind_the_backbone(variables: Tree, images: Any) -> Any:
        inside = with_final(setup, variables)
        return setup.backbone.apply({**inside, "params": {**inside["params"], "final": final}}, images)

    network = before_the_head
    if not setup.task.test_needs_head:  # identity layer and denoiser fuse to one linear layer
        final = fuse_variables_exact(variables, denoisers, sites, setup.schedule)["params"]["final"]
        network = behind_the_backbone
    return Learned(denoisers, section, network=network)


class WithFinal(nn.Module):
    """A backbone followed by a linear layer, `final`."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Returns final(backbone(x))."""
        feature = self.backbone(x, train=train)
        return nn.Dense(feature.shape[-1], param_dtype=feature.dtype, name="final")(feature)


def with_final(setup: Setup, variables: Tree) -> Tree:
    """Returns the variables of a `WithFinal` whose last layer is the identity.

    Args:
      setup: its backbone is the `WithFinal`.
      variables: of the inner backbone.
    """
    feature = jax.eval_shape(setup.backbone.backbone.apply, variables, setup.images)
    width = feature.shape[-1]
    inside = {name: {"backbone": tree} for name, tree in variables.items()}
    final = {"kernel": jnp.eye(width, dtype=feature.dtype), "bias": jnp.zeros(width, feature.dtype)}
    return {**inside, "params": {**inside["params"], "final": final}}


def _through_fusion(config: Config, setup: Setup, params: Tree, others: Tree, batch: Tree, key: jax.Array) -> Any:
    options = {**config["denoise"], "label_smoothing": config["control"]["label_smoothing"]}
    weight = config["denoise"]["label_lambda"]
    loss, (metrics, _) = augmented_objective(setup, options, params, others, batch, key, weight=weight, train=False)
    return loss, (metrics, others)
