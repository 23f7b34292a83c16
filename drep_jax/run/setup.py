"""Builds model, images and sites from a configuration: besides the scripts, the only module that reads one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.layers import find_layers
from drep_jax.core.schedule import RULES, Schedule, reverse_steps
from drep_jax.core.sites import Coverage, Site, assign_times, coverage, select_sites, with_rank
from drep_jax.data import Source
from drep_jax.data.augment import augmentation_of
from drep_jax.data.datasets import TEST, TRAIN, VALIDATION, Images, Labelled, open_images
from drep_jax.data.loader import normalize
from drep_jax.data.metadata import table_of
from drep_jax.data.source import image_size_of
from drep_jax.errors import ConfigError
from drep_jax.models import abstract_variables, create_model, output_shape, takes_classes
from drep_jax.tasks import Retrieval, Task, make_task
from drep_jax.typing import Tree

FEATURES = -1
"""The `model.num_classes` of a backbone without a head."""


GALLERY = 2000
"""The `evaluate.gallery` of configurations that have none."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run works on.

    Attributes:
      backbone: the Linen module.
      abstract: shapes of its variables.
      schedule: noise schedule.
      sites: with time steps.
      covered: how much of the backbone they cover.
      train: images to learn from.
      held_out: images to choose on, of the split "validation".
      test: labelled images to evaluate on, or None.
      features: whether the backbone has no head: it gives features, not logits.
      mean, std: normalisation of the images, on the scale 0 to 1.
      others: labelled sources, merged with the first, that are evaluated by nearest neighbours of their features.
      headless: the backbone without its head, which gives those.
      task: what outputs and labels mean.
      side: columns of the images that the backbone is told, with how many values each has; see `inputs`.
    """

    backbone: nn.Module
    abstract: Tree
    schedule: Schedule
    sites: tuple[Site, ...]
    covered: Coverage
    train: Source
    held_out: Source
    test: Source | None
    features: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    others: tuple[Labelled, ...]
    headless: nn.Module
    task: Task
    side: tuple[tuple[str, int], ...]

    @property
    def parts(self) -> dict[str, Source | None]:
        """What is read in this run, by the name that messages call it."""
        galleries = {f"gallery of {other.name}": other.gallery for other in self.others if other.gallery is not None}
        tests: dict[str, Source | None] = {f"test of {other.name}": other.test for other in self.others}
        return {TRAIN: self.train, VALIDATION: self.held_out, TEST: self.test, **galleries, **tests}

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """A batch of one image, as the backbone gets it."""
        return jax.ShapeDtypeStruct((1, *image_size_of(self.train), 4 if self.side else 3), jnp.float32)

    def inputs(self, batch: Mapping[str, Any]) -> jax.Array:
        """Returns images as the backbone gets them, float32 (batch, height, width, channels).

        They are normalised; where the backbone is told more than the image, a fourth channel holds the number of that, the
        same at every pixel: view + views · camera.

        Args:
          batch: "image", from 0 to 255, and the columns of `side`; one that is missing counts as 0.
        """
        images = normalize(batch["image"], self.mean, self.std)
        if not self.side:
            return images
        number = jnp.zeros(images.shape[:1], jnp.float32)
        for name, count in self.side:
            number = number * count + jnp.asarray(batch.get(name, 0), jnp.float32)
        plane = jnp.broadcast_to(number[:, None, None, None], (*images.shape[:3], 1))
        return jnp.concatenate([images, plane], axis=-1)


def build(config: Mapping[str, Any]) -> Setting:
    """Opens the images, makes the backbone and finds its sites.

    Raises:
      DrepError: its subclasses name the setting that cannot be used.
    """
    data, denoise = config["data"], config["denoise"]
    size = tuple(data["image_size"])
    schedule = Schedule(**config["schedule"])
    reverse_steps(schedule, schedule.timesteps, 1, denoise["rule"])  # an unknown rule is refused before any work
    if denoise["rule"] == "affine":
        raise ConfigError(
            f'denoise.rule "affine" is for maps given directly; choose among {sorted(RULES.keys() - {"affine"})}.'
        )
    task = make_task(config)
    augmentation = augmentation_of(data)
    for stage in ("backbone", "control"):
        if config[stage]["steps"]:
            augmentation.check_batch(config[stage]["batch_size"], f"{stage}.batch_size")
    features = config["model"].get("num_classes") == FEATURES
    gallery = config["evaluate"].get("gallery", GALLERY)
    found = open_images(
        data, head=not features, gallery=gallery, seed=config["seed"], retrieval=isinstance(task, Retrieval)
    )
    if isinstance(task, Retrieval):
        check_noisy(task, found)
    classes = 0 if features else int(config["model"].get("num_classes") or found.num_classes or 0)
    fixed = not takes_classes(config["model"]["name"])  # its own output says how many
    if not classes and not features and not fixed:
        raise ConfigError(
            "The images are unlabelled, so say how many classes the backbone has: --config.model.num_classes=…, or "
            f"{FEATURES} if it has no head and gives features."
        )
    # Rankings need no class of an image; stages that do are checked for it, see `drep_jax.jobs.checks.check_retrieval`.
    if (
        found.num_classes
        and not (features or fixed)
        and found.num_classes > classes
        and not isinstance(task, Retrieval)
    ):
        raise ConfigError(f"model.num_classes={classes}, but {data['source']} has {found.num_classes} classes.")
    overrides = {name: value for name, value in config["model"].items() if name not in ("name", "num_classes")}
    side = side_of(task.side, found) if isinstance(task, Retrieval) else ()
    if side:
        overrides = {"side_info": math.prod(count for _, count in side), **overrides}
    backbone, headless = (
        create_model(config["model"]["name"], num_classes=number, image_size=size, **overrides)
        for number in (classes, 0)
    )
    images = jax.ShapeDtypeStruct((1, *size, 4 if side else 3), jnp.float32)
    abstract = abstract_variables(backbone, images)
    if fixed and not features:
        check_outputs(config, output_shape(backbone, abstract, images)[-1], found)
    chosen = select_sites(
        find_layers(backbone, images), config["sites"]["pattern"] or None, kind=config["sites"]["kind"]
    )
    sites = assign_times(chosen, timesteps=schedule.timesteps, steps=denoise["steps"], time_scale=denoise["time_scale"])
    if denoise["rank"] < 0:
        raise ConfigError(f"denoise.rank={denoise['rank']} must be 0, for full matrices, or more.")
    sites = with_rank(sites, denoise["rank"])
    return Setting(
        backbone=backbone,
        abstract=abstract,
        schedule=schedule,
        sites=sites,
        covered=coverage(sites, abstract["params"]),
        train=found.train,
        held_out=found.held_out,
        test=found.test,
        features=features,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        others=found.others,
        headless=headless,
        task=task,
        side=side,
    )


def check_outputs(config: Mapping[str, Any], outputs: int, found: Images) -> None:
    """Refuses images of more classes than a backbone without a field `num_classes` has outputs.

    Raises:
      ConfigError: naming both numbers.
    """
    name, asked = config["model"]["name"], config["model"].get("num_classes")
    if asked and asked != outputs:
        raise ConfigError(
            f"{name} has {outputs} outputs and no field num_classes, so model.num_classes={asked} cannot be."
        )
    if found.num_classes and found.num_classes > outputs and config.get("task") != "retrieval":
        raise ConfigError(
            f"{name} has {outputs} outputs, but {config['data']['source']} has {found.num_classes} classes. If the outputs "
            "are features and no logits, set --config.model.num_classes=-1."
        )


def check_noisy(task: Retrieval, found: Images) -> None:
    """Refuses to corrupt queries or gallery alone where an image is both, of which there is one feature.

    Raises:
      ConfigError: naming the source.
    """
    if task.noisy == "both":
        return
    for source in (found.test, *(other.test for other in found.others)):
        if source is not None and (count := int(np.sum(table_of(source)["query"] & table_of(source)["gallery"]))):
            raise ConfigError(
                f'retrieval.noisy="{task.noisy}", but {count} of the {len(source)} test images of {source.name} are both '
                'queries and in the gallery. Take "both".'
            )


def side_of(names: Sequence[str], found: Images) -> tuple[tuple[str, int], ...]:
    """Returns the columns that the backbone is told, with how many values each has in the data set.

    Raises:
      ConfigError: for images that have no such column.
    """
    result = []
    for name in names:
        counts = []
        for source in (found.train, found.held_out, found.test):
            if source is None or not len(source):
                continue
            column = table_of(source).get(name)
            if column is None or np.min(column) < 0:
                raise ConfigError(
                    f'retrieval.side names "{name}", which {source.name} does not tell of every image. '
                    "Leave it out, or give it (veri:DIR?views=known leaves out the images without)."
                )
            counts.append(int(np.max(column)) + 1)
            counts.append(int(getattr(source, f"{name}s", 0)))  # of the whole data set, if that is known
        result.append((name, max(counts)))
    return tuple(result)


def init_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a foreign file of weights is to be read; see `drep_jax.weights.load_foreign`."""
    backbone = config["backbone"]
    return {
        "format_name": backbone["init_format"],
        "names": backbone["init_names"],
        "state": backbone["init_state"] or None,
        "allow": tuple(backbone["init_allow"]),
        "grid": tuple(backbone["init_grid"]) or None,
    }


def respaced(setting: Setting, *, steps: int, time_scale: float, beta_end: float | None = None) -> Setting:
    """Returns the setting with other time steps; denoisers learned at the old ones do not belong to it.

    Args:
      setting: as built.
      steps, time_scale: see `drep_jax.core.sites.assign_times`.
      beta_end: other end of the noise schedule; None for the same.
    """
    schedule = setting.schedule if beta_end is None else dataclasses.replace(setting.schedule, beta_end=beta_end)
    sites = assign_times(setting.sites, timesteps=schedule.timesteps, steps=steps, time_scale=time_scale)
    return dataclasses.replace(setting, schedule=schedule, sites=sites)
