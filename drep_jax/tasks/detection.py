"""Detection: boxes, classes and scores of objects; the network's own loss, COCO's average precision.

The network is a `drep_jax.models.detectors.base.Detector`: it turns its outputs into objects and into
losses. Labels are the columns of `drep_jax.data.objects`. What is found goes back to the stored image by
the inverse of its transform, where it is scored.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from drep_jax.data.columns import Column
from drep_jax.data.loader import Order, order_of
from drep_jax.data.objects import object_columns
from drep_jax.data.rows import boxes_back
from drep_jax.data.source import Source
from drep_jax.errors import ConfigError
from drep_jax.metrics.detection import METRICS, average_precision, image_statistics
from drep_jax.metrics.detection.masks import mask_statistics
from drep_jax.metrics.reducers import Metric
from drep_jax.models.detectors.base import Targets
from drep_jax.models.detectors.pasting import paste_masks
from drep_jax.models.detectors.proposals import Objects
from drep_jax.tasks.base import Exhibit, Items, StagePlan, Task
from drep_jax.tasks.detection_checks import check_detector, check_objects, check_run, check_settings
from drep_jax.tasks.detection_pictures import boxes_entry
from drep_jax.tasks.detection_protocol import protocol_of
from drep_jax.typing import Config, Tree

UNKNOWN_AREA = -1.0
"""The area of a pseudo-label, for which that of its box stands."""

MASKS = "masks"
"""Where the statistics of masks stand among those of boxes."""


@struct.dataclass
class Found:
    """What a network gives for a batch of images.

    Attributes:
      outputs: of its call.
      objects: that it finds, boxes in pixels of the network's input.
      network: the module, without parameters.
    """

    outputs: Any
    objects: Objects
    network: Any = struct.field(pytree_node=False)


def of_masks(statistics: Any, weights: np.ndarray, *, iou: float | None = None) -> np.ndarray:
    """Returns the average precision of masks, see `drep_jax.metrics.detection.average_precision`."""
    return average_precision(statistics[MASKS], weights, iou=iou)


BOX_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MASK_METRICS: Mapping[str, Metric] = {
    "mask AP": functools.partial(of_masks, iou=None),
    "mask AP50": functools.partial(of_masks, iou=0.5),
    "mask AP75": functools.partial(of_masks, iou=0.75),
}


@dataclasses.dataclass(frozen=True)
class Detection(Task):
    """Detection by a network that finds objects.

    Attributes:
      confidence: score from which a box of the unfused network on a clean image is a pseudo-label,
        and from which boxes are shown in pictures.
      capacity: objects that every batch has room for; 0 for those of the batch.
      masks: whether labels have masks, which networks with masks learn from.
      padding: multiple of pixels that test images of several sizes are padded to.
      shown: number of test images in the report.
      fit: how test images get their size, see `drep_jax.data.fits`.
    """

    confidence: float = 0.3
    capacity: int = 0
    masks: bool = False
    padding: int = 1
    shown: int = 6
    fit: str = ""

    name: ClassVar[str] = "detection"
    metrics: ClassVar[Mapping[str, Metric]] = {name: METRICS[name] for name in BOX_METRICS}
    criterion: ClassVar[str] = "AP"
    evaluation_settings: ClassVar[tuple[str, ...]] = ("detection.padding", "detection.examples")

    @property
    def columns(self) -> tuple[Column, ...]:  # type: ignore[override]
        """Label columns of the images."""
        return object_columns(self.capacity, masks=self.masks)

    # -----------------------------------------------------------------------------------------------------------------
    # Images
    # -----------------------------------------------------------------------------------------------------------------

    def check_test(self, source: Source) -> None:
        """Refuses test images without boxes."""
        check_objects(source, "test images")

    def has_label(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns that all images have labels: one without objects counts by what is found in it."""
        return np.ones(len(next(iter(columns.values()))), bool)

    def order(self, source: Source, seed: int) -> Order | None:
        """Returns the order of the images in a labeled stage: those without an object to learn are left out."""
        objects = getattr(source, "objects", None)
        return None if objects is None or np.all(objects) else order_of(np.flatnonzero(objects), seed)

    # -----------------------------------------------------------------------------------------------------------------
    # The network
    # -----------------------------------------------------------------------------------------------------------------

    def arguments(self, backbone: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the size of each image without padding, where the batch says it and the network takes it."""
        size = self._size(batch)
        call = type(getattr(backbone, "module", backbone)).__call__
        return {} if size is None or "size" not in inspect.signature(call).parameters else {"size": size}

    def apply(self, backbone: nn.Module, variables: Tree, images: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """Returns the parts of the network's loss by name, see `Detector.losses`."""
        detector: Any = backbone
        masks = None
        if self.masks:
            places = batch["place"][:, :, None, None]
            masks = (batch["instances"][:, None] == places) & (places >= 0)
        crowd = batch["crowd"].astype(bool) | batch["ignore"].astype(bool)
        targets = Targets(boxes=batch["boxes"], classes=batch["classes"], crowd=crowd, masks=masks)
        size = self._size(batch)
        outputs = backbone.apply(variables, images, size=size, targets=targets, **options)
        outputs, *changed = outputs if options.get("mutable") else (outputs,)
        losses = dict(detector.losses(outputs, targets, images.shape[1:3], size))
        return (losses, *changed) if changed else losses

    def loss(
        self, outputs: Any, batch: Mapping[str, Any], smoothing: float, extra: Mapping[str, Tree]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the sum of the parts of the loss, and the parts.

        Args:
          outputs: of `apply`.
          batch: images and labels.
          smoothing: 0; other values are refused before.
          extra: nothing.
        """
        del batch, smoothing, extra
        return sum(outputs.values()), {f"{name}_loss": value for name, value in outputs.items()}

    def predict(self, backbone: Any, variables: Tree, images: Any, batch: Mapping[str, Any]) -> Found:
        """Returns the network's outputs and the objects that they stand for."""
        outputs = backbone.apply(variables, images, **self.arguments(backbone, batch))
        network: Any = getattr(backbone, "module", backbone)  # that of mixed statistics
        objects = network.objects(jax.lax.stop_gradient(outputs), images.shape[1:3], self._size(batch))
        return Found(outputs, objects, network)

    def _size(self, batch: Mapping[str, Any]) -> Any:
        """Returns height and width of the images without padding, float32 (n, 2); None where nothing is padded."""
        size = batch.get("size")
        return None if size is None else size.astype(jnp.float32)

    def distillation_loss(self, outputs: Found, clean_outputs: Found) -> Any:
        """Returns the distance of what the heads give from what they give for the clean images.

        A network that has a method `distance(outputs, clean_outputs)` says itself what that is; of
        others it is the relative square of all outputs, see `Task.distillation_loss`.
        """
        of_network = getattr(outputs.network, "distance", None)
        if of_network is not None:
            return of_network(outputs.outputs, clean_outputs.outputs)
        return super().distillation_loss(outputs.outputs, clean_outputs.outputs)

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------

    def statistics(self, outputs: Found, batch: Mapping[str, Any]) -> Tree:
        """Returns the matches of each image, see `drep_jax.metrics.detection.statistics`, and what went wrong.

        "left_out" is the number of candidates that suppression had no room for; "broken" is 1 where
        outputs hold NaN.
        """
        objects = outputs.objects
        size = batch["original_size"].astype(objects.boxes.dtype)
        limit = jnp.concatenate([size[:, ::-1], size[:, ::-1]], axis=1)[:, None]
        boxes = jnp.clip(boxes_back(batch["transform"], objects.boxes), 0, limit)
        truth = boxes_back(batch["transform"], batch["boxes"])
        sides = truth[..., 2:] - truth[..., :2]
        areas = jnp.where(batch["area"] < 0, sides[..., 0] * sides[..., 1], batch["area"])
        rows = image_statistics(
            boxes,
            objects.scores,
            objects.classes,
            objects.valid,
            truth_boxes=truth,
            truth_classes=batch["classes"],
            truth_valid=batch["objects_valid"],
            num_classes=outputs.network.num_classes,
            crowd=batch["crowd"],
            ignore=batch["ignore"],
            areas=areas,
        )
        broken = [
            jnp.isnan(leaf).reshape(len(leaf), -1).any(axis=1)
            for leaf in jax.tree_util.tree_leaves(outputs.outputs)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        rows |= {"left_out": objects.left_out, "broken": jnp.stack(broken).any(axis=0).astype(jnp.int32)}
        if objects.masks is not None:
            rows |= {"boxes": boxes, "mask": jnp.round(255 * objects.masks).astype(jnp.uint8)}
        return rows

    def pseudo_labels(self, outputs: Found) -> dict[str, Any]:
        """Returns the boxes whose score reaches the confidence, in place of the labels."""
        objects = outputs.objects
        sure = objects.valid & (objects.scores >= self.confidence)
        none = jnp.zeros(sure.shape, bool)
        return {
            "boxes": jnp.where(sure[..., None], objects.boxes, 0),
            "classes": jnp.where(sure, objects.classes, -1),
            "crowd": none,
            "ignore": none,
            "area": jnp.full(sure.shape, UNKNOWN_AREA, jnp.float32),
            "objects_valid": sure,
        }

    def items(self, statistics: Tree, source: Source, index: np.ndarray, what: str) -> Items:
        """Returns the images, with the matches of masks where the network and the set have any."""
        del what
        left_out = {
            "boxes beyond the candidates of the network, which were never looked at (raise model.candidates)": int(
                np.sum(statistics["left_out"])
            ),
            "images in which nothing is found, since the outputs hold NaN": int(np.sum(statistics["broken"])),
        }
        rows = {name: values for name, values in statistics.items() if name not in ("mask", "boxes")}
        if "mask" in statistics and (truths := _outlined(source, index)) is not None:
            seen = {name: np.asarray(statistics[name]) for name in ("boxes", "scores", "classes")}
            seen["masks"] = np.asarray(statistics["mask"], np.float32) / 255
            rows[MASKS] = mask_statistics(seen, truths, np.asarray(statistics["truths"]).shape[1], paste_masks)
        return Items(rows, None, {reason: number for reason, number in left_out.items() if number})

    def held_out_items(self, statistics: Tree, source: Source, index: np.ndarray) -> Items:
        """Returns the images."""
        del source, index
        return Items(statistics)

    def defined(self, items: Items) -> Mapping[str, Metric]:
        """Returns the metrics of which the set has objects, with those of masks where there are any."""
        metrics = {**self.metrics, **(MASK_METRICS if MASKS in items.statistics else {})}
        ones = np.ones(len(items.statistics["truths"]))
        return {name: metric for name, metric in metrics.items() if np.isfinite(metric(items.statistics, ones))}

    def agreement(self, statistics: Tree, reference: Tree) -> Items:
        """Returns the images, by their matches with the unfused network's confident boxes on clean images."""
        if not np.asarray(reference["truths"])[:, :, 0].any():
            raise ConfigError(
                f"On no held-out image does the unfused network find a box with a score of {self.name}.confidence="
                f"{self.confidence:g} or more, so there is nothing to agree with. Lower it, or choose by labels "
                "(select.labels)."
            )
        return Items(statistics)

    # -----------------------------------------------------------------------------------------------------------------
    # Report and checks
    # -----------------------------------------------------------------------------------------------------------------

    def protocol(self, source: Source, items: Items) -> tuple[str, ...]:
        """Returns how scores were computed: thresholds, areas, resizing, number of images, intervals."""
        return protocol_of(self, source, items)

    def examples(self, exhibit: Exhibit) -> dict[str, Any]:
        """Returns the report's `boxes`: objects of test images, and what both arms find."""
        return boxes_entry(self, exhibit)

    def check_scoring(self, setup: Any) -> None:
        """Refuses a backbone that finds no objects, or those of other classes."""
        check_detector(self, setup)

    def check(self, config: Config, setup: Any, plans: Sequence[StagePlan], *, chooses: bool) -> None:
        """Refuses what the task cannot learn from; see `drep_jax.tasks.detection_checks`."""
        check_detector(self, setup)
        check_run(self, config, setup, plans, chooses=chooses)


def _outlined(source: Source, index: np.ndarray) -> list[dict[str, Any]] | None:
    """Returns the objects of images with their masks; None if an image has none."""
    masks_of, raw = getattr(source, "masks", None), getattr(source, "raw", None)
    if masks_of is None or raw is None:
        return None
    rows = []
    for place in map(int, index):
        masks = masks_of(place)
        if masks is None:
            return None
        names = ("boxes", "classes", "crowd", "ignore", "area")
        item = raw(place)
        rows.append({**{name: item[name] for name in names}, "masks": masks, "size": masks.shape[1:]})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def make_detection(config: Config) -> Detection:
    """Returns the task of `config.detection`.

    Raises:
      ConfigError: naming the setting.
    """
    check_settings(config)
    options = config["detection"]
    return Detection(
        confidence=float(options["confidence"]),
        capacity=int(options["objects"]),
        masks=bool(options["masks"]),
        padding=int(options["padding"]),
        shown=int(options["examples"]),
        fit=config["data"].get("test_resize", "") or config["data"]["resize"],
    )
