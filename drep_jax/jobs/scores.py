"""Scoring and comparison of arms from the configuration of a run, shared by all jobs."""

from collections.abc import Mapping, Sequence
from typing import Any

from drep_jax.data import Source
from drep_jax.evaluation import summary
from drep_jax.evaluation.arms import items_of, score_arms
from drep_jax.run.setup import Setup
from drep_jax.tasks import Items
from drep_jax.typing import Config, Tree


def reading(config: Config) -> dict[str, Any]:
    """Returns the options of `drep_jax.evaluation.arms.score_arms` from a configuration."""
    return {
        "batch_size": config["evaluate"]["batch_size"],
        "seed": config["seed"],
        "progress": config["progress"],
    }


def scores_of(
    config: Config, setup: Setup, source: Source, arms: Mapping[str, Tree], conditions: Sequence[str]
) -> dict[str, dict[str, Items]]:
    """Returns the items of all arms under all conditions, {condition: {arm: items}}."""
    return {
        condition: items_of(setup, source, scored, condition)
        for condition, scored in score_arms(setup, arms, source, conditions, **reading(config))
    }


def compared(
    config: Config,
    setup: Setup,
    results: Mapping[str, Mapping[str, Items]],
    controls: Sequence[str],
    **options: Any,
) -> dict[str, Any]:
    """Returns the report's `metrics`; options replace the task's `metrics` and `exact_test`."""
    options = {"metrics": setup.task.metrics, "exact_test": setup.task.exact_test, **options}
    resamples = config["evaluate"]["resamples"]
    return summary.summarize(results, controls=controls, resamples=resamples, seed=config["seed"], **options)
