"""Retrieval, as in re-identification: identity, triplet and center losses; ranked galleries.

A backbone for retrieval gives one feature an image; its `outputs` give what the losses see, see
`drep_jax.models.neck`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from drep_jax.data.loader import Order
from drep_jax.data.metadata import protocol_of, table_of
from drep_jax.data.reid.sampler import epoch_length, identity_order
from drep_jax.data.source import Source
from drep_jax.errors import ConfigError, NonFiniteError, did_you_mean
from drep_jax.metrics.reducers import Metric, mean_of
from drep_jax.metrics.retrieval import examples
from drep_jax.metrics.retrieval.evaluate import Result, evaluate
from drep_jax.metrics.retrieval.neighbors import neighbor_precision
from drep_jax.metrics.retrieval.rerank import Rerank
from drep_jax.tasks.base import Exhibit, Items, StagePlan, Task
from drep_jax.tasks.losses import center_loss, cosine_loss, cross_entropy, triplet_loss, view_triplet_loss
from drep_jax.tasks.retrieval_checks import check_run, check_stage, side_values_of
from drep_jax.typing import Config, Tree

CENTERS = "centres"
"""Name of the center loss's parameters, which is part of the checkpoint format."""

NEIGHBORS = 5
"""Number of nearest clean images that a network should still rank first."""

PLACES = (1, 5, 10)
"""Ranks of the cumulative matching curve: rank1, rank5, rank10."""

AGGREGATES = ("half", "sum", "mean")
DISTANCES = ("cosine", "euclidean")
CORRUPTED = ("both", "query", "gallery")
SIDES = {"": (), "camera": ("camera",), "view": ("view",), "camera+view": ("camera", "view")}
"""Setting `side` ↦ side-information columns."""


@dataclasses.dataclass(frozen=True)
class Retrieval(Task):
    """Retrieval by the distances of a backbone's features, which rank a gallery for each query.

    Attributes:
      metric: "cosine" or "euclidean".
      rerank: (k1, k2, λ) of k-reciprocal re-ranking, or None.
      corrupted: which test images a condition corrupts: "both", "query" or "gallery".
      side: side-information columns, see `SIDES`.
      unseen: what becomes of values of side information that training never saw: "refuse", "drop"
        (no embedding), "map:VALUE" or "keep".
      side_values: numbers of values that the backbone knows, if the images are of another set.
      identities, instances: P and K of the P × K batches of labeled stages; 0 for batches of any
        images.
      singletons: treatment of identities with one image in these batches, "refuse" or "drop".
      id_weight, triplet_weight, center_weight: weights in the sum of losses.
      margin: of the triplets; 0 for the soft margin.
      center_lr: learning rate of the centers, by plain gradient descent.
      aggregate: aggregation of the losses of several features and logits: "half" (weight ½ for the
        first, ½ for the mean of the others, as TransReID), "sum" (as CLIP-ReID) or "mean".
      bootstrap_unit: unit that intervals resample, "query" or "identity" (with all its queries,
        which are dependent).
      examples_each: queries of each kind in the report's ranked results.
      attributed: number of sites whose individual effect on the ranking is measured.
      views: whether to use triplets of viewpoint-aware metric learning, for backbones with two
        branches.
    """

    metric: str = "cosine"
    rerank: tuple[int, int, float] | None = None
    corrupted: str = "both"
    side: tuple[str, ...] = ()
    unseen: str = "refuse"
    side_values: tuple[int, ...] = ()
    identities: int = 16
    instances: int = 4
    singletons: str = "refuse"
    id_weight: float = 1.0
    triplet_weight: float = 1.0
    center_weight: float = 0.0
    margin: float = 0.0
    center_lr: float = 0.5
    aggregate: str = "half"
    views: bool = False
    bootstrap_unit: str = "query"
    examples_each: int = 2
    attributed: int = 0

    name: ClassVar[str] = "retrieval"
    metrics: ClassVar[Mapping[str, Metric]] = {
        name: mean_of(name) for name in ("mAP", *(f"rank{k}" for k in PLACES), "mINP")
    }
    criterion: ClassVar[str] = "mAP"
    exact_test: ClassVar[str | None] = "rank1"
    items_are: ClassVar[str] = "queries"
    test_needs_head: ClassVar[bool] = False
    evaluation_settings: ClassVar[tuple[str, ...]] = (
        "retrieval.metric",
        "retrieval.rerank",
        "retrieval.corrupted",
        "retrieval.bootstrap_unit",
        "retrieval.unseen",
        "retrieval.side_values",
    )

    @property
    def resampled(self) -> str:
        """Name of the units that intervals resample, in the report."""
        return "identities, each with all its queries" if self.bootstrap_unit == "identity" else "queries"

    @property
    def side_columns(self) -> tuple[str, ...]:
        """Side-information columns, inputs of the backbone beside the image."""
        return self.side

    @property
    def side_unseen(self) -> str:
        """What becomes of values of side information that training never saw."""
        return self.unseen

    @property
    def side_known(self) -> tuple[int, ...]:
        """Numbers of values of side information that the backbone knows, of another set."""
        return self.side_values

    @property
    def branches(self) -> int:
        """Number of spaces in a feature: 2 with views, one per half, otherwise 1."""
        return 2 if self.views else 1

    # -----------------------------------------------------------------------------------------------------------------
    # Images
    # -----------------------------------------------------------------------------------------------------------------

    def check_test(self, source: Source) -> None:
        """Refuses test images without queries and gallery, or in both if one is corrupted."""
        table = table_of(source)
        if not {"label", "query", "gallery"} <= table.keys():
            raise ConfigError(
                f'Task "retrieval" needs test images that are queries and a gallery, and {source.name} has none. Take a '
                "source for re-identification, such as reid_folder:DIR (docs/data.md)."
            )
        if self.corrupted != "both" and (both := int(np.sum(table["query"] & table["gallery"]))):
            raise ConfigError(
                f'retrieval.corrupted="{self.corrupted}", but {both} of the {len(source)} test images of {source.name} are '
                'both queries and in the gallery. Take "both".'
            )

    def corrupted_rows(self, source: Source) -> np.ndarray | None:
        """Returns which images are queries, or in the gallery, if only these are corrupted."""
        return None if self.corrupted == "both" else table_of(source)[self.corrupted] == 1

    def order(self, source: Source, seed: int) -> Order | None:
        """Returns the order of images in P × K batches (P identities, K images each), or None.

        Raises:
          DrepError: its subclasses name the images that do not fit such batches.
        """
        if not self.instances:
            return None
        labels, block = table_of(source)["label"], (self.identities, self.instances)
        options: dict[str, Any] = {"singletons": self.singletons, "names": source.class_names}
        length = epoch_length(labels, *block, **options)
        return Order(length, lambda epoch: identity_order(labels, *block, seed, epoch, **options))

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    def extra_params(self, backbone: nn.Module, abstract: Tree, images: Any, key: jax.Array) -> dict[str, Tree]:
        """Returns the centers of the training identities for each feature, drawn from N(0, 1)."""
        if not self.center_weight:
            return {}
        outputs = jax.eval_shape(lambda v, x: backbone.apply(v, x, method="outputs"), abstract, images)
        classes = getattr(backbone, "num_classes", 0)
        keys = jax.random.split(key, len(outputs["features"]))
        return {
            CENTERS: {
                str(i): jax.random.normal(keys[i], (classes, feature.shape[-1]))
                for i, feature in enumerate(outputs["features"])
            }
        }

    def extra_optimizers(self) -> dict[str, optax.GradientTransformation]:
        """Returns the optimizer of the centers; its rate does not depend on `center_weight`."""
        if not self.center_weight:
            return {}
        return {CENTERS: optax.chain(optax.scale(1.0 / self.center_weight), optax.sgd(self.center_lr))}

    def apply(self, backbone: nn.Module, variables: Tree, images: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """Returns {"features": …, "logits": …}; with `mutable` also the changed collections."""
        del batch
        return backbone.apply(variables, images, method="outputs", **options)

    def loss(
        self, outputs: Mapping[str, Any], batch: Mapping[str, Any], smoothing: float, extra: Mapping[str, Tree]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns this device's part of the mean loss over all images, and the metrics to log.

        Args:
          outputs: "features", (batch, width) each, and "logits", (batch, identities) each.
          batch: "label", int (batch,), and with `views` also "view", int (batch,).
          smoothing: label smoothing, a fraction.
          extra: the centers, if any.
        """
        features, logits = outputs["features"], outputs["logits"]
        accuracy = jnp.mean(jnp.argmax(logits[0], -1) == batch["label"])
        parts = {"id_loss": self._aggregated([cross_entropy(each, batch, smoothing) for each in logits])}
        if self.triplet_weight:
            parts["triplet_loss"] = self._triplets(features, batch)
        if self.center_weight:
            centers = extra[CENTERS]
            distances = [center_loss(f, batch["label"], centers[str(i)]) for i, f in enumerate(features)]
            parts["center_loss"] = self._aggregated(distances)
        weights = {
            "id_loss": self.id_weight,
            "triplet_loss": self.triplet_weight,
            "center_loss": self.center_weight,
        }
        return sum(weights[name] * value for name, value in parts.items()), {"accuracy": accuracy, **parts}

    def _aggregated(self, losses: Sequence[Any]) -> Any:
        if self.aggregate == "sum" or len(losses) == 1:
            return sum(losses)
        if self.aggregate == "mean":
            return sum(losses) / len(losses)
        return 0.5 * losses[0] + 0.5 * sum(losses[1:]) / (len(losses) - 1)

    def _triplets(self, features: Sequence[Any], batch: Mapping[str, Any]) -> Any:
        labels = batch["label"]
        if not self.views:
            return self._aggregated([triplet_loss(each, labels, self.margin) for each in features])
        same, different = features
        return view_triplet_loss(same, different, labels, batch["view"], self.margin)

    def distillation_loss(self, outputs: Any, clean_outputs: Any) -> Any:
        """Returns the mean of 1 − cos in each branch; for Euclidean distances the loss of `Task`."""
        if self.metric != "cosine":
            return super().distillation_loss(outputs, clean_outputs)
        return cosine_loss(outputs, clean_outputs, self.branches)

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------

    def statistics(self, outputs: Any, batch: Mapping[str, Any]) -> Tree:
        """Returns the feature of each image."""
        del batch
        return {"feature": outputs.reshape(len(outputs), -1)}

    def items(self, statistics: Tree, source: Source, index: np.ndarray, what: str) -> Items:
        """Returns mAP, mINP and CMC of each query with a match, by the protocol of the split."""
        if not np.isfinite(statistics["feature"]).all():
            raise NonFiniteError(
                f"{what} gives features with NaN or Inf, which cannot be ranked. Leave it out of --config.compare, or train "
                "it with a smaller learning rate; what the run has learned is kept."
            )
        result = self.result(statistics, source, index)
        clusters = result.identity if self.bootstrap_unit == "identity" else None
        return Items(result.scores, clusters, {"queries without a match": result.counts["without_match"]})

    def result(self, statistics: Tree, source: Source, index: np.ndarray) -> Result:
        """Returns the retrieval scores of a test split's features, by its own protocol."""
        options: dict[str, Any] = {"branches": self.branches, "rerank": self.rerank, "ks": PLACES}
        table = table_of(source, index)
        return evaluate(statistics["feature"], table, protocol_of(source), metric=self.metric, **options)

    def held_out_items(self, statistics: Tree, source: Source, index: np.ndarray) -> Items:
        """Returns the average precision of held-out images; each is a query against all others."""
        features = statistics["feature"]
        if not np.isfinite(features).all():
            return Items({"mAP": np.full(len(index), np.nan)})
        every_image = np.ones(len(index), np.int32)
        table = table_of(source, index) | {"query": every_image, "gallery": every_image}
        options: dict[str, Any] = {"metric": self.metric, "branches": self.branches}
        return Items(evaluate(features, table, protocol_of(source), **options).scores)

    def agreement(self, statistics: Tree, reference: Tree) -> Items:
        """Returns the average precision of each image's retrieval of its clean neighbors.

        The reference neighbors are the nearest images by the unfused backbone's clean features.
        Several of them instead of one make the measure sensitive to small changes of the ranking.
        """
        return Items({"mAP": neighbor_precision(statistics["feature"], reference["feature"], NEIGHBORS)})

    # -----------------------------------------------------------------------------------------------------------------
    # Report and checks
    # -----------------------------------------------------------------------------------------------------------------

    def examples(self, exhibit: Exhibit) -> dict[str, Any]:
        """Returns the report's `ranked`: galleries ranked by two arms, effects of single sites."""
        if not (self.examples_each or self.attributed):
            return {}
        named = exhibit.sites[: self.attributed]
        alone = {f"site {name}": exhibit.alone(name) for name in named}
        others = exhibit.look({"unfused": exhibit.alone(None), **alone}) if alone else {}
        results = {
            name: self.result(rows, exhibit.source, exhibit.index)
            for name, rows in {**exhibit.statistics, **others}.items()
        }
        ranked = examples.ranked(
            {arm: exhibit.statistics[arm]["feature"] for arm in exhibit.arms},
            {arm: results[arm] for arm in exhibit.arms},
            table_of(exhibit.source, exhibit.index),
            protocol_of(exhibit.source),
            lambda row: exhibit.picture(int(exhibit.index[row])),
            condition=exhibit.condition,
            metric=self.metric,
            branches=self.branches,
            each=self.examples_each,
            seed=exhibit.seed,
        )
        ranked["sites"] = [
            {"path": name, **examples.effect(results[f"site {name}"], results["unfused"])} for name in named
        ]
        return {"ranked": ranked}

    def check(self, config: Config, setup: Any, plans: Sequence[StagePlan], *, chooses: bool) -> None:
        """Refuses what this task does not support; see `drep_jax.tasks.retrieval_checks`."""
        check_run(self, config, setup, chooses=chooses)
        for plan in plans:
            check_stage(self, config, setup, plan)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def make_retrieval(config: Config) -> Retrieval:
    """Returns the task of `config.retrieval`.

    Raises:
      ConfigError: naming the setting.
    """
    options = config["retrieval"]
    for name, choices in (
        ("metric", DISTANCES),
        ("corrupted", CORRUPTED),
        ("side", SIDES),
        ("aggregate", AGGREGATES),
        ("singletons", ("refuse", "drop")),
        ("bootstrap_unit", ("query", "identity")),
    ):
        if options[name] not in choices:
            raise ConfigError(f'Unknown retrieval.{name} "{options[name]}".{did_you_mean(options[name], choices)}')
    side_values = side_values_of(options, SIDES[options["side"]])
    rerank = tuple(options["rerank"]) or None
    if rerank:
        if len(rerank) != 3:
            raise ConfigError(f"retrieval.rerank={rerank}: expected (k1, k2, λ), such as (20, 6, 0.3), or () for none.")
        try:
            Rerank(*rerank)
        except ConfigError as error:
            raise ConfigError(f"retrieval.rerank={rerank}: {error}") from error
        if options["views"]:
            raise ConfigError("retrieval.rerank compares neighbors in one space, and retrieval.views makes two.")
    for name in ("id_weight", "triplet_weight", "center_weight", "margin", "center_lr", "examples", "attributed"):
        if not (math.isfinite(options[name]) and options[name] >= 0):
            raise ConfigError(f"retrieval.{name}={options[name]} must be a number of at least 0.")
    if not options["id_weight"] and not options["triplet_weight"]:
        raise ConfigError(
            "retrieval.id_weight and retrieval.triplet_weight are both 0, so there is nothing to train; set one above 0."
        )
    if (
        options["instances"] < 0
        or options["instances"] == 1
        or options["identities"] < (2 if options["instances"] else 0)
    ):
        raise ConfigError(
            f"retrieval.identities={options['identities']} and retrieval.instances={options['instances']} make no batch for "
            "triplets: at least 2 of each, or instances 0 for batches of any images."
        )
    fields = {field.name for field in dataclasses.fields(Retrieval)}
    arguments = {name: value for name, value in options.items() if name in fields}
    return Retrieval(
        **{
            **arguments,
            "rerank": rerank,
            "side": SIDES[options["side"]],
            "side_values": side_values,
            "examples_each": options["examples"],
        }
    )
