"""Checks of retrieval before any work: branches, neck, identities and batches with triplets."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from drep_jax.data.metadata import table_of
from drep_jax.errors import ConfigError, DataError
from drep_jax.tasks.base import StagePlan
from drep_jax.typing import Config


def check_run(task: Any, config: Config, setup: Any, *, chooses: bool) -> None:
    """Refuses a backbone or held-out images that the task cannot use.

    Args:
      task: the run's `drep_jax.tasks.retrieval.Retrieval`.
      config, setup: of the run.
      chooses: whether a learner of the run chooses on held-out images.

    Raises:
      DrepError: its subclasses name the setting.
    """
    name = config["model"]["name"]
    branches = getattr(setup.backbone, "branches", 1)
    if task.views != (branches == 2):
        raise ConfigError(
            f"retrieval.views={task.views}, but {name} has {branches} branch(es): triplets by view, and distances by "
            "view, go with a backbone that has one branch for the same view and one for different ones."
        )
    if (
        chooses
        and config["select"]["labels"]
        and len(set(table_of(setup.held_out).get("label", np.arange(2)).tolist())) < 2
    ):
        raise DataError(
            f"{setup.held_out.name} holds out one identity only, which is found at once whatever the strength. Hold out "
            "more (?held_out=…), or choose without labels: --config.select.labels=False."
        )


def check_stage(task: Any, config: Config, setup: Any, plan: StagePlan) -> None:
    """Refuses a labeled stage whose backbone, images or batches make no identities to compare.

    Raises:
      DrepError: its subclasses name the setting.
    """
    backbone, name = setup.backbone, config["model"]["name"]
    if not hasattr(backbone, "outputs"):
        raise ConfigError(
            f"Stage {plan.name} trains with identities, and {name} has no neck for their losses. Take a backbone for "
            "re-identification (docs/reid.md), or learn without labels."
        )
    identities = setup.train.num_classes or 0
    if identities > getattr(backbone, "num_classes", identities):
        raise ConfigError(
            f"Stage {plan.name} trains with identities, of which {setup.train.name} has {identities} and the backbone's "
            f"classifier {backbone.num_classes}: set --config.model.num_classes={identities}, or learn without labels."
        )
    if config["data"]["mixup"] or config["data"]["cutmix"]:
        raise ConfigError(
            "data.mixup and data.cutmix mix identities, of which triplets can make nothing; set both to 0."
        )
    if task.views and np.min(table_of(setup.train)["view"]) < 0:
        raise ConfigError(
            f"retrieval.views needs the view of every image, which {setup.train.name} does not give "
            "(veri:DIR?views=known leaves out the images without)."
        )
    size = task.identities * task.instances
    if task.instances and plan.batch_size != size:
        raise ConfigError(
            f"{plan.batch_setting}={plan.batch_size}, but retrieval.identities={task.identities} of "
            f"retrieval.instances={task.instances} images are {size}. Make them equal, or set retrieval.instances=0 for "
            "batches of any images."
        )
    part = plan.batch_size // plan.device_count // plan.parts
    if plan.parts > 1 and task.instances and part % task.instances:
        raise ConfigError(
            f"{plan.section}.accumulate={plan.parts} cuts batches into parts of {part} images a device, which hold no "
            f"whole identities of {task.instances} images."
        )
    if task.instances and task.triplet_weight and part * plan.device_count < 2 * task.instances:
        raise ConfigError(
            f"{plan.section}.accumulate={plan.parts} cuts batches into parts of one identity, where no triplet has a "
            "negative. Take fewer parts."
        )
    task.order(setup.train, plan.seed)


def side_values_of(options: Config, side: Sequence[str]) -> tuple[int, ...]:
    """Returns the setting `side_values`, checked together with `unseen`.

    Args:
      options: `config.retrieval`.
      side: names of the side-information columns.

    Raises:
      ConfigError: naming the setting.
    """
    if not re.fullmatch(r"refuse|drop|keep|map:\d{1,6}", str(options["unseen"])):
        raise ConfigError(f'retrieval.unseen="{options["unseen"]}": expected refuse, drop, keep or map:VALUE.')
    values = tuple(options["side_values"])
    if values and (len(values) != len(side) or not all(isinstance(value, int) and value > 0 for value in values)):
        raise ConfigError(
            f"retrieval.side_values={values}: expected a number above 0 for each column of side information "
            f"({', '.join(side) or 'there is none'})."
        )
    return values
