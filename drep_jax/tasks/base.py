"""The task convention: everything that depends on what a label means, in one object a task.

No file outside tasks/, metrics/, configs/ and docs/ names a task. The rest of the project asks the object of the run
(`Setup.task`) for what it needs; `Task` holds the defaults, so that a task states only what is its own.

From images to a table, the outputs of a network go through three steps:

    outputs ──statistics──▶ one row an image ──items──▶ one row an item ──metrics──▶ one number

`statistics` runs on the device, batch by batch, so that the host never holds the outputs of a test set. `items` runs once,
on the host, over the rows of the whole split; an item is what intervals resample, an image or, for rankings, a query.
A metric is a function of (statistics of n items, weights of the items): with weights 1 it is the published number, and with
the weights of a resample of the items it is that resample's number.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from drep_jax.data.columns import Column
from drep_jax.data.loader import Order
from drep_jax.data.source import Source
from drep_jax.metrics.reducers import Metric
from drep_jax.typing import Batch, Config, Tree


class Items(NamedTuple):
    """What is compared between two arms.

    Attributes:
      statistics: a tree of arrays whose first axis is that of the items.
      clusters: (n,) what each item belongs to where intervals resample clusters, such as the queries of a person; or None.
    """

    statistics: Tree
    clusters: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A labeled stage that a run will train.

    Attributes:
      name: of the stage.
      section: of its settings.
      batch_setting: the setting that holds its batch size.
      batch_size: images a step, over all devices.
      parts: parts that a device's share of a batch is cut into (`accumulate`).
      device_count: devices of all hosts.
      seed: of its order of the images.
    """

    name: str
    section: str
    batch_setting: str
    batch_size: int
    parts: int
    device_count: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """Two arms on test images, from which a task makes the pictures of a report.

    Attributes:
      source: the test images.
      condition: the one under which the arms differ most; the pictures show it.
      arms: the unchanged backbone, then the denoised one; name ↦ variables.
      index: (n,) the images that were read.
      statistics: of those, by arm, under `condition`.
      look: {name: variables} ↦ {name: statistics} of the same images, for further networks.
      picture: index of an image ↦ the image as `condition` leaves it, uint8 (height, width, 3).
      sites: names of the sites, those whose weights fusion changed most first.
      alone: name of a site ↦ variables with that site alone fused; None ↦ with none.
      seed: of what is drawn at random.
    """

    source: Source
    condition: str
    arms: Mapping[str, Tree]
    index: np.ndarray
    statistics: Mapping[str, Tree]
    look: Callable[[Mapping[str, Tree]], dict[str, Tree]]
    picture: Callable[[int], np.ndarray]
    sites: Sequence[str]
    alone: Callable[[str | None], Tree]
    seed: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Defaults of every task; see the module for the convention."""

    name: ClassVar[str] = ""
    """What `config.task` calls it."""

    metrics: ClassVar[Mapping[str, Metric]] = {}
    """Name ↦ metric; the first is the headline, by which strengths are chosen. Values are fractions."""

    criterion: ClassVar[str] = "accuracy"
    """What the headline metric is called where strengths are chosen by labels."""

    exact_test: ClassVar[str | None] = None
    """The metric of right or wrong that McNemar's test is for; None for none."""

    items_are: ClassVar[str] = "test images"
    """What an item is, in the report."""

    test_needs_head: ClassVar[bool] = True
    """Whether test images can be scored only by a head that knows their labels."""

    columns: ClassVar[tuple[Column, ...]] = ()
    """Label columns of the images, but for those of one int32 an image, which need no declaration."""

    mixes: ClassVar[bool] = False
    """Whether labels of two images can be mixed (mixup, cutmix)."""

    evaluation_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that say how test images are scored, and may differ in an evaluation of a finished run."""

    @property
    def resampled(self) -> str:
        """What the intervals resample, in the report."""
        return self.items_are

    @property
    def side_columns(self) -> tuple[str, ...]:
        """Columns of the images that the backbone is given beside the pixels."""
        return ()

    # -----------------------------------------------------------------------------------------------------------------
    # Images
    # -----------------------------------------------------------------------------------------------------------------

    def check_test(self, source: Source) -> None:
        """Raises `ConfigError` for test images that this task cannot score."""
        del source

    def corrupted_rows(self, source: Source) -> np.ndarray | None:
        """Returns which images of a test split a condition corrupts, bool (n,); None for all."""
        del source
        return None

    def order(self, source: Source, seed: int) -> Order | None:
        """Returns the order in which a labeled stage sees the images; None for a permutation of all of them."""
        del source, seed
        return None

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    def extra_params(self, backbone: nn.Module, abstract: Tree, images: Any, key: jax.Array) -> dict[str, Tree]:
        """Returns what is trained beside the backbone in labeled stages, {name: tree}."""
        del backbone, abstract, images, key
        return {}

    def extra_optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Returns the optimizers of `extra_params`, by name."""
        return {}

    def apply(self, backbone: nn.Module, variables: Tree, images: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """Returns what `loss` needs of the backbone; with `mutable` among the options, the changed collections too.

        Args:
          backbone, variables: the network.
          images: as it gets them.
          batch: the columns of the images, among them "size" where they are padded.
          **options: of `backbone.apply`.
        """
        del batch
        return backbone.apply(variables, images, **options)

    def loss(
        self, outputs: Any, batch: Mapping[str, Any], smoothing: float, extra: Mapping[str, Tree]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the loss of this device's images and what is to be logged.

        Args:
          outputs: from `apply`.
          batch: images and labels.
          smoothing: of the labels.
          extra: the parameters of `extra_params`.
        """
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------

    def without_head(self) -> "Task":
        """Returns the task of the same backbone without its head, whose `statistics` are {"feature": (width,)} an image."""
        return self

    def predict(self, backbone: nn.Module, variables: Tree, images: Any, batch: Mapping[str, Any]) -> Any:
        """Returns what `statistics` and `pseudo_labels` need of the backbone; see `apply`."""
        del batch
        return backbone.apply(variables, images)

    def statistics(self, outputs: Any, batch: Mapping[str, Any]) -> Tree:
        """Returns one row an image of a batch, on the device; entries of padded images may be anything."""
        raise NotImplementedError

    def pseudo_labels(self, outputs: Any) -> dict[str, Any]:
        """Returns the labels that clean outputs of the unfused backbone stand for, on the device, one row an image.

        A task whose labels compare images with each other returns {} and compares in `agreement` instead.
        """
        del outputs
        return {}

    def items(self, statistics: Tree, source: Source, index: np.ndarray, what: str) -> Items:
        """Returns the items of a test split.

        Args:
          statistics: of its images, first axis (n,).
          source: the split.
          index: (n,) which images those are.
          what: arm and condition, for messages.
        """
        del source, index, what
        return Items(statistics)

    def held_out_items(self, statistics: Tree, source: Source, index: np.ndarray) -> Items:
        """Returns the items of held-out training images, on which strengths are chosen by labels."""
        return self.items(statistics, source, index, "a held-out image")

    def agreement(self, statistics: Tree, reference: Tree) -> Items:
        """Returns the items by which a network is compared with the unfused backbone on clean images.

        Args:
          statistics: of the network, against `pseudo_labels`.
          reference: statistics of the unfused backbone on the clean images, likewise.
        """
        del reference
        return Items(statistics)

    # -----------------------------------------------------------------------------------------------------------------
    # Report and checks
    # -----------------------------------------------------------------------------------------------------------------

    def examples(self, exhibit: Exhibit) -> dict[str, Any]:
        """Returns the keys of the report that show single test images, {} for none (docs/report.md)."""
        del exhibit
        return {}

    def check(self, config: Config, setup: Any, plans: Sequence[StagePlan], *, chooses: bool) -> None:
        """Refuses settings, images or backbones that this task cannot use, before any work.

        Args:
          config: of the run.
          setup: its `drep_jax.run.setup.Setup`.
          plans: the labeled stages that it will train.
          chooses: whether a learner of the run chooses on held-out images.

        Raises:
          DrepError: its subclasses name the setting.
        """
        del config, setup, plans, chooses


__all__ = ["Batch", "Exhibit", "Items", "Metric", "StagePlan", "Task"]
