"""Checks of the learners before any work: settings, images and budgets."""

import numpy as np

from drep_jax.core.interpreter import check_measurable
from drep_jax.data.corruptions import check_spec
from drep_jax.errors import ConfigError, DataError
from drep_jax.learners import LEARNERS
from drep_jax.learners.distilled import MEASURED_FIRST, START
from drep_jax.learners.noise import PAIRS, UNPAIRED, check_noise, pairs_of
from drep_jax.run.setup import Setup
from drep_jax.run.stages import stage_of
from drep_jax.typing import Config


def check_labeled(config: Config, setup: Setup) -> None:
    """Refuses learners that the images, the backbone or the budget do not support.

    Raises:
      ConfigError: naming the learner and the setting.
    """
    requested = (config["learner"], *config["compare"])
    alternate = config["alternate"]
    order = tuple(alternate["order"])
    if sorted(order) != ["backbone", "denoise"] or alternate["period"] < 1:
        raise ConfigError(
            f"alternate.order={order} has to name denoise and backbone once each, and alternate.period="
            f"{alternate['period']} has to be at least 1 step."
        )
    if LEARNERS[config["learner"]].explicit:
        raise ConfigError(
            f'Learner "{config["learner"]}" is evaluated on the explicit path and leaves nothing to fuse or export; put it in '
            "--config.compare, beside another learner."
        )
    if "final_only" in requested and setup.features and setup.task.test_needs_head:
        raise ConfigError('Learner "final_only" denoises the input of the head, and this backbone has none.')
    if not 0.0 <= config["denoise"]["label_lambda"] <= 1.0:
        raise ConfigError(
            f"denoise.label_lambda={config['denoise']['label_lambda']} is λ of Eq. 12 and lies in [0, 1]."
        )
    for name in (name for name in requested if LEARNERS[name].labeled or LEARNERS[name].distills):
        if LEARNERS[name].labeled and (setup.features or setup.train.num_classes is None):
            what = "the backbone has no head" if setup.features else f"{setup.train.name} has none"
            raise ConfigError(f'Learner "{name}" trains with labels, but {what}. Choose a label-free learner.')
        stage = stage_of(LEARNERS[name].stage or name)
        steps, control = stage.steps(config), config["control"]["steps"]
        if not steps:
            where = ".".join(stage.steps_setting or ())
            raise ConfigError(f'Learner "{name}" would take no step; set --config.{where}=N.')
        budget = (steps, stage.batch_size(config))
        if control and budget != (control, config["control"]["batch_size"]):
            raise ConfigError(
                f'Learner "{name}" takes {budget[0]} steps of {budget[1]} images and the control arm {control} of '
                f"{config['control']['batch_size']}: with another budget it is no control. Make them equal, or leave the arm "
                "out with --config.control.steps=0."
            )


def check_distilled(config: Config, setup: Setup) -> None:
    """Refuses settings of the learners that train on the backbone's clean answers.

    Raises:
      ConfigError: naming the setting.
      DataError: for fewer pairs of images than a batch.
    """
    options = config["distilled"]
    requested = (*config["compare"], config["learner"])
    names = [name for name in requested if LEARNERS[name].distills]
    if not 0.0 <= options["clean_share"] < 1.0:
        raise ConfigError(
            f"distilled.clean_share={options['clean_share']} is the fraction of images left clean and lies in [0, 1)."
        )
    if options["init_from"] not in START:
        raise ConfigError(
            f'distilled.init_from="{options["init_from"]}" must be "measured", or "" for the backbone itself.'
        )
    if not names:
        return
    if options["init_from"] and "measured" not in requested[: requested.index(names[0])]:
        raise ConfigError(MEASURED_FIRST)
    if (
        options["init_from"]
        and "distilled_backbone" in names
        and any(layer.norm is not None for site in setup.sites for layer in site.layers)
    ):
        raise ConfigError(
            'Learner "distilled_backbone" starts from fused parameters, and with sites.batchnorm_bias fusing changes running '
            'means as well. Set --config.sites.batchnorm_bias=False, or --config.distilled.init_from="".'
        )
    if config["noise"].startswith(UNPAIRED):
        raise ConfigError(
            f'Learner "{names[0]}" learns from corrupted versions of clean images, and {config["noise"]} has none. Name a '
            "corruption, pairs:, bank: or like: in config.noise."
        )
    if config["noise"].startswith(PAIRS):
        data = config["data"]
        for name in (name for name in ("crop_scale", "randaugment", "erase") if data[name]):
            raise ConfigError(
                f'data.{name}={data[name]} would treat the two images of a pair differently, and learner "{names[0]}" '
                "learns from pairs. Set it off; data.flip and data.shift remain."
            )
        if (count := len(pairs_of(config))) < options["batch_size"]:
            raise DataError(
                f"{config['noise']} has {count} pairs, fewer than one batch: distilled.batch_size is {options['batch_size']}."
            )


def check_choosing(config: Config, setup: Setup) -> None:
    """Refuses invalid settings of the learners that select on held-out images.

    Raises:
      ConfigError: naming the setting.
      SiteError: if measured noise cannot solve a layer, such as one under `nn.vmap`.
    """
    options, select = config["measured"], config["select"]
    if "measured" in (config["learner"], *config["compare"]) and not config["noise"].startswith(UNPAIRED):
        check_measurable(setup.sites)
    if config["denoise"]["rank"]:
        full = ("wiener", "measured", "distilled")
        for name in (name for name in full if name in (config["learner"], *config["compare"])):
            raise ConfigError(
                f'Learner "{name}" gives full matrices, so denoise.rank={config["denoise"]["rank"]} is not for it.'
            )
    check_noise(config, setup)
    for name in ("draws", "vectors", "chunk"):
        if options[name] < 1:
            raise ConfigError(f"measured.{name}={options[name]} must be at least 1.")
    for place, count in (
        ("measured.images", options["images"]),
        ("select.images", select["images"]),
        ("denoise.moment_images", config["denoise"]["moment_images"]),
    ):
        if count < 0:
            raise ConfigError(f"{place}={count} is a number of images, or 0 for all.")
    if not options["clean_share"] or not all(0.0 <= fraction < 1.0 for fraction in options["clean_share"]):
        raise ConfigError(
            f"measured.clean_share={options['clean_share']} are fractions of clean images; each must lie in [0, 1)."
        )
    if not options["ridge"] >= 0:
        raise ConfigError(
            f"measured.ridge={options['ridge']} is a regularization above 0, or 0 to choose it for each site."
        )
    if not options["memory_gib"] >= 0:
        raise ConfigError(f"measured.memory_gib={options['memory_gib']} is a number of GiB and at least 0.")
    if not config["wiener"]["ratios"] or not all(ratio > 0 for ratio in config["wiener"]["ratios"]):
        raise ConfigError(f"wiener.ratios={config['wiener']['ratios']} are noise powers, each above 0.")
    if not select["strengths"] or not all(np.isfinite(t) and t >= 0 for t in select["strengths"]):
        raise ConfigError(f"select.strengths={select['strengths']} are strengths of fusion, each at least 0.")
    if not select["leading"] or not all(0.0 < fraction <= 1.0 for fraction in select["leading"]):
        raise ConfigError(
            f"select.leading={select['leading']} are fractions of the sites, first to last; each must lie in (0, 1]."
        )
    for condition in select["conditions"]:
        check_spec(condition)
