"""The setup of a run, built from its configuration: images, backbone, sites, schedule and task."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.core.batchnorm import with_norms
from drep_jax.core.forms import form_lines
from drep_jax.core.idle import find_idle
from drep_jax.core.layers import Layer, find_layers
from drep_jax.core.schedule import RULES, Schedule, reverse_steps
from drep_jax.core.sites import (
    Coverage,
    Site,
    assign_times,
    coverage,
    pattern_of,
    select_sites,
    with_rank,
)
from drep_jax.data import Source
from drep_jax.data.augment import augmentation_of
from drep_jax.data.collate import valid_pixels
from drep_jax.data.datasets import TEST, TRAIN, VALIDATION, Images, Labeled, open_images
from drep_jax.data.fits import pads
from drep_jax.data.labels import check_classes
from drep_jax.data.loader import normalize
from drep_jax.data.source import fit_of, image_size_of
from drep_jax.errors import ConfigError, SiteError
from drep_jax.models import abstract_variables, create_model, output_shape, takes_classes
from drep_jax.run.side import Side, SideTables, side_information
from drep_jax.tasks import Task, make_task
from drep_jax.typing import Config, Tree

FEATURES = -1
"""The `model.num_classes` of a backbone without a head."""

GALLERY = 2000
"""The `evaluate.gallery` of configurations that have none."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """Images, backbone, sites, schedule and task of a run.

    Attributes:
      backbone: the Linen module.
      abstract: shapes of its variables.
      schedule: noise schedule.
      sites: the denoised sites with their time steps.
      covered: the fraction of the backbone that they cover.
      train: training images.
      held_out: images for selection, from the split "validation".
      test: labeled test images, or None.
      features: whether the backbone has no head and outputs features instead of logits.
      mean, std: normalization of the images, on the scale 0 to 1.
      others: labeled sources merged with the first, each evaluated separately.
      headless: the backbone without its head.
      task: the meaning of outputs and labels.
      side: side-information columns with their cardinalities; see `inputs`.
      num_classes: of the first source; None if it is unlabeled.
      forms: lines on denoisers of another form than the usual one, see `drep_jax.core.forms`.
      side_tables: for each of them, value of an image ↦ value that the backbone is told, -1 for none; ()
        where all are told as they are.
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
    others: tuple[Labeled, ...]
    headless: nn.Module
    task: Task
    side: Side
    num_classes: int | None = None
    side_tables: SideTables = ()
    forms: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Source | None]:
        """All image sources of the run, by their names in messages."""
        galleries = {f"gallery of {other.name}": other.gallery for other in self.others if other.gallery is not None}
        tests: dict[str, Source | None] = {f"test of {other.name}": other.test for other in self.others}
        return {TRAIN: self.train, VALIDATION: self.held_out, TEST: self.test, **galleries, **tests}

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """The shape of one image as input of the backbone, with a batch axis."""
        return jax.ShapeDtypeStruct((1, *image_size_of(self.train), 4 if self.side else 3), jnp.float32)

    def inputs(self, batch: Mapping[str, Any]) -> jax.Array:
        """Returns the inputs of the backbone, float32 (batch, height, width, channels).

        They are normalized images. With side information, a fourth channel holds its index, the
        same at every pixel: for columns a and b it is a · (cardinality of b) + b, or -1 for an image
        whose side information is not told.

        Padding is 0, where the batch says what is padding and the backbone is told as well.

        Args:
          batch: "image", from 0 to 255, and the columns of `side`; a missing column counts as 0.
        """
        images = normalize(batch["image"], self.mean, self.std)
        if self.sizes and "size" in batch:
            _, height, width, _ = images.shape
            images = jnp.where(valid_pixels(batch["size"], (height, width))[..., None], images, 0)
        if not self.side:
            return images
        index = jnp.zeros(images.shape[:1], jnp.float32)
        known = jnp.ones(images.shape[:1], bool)
        for place, (name, count) in enumerate(self.side):
            value = jnp.asarray(batch.get(name, 0))
            if self.side_tables:
                value = jnp.asarray(self.side_tables[place])[value]
                known &= value >= 0
            index = index * count + value.astype(jnp.float32)
        index = jnp.where(known, index, -1.0) if self.side_tables else index
        plane = jnp.broadcast_to(index[:, None, None, None], (*images.shape[:3], 1))
        return jnp.concatenate([images, plane], axis=-1)

    def arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the backbone is given beside its inputs, {argument: rows}; see `Task.arguments`."""
        return self.task.arguments(self.backbone, batch)

    @property
    def sizes(self) -> bool:
        """Whether batches are to say the size of padded images, "size", since the backbone is told it."""
        return bool(self.arguments({"size": np.zeros((1, 2), np.int32)}))

    def without_head(self) -> "Setup":
        """Returns this setup with the backbone without its head, whose outputs are features."""
        return dataclasses.replace(self, backbone=self.headless, task=self.task.without_head())

    def respaced(self, *, steps: int, time_scale: float, beta_end: float | None = None) -> "Setup":
        """Returns this setup with other time steps, which do not fit denoisers learned before.

        Args:
          steps, time_scale: see `drep_jax.core.sites.assign_times`.
          beta_end: end of the noise schedule; None for no change.
        """
        schedule = self.schedule if beta_end is None else dataclasses.replace(self.schedule, beta_end=beta_end)
        sites = assign_times(self.sites, timesteps=schedule.timesteps, steps=steps, time_scale=time_scale)
        return dataclasses.replace(self, schedule=schedule, sites=sites)


def build(config: Config, kept: tuple[Images, Side] | None = None) -> Setup:
    """Opens the images, makes the backbone and finds its sites.

    Args:
      config: of the run.
      kept: images that need not be opened, with their side information; see
        `drep_jax.run.inputs`.

    Raises:
      DrepError: its subclasses name the setting that cannot be used.
    """
    data, denoise = config["data"], config["denoise"]
    schedule = Schedule(**config["schedule"])
    reverse_steps(schedule, schedule.timesteps, 1, denoise["rule"])  # an unknown rule is refused before any work
    if denoise["rule"] == "affine":
        raise ConfigError(
            f'denoise.rule "affine" is for maps given directly; choose among {sorted(RULES.keys() - {"affine"})}.'
        )
    task = make_task(config)
    _check_augmentation(config, task)
    features = config["model"].get("num_classes") == FEATURES
    images, side, side_tables = _opened(config, task, head=not features) if kept is None else (*kept, ())
    backbone, headless = _backbones(config, images, task, side)
    one_image = jax.ShapeDtypeStruct((1, *data["image_size"], 4 if side else 3), jnp.float32)
    abstract = abstract_variables(backbone, one_image)
    if not features and not takes_classes(config["model"]["name"]):
        _check_outputs(config, output_shape(backbone, abstract, one_image)[-1], images, task)
    layers = find_layers(backbone, one_image)
    sites = _sites(config, backbone, layers, one_image, schedule)
    idle = find_idle(backbone, abstract, one_image)
    made = Setup(
        backbone=backbone,
        abstract=abstract,
        schedule=schedule,
        sites=sites,
        covered=coverage(sites, abstract["params"], idle),
        forms=tuple(form_lines(sites, config["sites"]["max_width"], idle, layers)),
        train=images.train,
        held_out=images.held_out,
        test=images.test,
        features=features,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        others=images.others,
        headless=headless,
        task=task,
        side=side,
        num_classes=images.num_classes,
        side_tables=side_tables,
    )
    if kept is None and made.sizes and (pads(fit_of(images.train)) or augmentation_of(data).scale):
        _check_padded(made)
    return made


def _check_padded(setup: Setup) -> None:
    """Refuses a network that calls other layers where images are padded than where they are not, as sites are found.

    Raises:
      SiteError: naming the layers.
    """
    height, width = setup.images.shape[1:3]
    arguments = setup.arguments({"size": np.array([[max(1, height // 2), width]], np.int32)})
    padded = {layer.path: layer for layer in find_layers(setup.backbone, setup.images, **arguments)}
    strange = [
        layer.name
        for layer in dict.fromkeys(layer for site in setup.sites for layer in site.layers)
        if layer.path not in padded or padded[layer.path].calls != layer.calls or padded[layer.path].refusal
    ]
    if strange:
        raise SiteError(
            f"{type(setup.backbone).__name__} is told the size of padded images (data.resize=pad, data.scale), and then calls "
            f"{', '.join(strange)} otherwise than without it, or not at all. Call the same layers in both cases, or narrow "
            "sites.pattern."
        )


def _opened(config: Config, task: Task, *, head: bool) -> tuple[Images, Side, SideTables]:
    """Opens the images; see `drep_jax.run.side.side_information` for the rest."""
    images = open_images(
        config["data"],
        head=head,
        gallery=config["evaluate"].get("gallery", GALLERY),
        seed=config["seed"],
        test_needs_head=task.test_needs_head,
        check_test=task.check_test,
        test_resize=task.test_resize,
    )
    return images, *side_information(task, images)


def _check_augmentation(config: Config, task: Task) -> None:
    augmentation = augmentation_of(config["data"])
    for stage in ("backbone", "control"):
        if config[stage]["steps"]:
            augmentation.check_batch(config[stage]["batch_size"], f"{stage}.batch_size")
    augmentation.check_columns(task.columns)
    if augmentation.mixes and not task.mixes:
        raise ConfigError(f"data.mixup and data.cutmix mix labels, which task {task.name} cannot use; set both to 0.")


def _sites(
    config: Config,
    backbone: nn.Module,
    layers: Sequence[Layer],
    images: jax.ShapeDtypeStruct,
    schedule: Schedule,
) -> tuple[Site, ...]:
    options, denoise = config["sites"], config["denoise"]
    if options["batchnorm_bias"]:
        layers = with_norms(layers, backbone, images)
    selected = select_sites(
        layers,
        options["pattern"] or None,
        kind=options["kind"],
        max_patch_width=options["max_width"],
        concatenated=options["concatenated"],
        call_weights=options["call_weights"],
        otherwise=pattern_of(backbone),
    )
    sites = assign_times(
        selected, timesteps=schedule.timesteps, steps=denoise["steps"], time_scale=denoise["time_scale"]
    )
    if denoise["rank"] < 0:
        raise ConfigError(f"denoise.rank={denoise['rank']} must be 0, for full matrices, or more.")
    return with_rank(sites, denoise["rank"])


def _backbones(config: Config, images: Images, task: Task, side: Side) -> tuple[nn.Module, nn.Module]:
    """Returns the backbone with a head for the classes of the images, and without a head."""
    num_classes = config["model"].get("num_classes")
    fixed = not takes_classes(config["model"]["name"])  # the classes of its own output
    classes = 0 if num_classes == FEATURES else int(num_classes or images.num_classes or 0)
    if not classes and num_classes != FEATURES and not fixed:
        raise ConfigError(
            "The images are unlabeled, so say how many classes the backbone has: --config.model.num_classes=…, or "
            f"{FEATURES} if it has no head and gives features."
        )
    # Test images scored without a head need no classes. The task checks the stages that need them.
    if num_classes != FEATURES and not fixed and task.test_needs_head and (images.num_classes or 0) > classes:
        if images.test is not None:  # a folder of the test split that is no class is the usual reason
            check_classes(images.train, images.test, unknown="refuse", setting="evaluate.unknown_classes")
        raise ConfigError(
            f"model.num_classes={classes}, but {config['data']['source']} has {images.num_classes} classes."
        )
    options = {name: value for name, value in config["model"].items() if name not in ("name", "num_classes")}
    if side:
        options = {"side_info": math.prod(count for _, count in side), **options}
    size = tuple(config["data"]["image_size"])
    backbone, headless = (
        create_model(config["model"]["name"], num_classes=number, image_size=size, **options) for number in (classes, 0)
    )
    return backbone, headless


def _check_outputs(config: Config, outputs: int, images: Images, task: Task) -> None:
    """Refuses more classes than the outputs of a backbone without a field `num_classes`.

    Raises:
      ConfigError: naming both numbers.
    """
    name, num_classes = config["model"]["name"], config["model"].get("num_classes")
    if num_classes and num_classes != outputs:
        raise ConfigError(
            f"{name} has {outputs} outputs and no field num_classes, so model.num_classes={num_classes} cannot be."
        )
    if images.num_classes and images.num_classes > outputs and task.test_needs_head:
        raise ConfigError(
            f"{name} has {outputs} outputs, but {config['data']['source']} has {images.num_classes} classes. If the outputs "
            "are features and no logits, set --config.model.num_classes=-1."
        )
