"""The task convention: one object per task holds everything that depends on the meaning of labels.

No file outside tasks/, metrics/, configs/ and docs/ names a task. The rest of the project uses the
task of the run, `Setup.task`. `Task` holds the defaults, so a task defines only what differs.

The outputs of a network become a number in three steps:

    outputs ──statistics──▶ one row per image ──items──▶ one row per item ──metrics──▶ one number

`statistics` runs on the device, batch by batch, so the host never holds the outputs of a test set.
`items` runs once, on the host, over the rows of the whole split. An item is the unit that intervals
resample: an image, or a query of a ranking. A metric is a function of (statistics of n items,
weights of the items). Weights of 1 give the published number; the weights of a bootstrap resample
give that of the resample.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from drep_jax.data.columns import Column
from drep_jax.data.labels import MISSING, check_scorable, labeled_images
from drep_jax.data.loader import Order, order_of
from drep_jax.data.source import Source
from drep_jax.errors import ConfigError
from drep_jax.metrics.reducers import Metric
from drep_jax.typing import Batch, Config, Tree

SMALL = 1e-12
"""Added to a sum of squares that may be 0 and is divided by."""


class Items(NamedTuple):
    """The items by which two arms are compared.

    Attributes:
      statistics: a tree of arrays whose first axis is the items.
      clusters: (n,) the cluster of each item, such as the person of a query, if intervals resample
        clusters; otherwise None.
      left_out: numbers of what could not be scored, by the reason in words that follow the number,
        such as "queries without a match".
    """

    statistics: Tree
    clusters: np.ndarray | None = None
    left_out: Mapping[str, int] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A labeled stage that a run will train.

    Attributes:
      name: of the stage.
      section: of its settings.
      batch_setting: the setting of its batch size.
      batch_size: images per step, over all devices.
      parts: number of parts of each device's batch (`accumulate`).
      device_count: number of devices of all hosts.
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
      condition: the condition shown, under which the arms differ most.
      arms: name ↦ variables; the unchanged backbone, then the denoised one.
      index: (n,) indices of the images read.
      statistics: arm ↦ statistics of these images under `condition`.
      look: {name: variables} ↦ {name: statistics} of the same images, for further networks.
      picture: index of an image ↦ the image under `condition`, uint8 (height, width, 3).
      outputs: index of an image ↦ its label columns, and by arm the outputs of `predict` for it under
        `condition`, all as batches of one image.
      sites: names of the sites, by decreasing change of their weights.
      alone: name of a site ↦ variables with only that site fused; None ↦ variables without fusion.
      seed: of random choices.
    """

    source: Source
    condition: str
    arms: Mapping[str, Tree]
    index: np.ndarray
    statistics: Mapping[str, Tree]
    look: Callable[[Mapping[str, Tree]], dict[str, Tree]]
    picture: Callable[[int], np.ndarray]
    outputs: Callable[[int], tuple[Mapping[str, np.ndarray], Mapping[str, Tree]]]
    sites: Sequence[str]
    alone: Callable[[str | None], Tree]
    seed: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, with defaults; see the module for the convention."""

    name: ClassVar[str] = ""
    """Its name in `config.task`."""

    metrics: ClassVar[Mapping[str, Metric]] = {}
    """Name ↦ metric, a fraction. The first is the headline, by which strengths are selected."""

    criterion: ClassVar[str] = "accuracy"
    """Name of the headline metric where strengths are selected by labels."""

    exact_test: ClassVar[str | None] = None
    """The metric of 0 or 1 per item for McNemar's test; None for no test."""

    items_are: ClassVar[str] = "test images"
    """Name of the items in the report."""

    test_needs_head: ClassVar[bool] = True
    """Whether scoring test images needs a head for their labels."""

    test_resize: ClassVar[str] = ""
    """How test images get their size where `data.test_resize` does not say; "" as training images."""

    columns: ClassVar[tuple[Column, ...]] = ()
    """Label columns of the images; columns of one int32 per image need no declaration."""

    padding: int = 1
    """Multiple of pixels that test images of several sizes are padded to, by their batch."""

    mixes: ClassVar[bool] = False
    """Whether the labels of two images can be mixed (mixup, cutmix)."""

    evaluation_settings: ClassVar[tuple[str, ...]] = ()
    """Settings of scoring, which may differ in a later evaluation of a run."""

    @property
    def resampled(self) -> str:
        """Name of the units that intervals resample, in the report."""
        return self.items_are

    @property
    def side_columns(self) -> tuple[str, ...]:
        """Side-information columns, inputs of the backbone beside the pixels."""
        return ()

    @property
    def side_unseen(self) -> str:
        """What becomes of their values that training never saw: refuse, drop, map:VALUE or keep."""
        return "refuse"

    @property
    def side_known(self) -> tuple[int, ...]:
        """Numbers of values that the backbone knows of each, all of another set; () for those of the images."""
        return ()

    # -----------------------------------------------------------------------------------------------------------------
    # Images
    # -----------------------------------------------------------------------------------------------------------------

    def check_test(self, source: Source) -> None:
        """Refuses test images that this task cannot score, before any work.

        Raises:
          DrepError: its subclasses say what is wrong with the source; by default `DataError` for
            images without labels and for labels outside the classes.
        """
        check_scorable(source, columns=self.columns)

    def has_label(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns which images have a label to be scored by, bool (n,); the others are left out.

        By default these are the images whose label is not -1, and all without a column "label".

        Args:
          columns: label columns of n images, on the host.
        """
        labels = columns.get("label")
        count = len(next(iter(columns.values())))
        return np.ones(count, bool) if labels is None or labels.ndim > 1 else labels != MISSING

    def corrupted_rows(self, source: Source) -> np.ndarray | None:
        """Returns which test images a condition corrupts, bool (n,); None for all."""
        del source
        return None

    def order(self, source: Source, seed: int) -> Order | None:
        """Returns the order of the images in a labeled stage; None for a permutation of all.

        By default images without a label are left out, where the source knows them.
        """
        labeled = labeled_images(source)
        return None if labeled is None else order_of(np.flatnonzero(labeled), seed)

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    def extra_params(self, backbone: nn.Module, abstract: Tree, images: Any, key: jax.Array) -> dict[str, Tree]:
        """Returns the parameters trained beside the backbone in labeled stages, {name: tree}."""
        del backbone, abstract, images, key
        return {}

    def extra_optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Returns the optimizers of `extra_params`, by name."""
        return {}

    def arguments(self, backbone: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the backbone is given beside images where labels are not, {argument: rows}, one row an image.

        A task that hands "size" on gets it in all batches of padded images.
        """
        del backbone, batch
        return {}

    def apply(self, backbone: nn.Module, variables: Tree, images: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """Returns the outputs for `loss`; with option `mutable`, the changed collections, too.

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
        """Returns the loss of this device's images and the metrics to log.

        Args:
          outputs: of `apply`.
          batch: images and labels.
          smoothing: label smoothing, a fraction.
          extra: the parameters of `extra_params`.
        """
        raise NotImplementedError

    def distillation_loss(self, outputs: Any, clean_outputs: Any) -> Any:
        """Returns the distance of a network's outputs from the clean outputs of the frozen backbone.

            mean over the arrays of the outputs of Σ (o − c)² / Σ c²

        It has its minimum, 0, where both are equal. A task overrides it where its metrics see
        something else of the outputs than their values.

        Args:
          outputs: of `predict`, for the network that learns, on corrupted images.
          clean_outputs: the same of the frozen backbone on the clean images; no gradient passes.
        """
        pairs = zip(*map(jax.tree_util.tree_leaves, (outputs, clean_outputs)), strict=True)
        parts = [
            jnp.sum((output - clean) ** 2) / (jnp.sum(clean**2) + SMALL)
            for output, clean in pairs
            if jnp.issubdtype(clean.dtype, jnp.floating)
        ]
        return sum(parts) / len(parts)

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------

    def without_head(self) -> "Task":
        """Returns the task without a head, whose `statistics` are {"feature": (n, width)}."""
        return self

    def predict(self, backbone: nn.Module, variables: Tree, images: Any, batch: Mapping[str, Any]) -> Any:
        """Returns what `statistics` and `pseudo_labels` need of the backbone; see `apply`."""
        return backbone.apply(variables, images, **self.arguments(backbone, batch))

    def statistics(self, outputs: Any, batch: Mapping[str, Any]) -> Tree:
        """Returns one row per image, on the device; rows of padding may hold any value."""
        raise NotImplementedError

    def pseudo_labels(self, outputs: Any) -> dict[str, Any]:
        """Returns labels predicted from the unfused backbone's clean outputs, one row per image.

        This runs on the device. A task without labels of single images returns {} and compares
        networks in `agreement` instead.
        """
        del outputs
        return {}

    def items(self, statistics: Tree, source: Source, index: np.ndarray, what: str) -> Items:
        """Returns the items of a test split.

        Args:
          statistics: of its images, with first axis n.
          source: the split.
          index: (n,) indices of the images.
          what: arm and condition, for messages.
        """
        del source, index, what
        return Items(statistics)

    def defined(self, items: Items) -> Mapping[str, Metric]:
        """Returns the metrics that a test split defines; others have no value for any network.

        Args:
          items: of the unchanged backbone.
        """
        del items
        return self.metrics

    def held_out_items(self, statistics: Tree, source: Source, index: np.ndarray) -> Items:
        """Returns the items of held-out training images, for selection by labels."""
        return self.items(statistics, source, index, "a held-out image")

    def agreement(self, statistics: Tree, reference: Tree) -> Items:
        """Returns the items of a network's agreement with the unfused backbone on clean images.

        Args:
          statistics: of the network, against `pseudo_labels`.
          reference: of the unfused backbone on the clean images, against the same labels.
        """
        del reference
        return Items(statistics)

    # -----------------------------------------------------------------------------------------------------------------
    # Report and checks
    # -----------------------------------------------------------------------------------------------------------------

    def examples(self, exhibit: Exhibit) -> dict[str, Any]:
        """Returns the report's entries on single test images, {} for none (docs/report.md)."""
        del exhibit
        return {}

    def protocol(self, source: Source, items: Items) -> tuple[str, ...]:
        """Returns sentences for the report on how its scores were computed.

        Args:
          source: the test images.
          items: of the unchanged backbone.
        """
        del source, items
        return ()

    def check_scoring(self, setup: Any) -> None:
        """Refuses a backbone whose outputs this task cannot score, before any work.

        Args:
          setup: the `drep_jax.run.setup.Setup` of the run or evaluation.

        Raises:
          DrepError: its subclasses name the setting.
        """
        del setup

    def check(self, config: Config, setup: Any, plans: Sequence[StagePlan], *, chooses: bool) -> None:
        """Refuses settings, images or backbones that this task does not support, before any work.

        Args:
          config: of the run.
          setup: the `drep_jax.run.setup.Setup` of the run.
          plans: the labeled stages of the run.
          chooses: whether a learner of the run selects on held-out images.

        Raises:
          DrepError: its subclasses name the setting.
        """
        del config, setup, plans, chooses


def check_unmerged(others: Sequence[Source], what: str) -> None:
    """Refuses merged sources with classes of their own.

    Args:
      others: sources beside the training images whose labels are other classes.
      what: the task scores, "pixels".

    Raises:
      ConfigError: naming them.
    """
    if others:
        names = ", ".join(other.name for other in others)
        raise ConfigError(
            f"data.merge: {names} has labels, which are the classes of other images, and {what} are not scored by nearest "
            "neighbors. Merge images without labels (folder:DIR of images alone), or leave it out."
        )


__all__ = ["Batch", "Exhibit", "Items", "Metric", "StagePlan", "Task", "check_unmerged"]
