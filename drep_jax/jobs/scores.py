"""Scoring and comparison of arms from the configuration of a run, shared by all jobs."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from drep_jax.core.denoisers import Denoisers
from drep_jax.data import Source
from drep_jax.data.collate import read
from drep_jax.evaluation import summary
from drep_jax.evaluation.arms import items_of, score_arms
from drep_jax.evaluation.placebo import placebo_denoisers, placebo_of_effect
from drep_jax.exporting.statistics import Statistics
from drep_jax.learners.base import direct_maps
from drep_jax.run.run import Run
from drep_jax.run.setup import Setup
from drep_jax.run.stages import key_of
from drep_jax.tasks import Items
from drep_jax.typing import Config, Tree

PLACEBO_IMAGES, PLACEBO_BATCH = 64, 16
"""Training images on which the effect of denoisers is measured, and how many at once."""


def reading(config: Config) -> dict[str, Any]:
    """Returns the options of `drep_jax.evaluation.arms.score_arms` from a configuration."""
    return {
        "batch_size": config["evaluate"]["batch_size"],
        "seed": config["seed"],
        "progress": config["progress"],
    }


def scores_of(
    config: Config,
    setup: Setup,
    source: Source,
    arms: Mapping[str, Tree],
    conditions: Sequence[str],
    *,
    statistics: Mapping[str, Statistics] = MappingProxyType({}),
) -> dict[str, dict[str, Items]]:
    """Returns the items of all arms under all conditions, {condition: {arm: items}}."""
    return {
        condition: items_of(setup, source, scored, condition)
        for condition, scored in score_arms(setup, arms, source, conditions, statistics=statistics, **reading(config))
    }


def protocol_of(setup: Setup, results: Mapping[str, Mapping[str, Items]]) -> dict[str, Any]:
    """Returns the report's `protocol`, sentences on how the scores were computed; {} for none.

    Args:
      setup: with its test images.
      results: {condition: {arm: items}}.
    """
    if setup.test is None or not results:
        return {}
    lines = setup.task.protocol(setup.test, next(iter(results.values()))["baseline"])
    return {"protocol": list(lines)} if lines else {}


def with_statistics(
    config: Config, arms: Mapping[str, Tree], names: Sequence[str]
) -> tuple[dict[str, Tree], dict[str, Statistics]]:
    """Returns the arms with a row more for each named arm and each entry of `evaluate.statistics`.

    Args:
      config: of the run.
      arms: name ↦ variables.
      names: of the arms whose networks are backbones.

    Returns:
      All arms, and {name of a further arm, such as "baseline+image:0.1": what it mixes}.
    """
    mixtures = [Statistics.parse(text) for text in config["evaluate"]["statistics"]]
    further = {f"{name}+{mixture}": (name, mixture) for mixture in mixtures for name in names}
    everything = {**arms, **{row: arms[name] for row, (name, _) in further.items()}}
    return everything, {row: mixture for row, (_, mixture) in further.items()}


def placebo_of(run: Run, variables: Tree, denoisers: Denoisers) -> Denoisers:
    """Returns the random maps that stand beside learned ones, alike as `evaluate.placebo` says.

    Args:
      run: the run.
      variables: of the unfused backbone.
      denoisers: the learned ones.
    """
    setup, key = run.setup, key_of(run.config, "placebo")
    if run.config["evaluate"]["placebo"] == "norm":
        return direct_maps(placebo_denoisers({"denoise": denoisers}, setup.sites, setup.schedule, key))
    count, size = len(setup.train), min(PLACEBO_BATCH, len(setup.train))
    spaced = np.linspace(0, count - 1, min(PLACEBO_IMAGES, count)).astype(int)
    rows = [spaced[first : first + size] for first in range(0, len(spaced) - size + 1, size)]
    read_batches = (read(setup.train, index, sizes=setup.sizes) for index in rows)
    batches = ((setup.inputs(batch), setup.arguments(batch)) for batch in read_batches)
    return direct_maps(
        placebo_of_effect(setup.backbone, variables, denoisers, setup.sites, setup.schedule, key, batches)
    )


def compared(
    config: Config,
    setup: Setup,
    results: Mapping[str, Mapping[str, Items]],
    controls: Sequence[str],
    **options: Any,
) -> dict[str, Any]:
    """Returns the report's `metrics`; options replace the task's metrics and `exact_test`."""
    if "metrics" not in options:
        options["metrics"] = setup.task.defined(next(iter(results.values()))["baseline"]) if results else {}
    options = {"exact_test": setup.task.exact_test, **options}
    resamples = config["evaluate"]["resamples"]
    return summary.summarize(results, controls=controls, resamples=resamples, seed=config["seed"], **options)
