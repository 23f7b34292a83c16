"""Retrieval, as in re-identification: identity loss, triplets of a batch (Hermans et al. 2017) and centres (Wen et al. 2016).

A backbone for retrieval gives one feature an image; its `outputs` give what these losses see, see `drep_jax.models.neck`.
On several devices each has triplets with the images of all of them, so the loss does not depend on their number.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from drep_jax.errors import ConfigError, did_you_mean
from drep_jax.metrics.retrieval.rerank import Rerank
from drep_jax.parallel import devices
from drep_jax.tasks import classification
from drep_jax.typing import Tree

CENTRES = "centres"
"""Name of the parameters that the centre loss trains beside the backbone."""

AGGREGATES = ("half", "sum", "mean")
METRICS = ("cosine", "euclidean")
CORRUPTED = ("both", "query", "gallery")
SIDES = {"": (), "camera": ("camera",), "view": ("view",), "camera+view": ("camera", "view")}
"""Which columns of the images make the number of their side information."""


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """A backbone gives features, whose distances rank a gallery for each query.

    Attributes:
      metric: "cosine" or "euclidean".
      rerank: (k1, k2, λ) of k-reciprocal re-ranking, or None.
      corrupted: which images of the test split a condition corrupts: "both", "query" or "gallery".
      side: columns that the backbone is told beside the image, see `SIDES`.
      identities, instances: of a batch of the labelled stages, P × K; 0 for batches of any images.
      singletons: what becomes of identities of one image there: "refuse" or "drop".
      id_weight, triplet_weight, center_weight: of the losses' sum.
      margin: of the triplets; 0 for the soft margin.
      center_lr: learning rate of the centres, by plain gradient descent.
      aggregate: of a backbone's several features and logits: "half" (the first one half, the others together the other half,
        as TransReID), "sum" (as CLIP-ReID) or "mean".
      bootstrap_unit: what intervals resample, "query" or "identity" (with all its queries, which are not independent).
      examples: queries of each kind whose ranked results a report shows.
      attributed: sites whose own effect on the ranking is measured.
      views: whether triplets are those of viewpoint-aware metric learning, for backbones with two branches.
    """

    metric: str = "cosine"
    rerank: tuple[int, int, float] | None = None
    corrupted: str = "both"
    side: tuple[str, ...] = ()
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
    examples: int = 2
    attributed: int = 0

    @property
    def branches(self) -> int:
        """Number of spaces that the two halves, or the whole, of a feature are."""
        return 2 if self.views else 1

    def start(self, backbone: nn.Module, abstract: Tree, images: Any, key: jax.Array) -> dict[str, Tree]:
        """Returns the centres of the training identities, for each feature of the backbone, drawn from N(0, 1)."""
        if not self.center_weight:
            return {}
        found = jax.eval_shape(lambda v, x: backbone.apply(v, x, method="outputs"), abstract, images)
        classes = getattr(backbone, "num_classes", 0)
        keys = jax.random.split(key, len(found["features"]))
        return {
            CENTRES: {
                str(i): jax.random.normal(keys[i], (classes, feature.shape[-1]))
                for i, feature in enumerate(found["features"])
            }
        }

    def outputs(self, backbone: nn.Module, variables: Tree, images: Any, **how: Any) -> Any:
        """Returns {"features": …, "logits": …}, and with `mutable` among the arguments the changed collections."""
        return backbone.apply(variables, images, method="outputs", **how)

    def loss(
        self, outputs: Mapping[str, Any], batch: Mapping[str, Any], smoothing: float, beside: Mapping[str, Tree]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns this device's share of the mean loss over all images, and what is to be logged.

        Args:
          outputs: "features", (batch, width) each, and "logits", (batch, identities) each.
          batch: "label", int (batch,), and for `views` "view".
          smoothing: of the labels.
          beside: the centres, if there are any.
        """
        features, logits = outputs["features"], outputs["logits"]
        hits = jnp.mean(jnp.argmax(logits[0], -1) == batch["label"])
        parts = {"id_loss": self._weighted([classification.loss(each, batch, smoothing) for each in logits])}
        if self.triplet_weight:
            parts["triplet_loss"] = self._triplets(features, batch)
        if self.center_weight:
            centres = beside[CENTRES]
            distances = [centre_loss(f, batch["label"], centres[str(i)]) for i, f in enumerate(features)]
            parts["centre_loss"] = self._weighted(distances)
        weights = {
            "id_loss": self.id_weight,
            "triplet_loss": self.triplet_weight,
            "centre_loss": self.center_weight,
        }
        return sum(weights[name] * value for name, value in parts.items()), {"accuracy": hits, **parts}

    def _weighted(self, losses: Sequence[Any]) -> Any:
        if self.aggregate == "sum" or len(losses) == 1:
            return sum(losses)
        if self.aggregate == "mean":
            return sum(losses) / len(losses)
        return 0.5 * losses[0] + 0.5 * sum(losses[1:]) / (len(losses) - 1)

    def _triplets(self, features: Sequence[Any], batch: Mapping[str, Any]) -> Any:
        labels = batch["label"]
        if not self.views:
            return self._weighted([triplet_loss(each, labels, self.margin) for each in features])
        same, different = features
        return view_triplet_loss(same, different, labels, batch["view"], self.margin)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def triplet_loss(
    features: Float[Array, "batch width"], labels: Int[Array, " batch"], margin: float
) -> Float[Array, ""]:
    """Returns the batch-hard triplet loss: each image against its farthest positive and its nearest negative.

    mean over anchors a of [max_p d(a, p) − min_n d(a, n) + m]₊, or with m = 0 of log(1 + exp(max_p d − min_n d)), the soft
    margin (Hermans et al. 2017, Eq. 5), d Euclidean. An image is no positive of its own; anchors that lack a positive or a
    negative are left out of the mean.

    Args:
      features: of this device's images; positives and negatives are sought on all devices.
      labels: their identities.
      margin: m, in units of the features.
    """
    distances, equal, self_pair = _pairs(features, labels)
    return _hardest([(distances, equal & ~self_pair)], [(distances, ~equal)], margin)


def view_triplet_loss(
    same: Float[Array, "batch width"],
    different: Float[Array, "batch width"],
    labels: Int[Array, " batch"],
    views: Int[Array, " batch"],
    margin: float,
) -> Float[Array, ""]:
    """Returns the triplet losses of viewpoint-aware metric learning (Chu et al. 2019), batch-hard.

    Pairs of one view are compared in the first space, S, pairs of different views in the second, D. Within a space,
    positives have to be nearer than negatives; across, positives of another view (in D) nearer than negatives of the same
    view (in S), which look more alike: L = L_S + L_D + L_cross.

    Args:
      same, different: features of the two branches.
      labels, views: of the images.
      margin: see `triplet_loss`.
    """
    in_s, equal, self_pair = _pairs(same, labels)
    in_d = _pairs(different, labels)[0]
    one_view = views[:, None] == devices.gathered(views)[None]
    positive, negative = equal & ~self_pair, ~equal
    return (
        _hardest([(in_s, positive & one_view)], [(in_s, negative & one_view)], margin)
        + _hardest([(in_d, positive & ~one_view)], [(in_d, negative & ~one_view)], margin)
        + _hardest([(in_d, positive & ~one_view)], [(in_s, negative & one_view)], margin)
    )


def centre_loss(
    features: Float[Array, "batch width"], labels: Int[Array, " batch"], centres: Float[Array, "classes width"]
) -> Float[Array, ""]:
    """Returns the mean squared distance of features from the centres of their identities (Wen et al. 2016, twice Eq. 2)."""
    return jnp.mean(jnp.sum((features - centres[labels]) ** 2, axis=-1))


def _pairs(
    features: Float[Array, "batch width"], labels: Int[Array, " batch"]
) -> tuple[Float[Array, "batch all"], Bool[Array, "batch all"], Bool[Array, "batch all"]]:
    """Returns distances from this device's images to all devices', where identities are equal, and where images are."""
    everyone, theirs = devices.gathered(features), devices.gathered(labels)
    squares = jnp.sum(features**2, -1)[:, None] + jnp.sum(everyone**2, -1)[None]
    squares = squares - 2 * jnp.matmul(features, everyone.T, precision=jax.lax.Precision.HIGHEST)
    # The root has no derivative at 0.
    distances = jnp.sqrt(jnp.maximum(squares, 1e-12))
    first = devices.device_index() * len(features)
    own = (first + jnp.arange(len(features)))[:, None] == jnp.arange(len(everyone))[None]
    return distances, labels[:, None] == theirs[None], own


def _hardest(positives: Sequence[Any], negatives: Sequence[Any], margin: float) -> Float[Array, ""]:
    """Returns the mean over all devices' anchors, as this device's share of it."""
    far = jnp.max(jnp.concatenate([jnp.where(mask, d, -jnp.inf) for d, mask in positives], axis=1), axis=1)
    near = jnp.min(jnp.concatenate([jnp.where(mask, d, jnp.inf) for d, mask in negatives], axis=1), axis=1)
    complete = jnp.isfinite(far) & jnp.isfinite(near)
    gap = jnp.where(complete, far, 0.0) - jnp.where(complete, near, 0.0)
    each = jax.nn.softplus(gap) if margin == 0 else jax.nn.relu(gap + margin)
    count = devices.total(jnp.sum(complete))
    # The step takes the mean over devices.
    return devices.axis_size() * jnp.sum(jnp.where(complete, each, 0.0)) / jnp.maximum(count, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def make_retrieval(config: Mapping[str, Any]) -> Retrieval:
    """Returns the task as `config.retrieval` asks for it.

    Raises:
      ConfigError: naming the setting.
    """
    options = config["retrieval"]
    for name, known in (
        ("metric", METRICS),
        ("corrupted", CORRUPTED),
        ("side", SIDES),
        ("aggregate", AGGREGATES),
        ("singletons", ("refuse", "drop")),
        ("bootstrap_unit", ("query", "identity")),
    ):
        if options[name] not in known:
            raise ConfigError(f'Unknown retrieval.{name} "{options[name]}".{did_you_mean(options[name], known)}')
    rerank = tuple(options["rerank"]) or None
    if rerank:
        if len(rerank) != 3:
            raise ConfigError(f"retrieval.rerank={rerank}: expected (k1, k2, λ), such as (20, 6, 0.3), or () for none.")
        try:
            Rerank(*rerank)
        except ConfigError as error:
            raise ConfigError(f"retrieval.rerank={rerank}: {error}") from error
        if options["views"]:
            raise ConfigError("retrieval.rerank compares neighbours in one space, and retrieval.views makes two.")
    for name in ("id_weight", "triplet_weight", "center_weight", "margin", "center_lr", "examples", "attributed"):
        if not (math.isfinite(options[name]) and options[name] >= 0):
            raise ConfigError(f"retrieval.{name}={options[name]} must be a number of at least 0.")
    if not options["id_weight"] and not options["triplet_weight"]:
        raise ConfigError("retrieval.id_weight and retrieval.triplet_weight are both 0, so labels would teach nothing.")
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
    given = {name: value for name, value in options.items() if name in fields}
    return Retrieval(**{**given, "rerank": rerank, "side": SIDES[options["side"]]})
