"""Segmentation: a class for every pixel; cross-entropy of pixels, mIoU and boundary IoU of the set.

A backbone gives logits (n, h, w, outputs) at any fraction of the image. In training, one with an
auxiliary head gives (logits, auxiliary logits). Labels are maps, uint8 (n, height, width), of which
255 is ignored.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.data.columns import Column
from drep_jax.data.fits import KEEP, parse_fit, transform_of_fit
from drep_jax.data.geometry import IGNORED
from drep_jax.data.labels import labeled_maps
from drep_jax.data.source import Source, fit_of, image_size_of, varies
from drep_jax.data.steps import Size
from drep_jax.errors import ConfigError, did_you_mean
from drep_jax.metrics import overlays, segmentation
from drep_jax.metrics.label_maps import classes_of
from drep_jax.metrics.reducers import Metric
from drep_jax.tasks.base import Exhibit, Items, StagePlan, Task
from drep_jax.tasks.losses import pixel_cross_entropy
from drep_jax.tasks.segmentation_checks import check_head, check_maps, check_run
from drep_jax.typing import Config, Tree

AVERAGES = ("labeled", "all")
VOID_ANSWERS = ("never", "wrong")
UNITS = ("image", "cluster")

TEST_RESIZE = "keep"
"""Test images keep their size unless the evaluation's settings say otherwise."""


@dataclasses.dataclass(frozen=True)
class Segmentation(Task):
    """Segmentation by the logits of a backbone at every pixel.

    Attributes:
      average: what the loss is divided by, the number of "labeled" pixels or of "all".
      auxiliary_weight: of the auxiliary head's loss.
      boundary_ratio: width of boundary regions over the diagonal of the image.
      void_outputs: indices of outputs that stand for no class of the labels. Classes are the other
        outputs, in their order.
      void_answers: "never" leaves these outputs out; with "wrong", a pixel where one of them is the
        largest has no class, which is wrong wherever there is a label.
      bootstrap_unit: unit that intervals resample, "image" or "cluster" of images.
      shown: number of test images in the report.
      fit: how test images get their size, see `drep_jax.data.fits`.
    """

    average: str = "labeled"
    auxiliary_weight: float = 0.4
    boundary_ratio: float = segmentation.RATIO
    void_outputs: tuple[int, ...] = ()
    void_answers: str = "never"
    bootstrap_unit: str = "image"
    shown: int = 6
    fit: str = TEST_RESIZE

    name: ClassVar[str] = "segmentation"
    metrics: ClassVar[Mapping[str, Metric]] = segmentation.METRICS
    criterion: ClassVar[str] = "mIoU"
    columns: ClassVar[tuple[Column, ...]] = (Column("label", np.uint8, geometry="mask", fill=IGNORED, original=True),)
    test_resize: ClassVar[str] = TEST_RESIZE
    evaluation_settings: ClassVar[tuple[str, ...]] = (
        "segmentation.boundary_ratio",
        "segmentation.void_answers",
        "segmentation.bootstrap_unit",
        "segmentation.examples",
    )

    @property
    def resampled(self) -> str:
        """Name of the units that intervals resample, in the report."""
        return "clusters of test images, such as videos" if self.bootstrap_unit == "cluster" else self.items_are

    # -----------------------------------------------------------------------------------------------------------------
    # Outputs
    # -----------------------------------------------------------------------------------------------------------------

    def classes(self, outputs: int) -> int:
        """Returns the number of classes of a head with that many outputs."""
        return outputs - len(self.void_outputs)

    def logits(self, outputs: Any) -> tuple[Any, int]:
        """Returns logits whose first channels are the classes, and the number of classes.

        Args:
          outputs: of the backbone, (n, h, w, outputs).
        """
        count = outputs.shape[-1]
        if not self.void_outputs:
            return outputs, count
        order = [place for place in range(count) if place not in self.void_outputs]
        number = len(order)
        if self.void_answers == "wrong":
            order += self.void_outputs
        return outputs[..., np.array(order)], number

    def answers(self, outputs: Any, sizes: tuple[Size, ...]) -> Any:
        """Returns the class of every pixel, int32 (n, height, width); 255 where there is none.

        Args:
          outputs: of the backbone.
          sizes: the logits are resized bilinearly to each of these in turn; () for their own.
        """
        logits, classes = self.logits(outputs)
        labels = classes_of(logits, sizes)
        return jnp.where(labels < classes, labels, IGNORED)

    def sizes(self, label_size: Size, *, test: bool) -> tuple[Size, ...]:
        """Returns the sizes that logits are resized to in turn: that of the network's input, that of the labels.

        Where images are padded, only the former: the labels' pixels are the first rows and columns.

        Args:
          label_size: (height, width) of the label maps.
          test: whether these are those of test images as they are stored.
        """
        if not test:
            return (label_size,)
        given = transform_of_fit(label_size, label_size, self.fit).size_out
        return (given,) if parse_fit(self.fit)[0] == KEEP else (given, label_size)

    # -----------------------------------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------------------------------

    def has_label(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns which images have a pixel that is not ignored, bool (n,)."""
        labels = columns.get("label")
        return super().has_label(columns) if labels is None else labeled_maps(labels)

    def loss(
        self, outputs: Any, batch: Mapping[str, Any], smoothing: float, extra: Mapping[str, Tree]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns this device's part of the mean loss of the pixels of all devices, and metrics to log.

        Args:
          outputs: logits; in training with an auxiliary head (logits, auxiliary logits).
          batch: "label", uint8 (batch, height, width).
          smoothing: label smoothing, a fraction.
          extra: nothing.
        """
        del extra
        main, *auxiliary = outputs if isinstance(outputs, tuple | list) else (outputs,)
        loss, accuracy = self._loss(main, batch["label"], smoothing)
        parts = {"accuracy": accuracy}
        for each in auxiliary:
            parts["auxiliary_loss"] = self._loss(each, batch["label"], smoothing)[0]
            loss += self.auxiliary_weight * parts["auxiliary_loss"]
        return loss, parts

    def _loss(self, outputs: Any, labels: Any, smoothing: float) -> tuple[Any, Any]:
        logits, classes = self.logits(outputs)
        return pixel_cross_entropy(logits, labels, classes, smoothing, of_all=self.average == "all")

    def distillation_loss(self, outputs: Any, clean_outputs: Any) -> Any:
        """Returns the mean Kullback-Leibler divergence of pixels from the clean probabilities, in nats.

        Σ p (log p − log q), at the resolution of the logits, with p and q the probabilities by the
        clean and by the other logits.
        """
        log_p, log_q = (jax.nn.log_softmax(self.logits(each)[0], axis=-1) for each in (clean_outputs, outputs))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------------------------------

    def statistics(self, outputs: Any, batch: Mapping[str, Any]) -> Tree:
        """Returns the pixel counts of each image; see `drep_jax.metrics.segmentation.counts`.

        Logits are enlarged to the size of the labels before the largest is taken. Test images that
        keep their sizes have labels of the original size.
        """
        labels = batch["label"]
        height, width = labels.shape[1:3]
        answers = self.answers(outputs, self.sizes((height, width), test="size" in batch))[:, :height, :width]
        classes = self.classes(outputs.shape[-1])
        return segmentation.counts(labels, answers, classes, ratio=self.boundary_ratio)

    def pseudo_labels(self, outputs: Any) -> dict[str, Any]:
        """Returns the predicted classes at the resolution of the logits."""
        return {"label": self.answers(outputs, ()).astype(jnp.uint8)}

    def items(self, statistics: Tree, source: Source, index: np.ndarray, what: str) -> Items:
        """Returns the images, in clusters of the source if intervals resample those."""
        del what
        clusters = getattr(source, "clusters", None) if self.bootstrap_unit == "cluster" else None
        return Items(statistics, None if clusters is None else np.asarray(clusters)[index])

    def held_out_items(self, statistics: Tree, source: Source, index: np.ndarray) -> Items:
        """Returns the images."""
        del source, index
        return Items(statistics)

    # -----------------------------------------------------------------------------------------------------------------
    # Report and checks
    # -----------------------------------------------------------------------------------------------------------------

    def protocol(self, source: Source, items: Items) -> tuple[str, ...]:
        """Returns how scores were computed: sums, the boundary's width, resizing, ignored pixels."""
        void = ""
        if self.void_outputs:
            how = "are left out" if self.void_answers == "never" else "are wrong answers"
            void = f" Outputs {', '.join(map(str, self.void_outputs))} stand for no class and {how}."
        ignored = 100 * segmentation.ignored_share(items.statistics)
        return (
            "mIoU, mAcc, aAcc and B-IoU are ratios of pixel counts summed over the set; mIoU is the mean over the classes that "
            "occur in labels or answers.",
            f"B-IoU is mIoU of the boundary regions: the pixels of a class within {self.boundary_ratio:g} of the image's "
            "diagonal of another label or of the border, at the size of the labels.",
            f"{self._resizing(source)} The largest logit is taken after that.{void}",
            f"{ignored:.2f} % of the pixels are ignored, in labels and answers alike.",
        )

    def _resizing(self, source: Source) -> str:
        """Returns how test images and logits are resized, in words."""
        name, *numbers = parse_fit(fit_of(source) if varies(source) else self.fit)
        if not varies(source):
            height, width = image_size_of(source)
            return (
                f'Images and labels are brought to {height} x {width} pixels ("{fit_of(source)}"), and logits enlarged to '
                "that: not to the size of the stored images."
            )
        if name == KEEP:
            padded = f", padded to multiples of {numbers[0]:g} pixels," if numbers[0] > 1 else ""
            return f"Images keep their size{padded} and logits are enlarged to it bilinearly."
        short, long, multiple = numbers
        at_most = f", the long one to {long:g} at most" if math.isfinite(long) else ""
        rounded = f", and both sides are rounded up to multiples of {multiple:g}" if multiple > 1 else ""
        return (
            f"The short side of images is resized to {short:g} pixels{at_most}{rounded}; labels keep their size. Logits are "
            "resized bilinearly to the size of the resized image, then to that of the labels."
        )

    def examples(self, exhibit: Exhibit) -> dict[str, Any]:
        """Returns the report's `overlays`: label maps of test images by both arms, changed ones first."""
        counts = {arm: np.asarray(exhibit.statistics[arm]["pixels"], np.float64).sum(axis=1) for arm in exhibit.arms}
        if not self.shown or not len(exhibit.index):
            return {}
        accuracy = {arm: rows[:, 0] / np.maximum(rows[:, 1], 1.0) for arm, rows in counts.items()}
        before, after = (accuracy[arm] for arm in exhibit.arms)

        def look(row: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
            index = int(exhibit.index[row])
            columns, outputs = exhibit.outputs(index)
            labels = columns["label"][0]
            sizes = self.sizes(labels.shape, test="size" in columns)
            maps = {
                arm: np.asarray(self.answers(each, sizes))[0, : labels.shape[0], : labels.shape[1]].astype(np.uint8)
                for arm, each in outputs.items()
            }
            return np.asarray(exhibit.picture(index), np.uint8), labels, maps

        rows = overlays.chosen(before, after, self.shown, exhibit.seed)
        images = overlays.overlays(rows, accuracy, look)
        for entry, (row, _) in zip(images, rows, strict=True):
            entry["index"] = int(exhibit.index[row])
        classes = np.asarray(exhibit.statistics[next(iter(exhibit.arms))]["pixels"]).shape[1]
        names = exhibit.source.class_names or tuple(map(str, range(classes)))
        return {
            "overlays": {
                "condition": exhibit.condition,
                "arms": list(exhibit.arms),
                "classes": list(names),
                "ignored": IGNORED,
                "improved": int(np.sum(after > before)),
                "worsened": int(np.sum(after < before)),
                "of": len(before),
                "images": images,
            }
        }

    def check_test(self, source: Source) -> None:
        """Refuses test images without label maps, or with maps that cannot be scored."""
        check_maps(source, source.num_classes, "test images")
        if self.bootstrap_unit == "cluster" and getattr(source, "clusters", None) is None:
            raise ConfigError(
                f'segmentation.bootstrap_unit="cluster", but {source.name} knows no clusters of images, such as videos. Take '
                '"image", or give the source an attribute `clusters` (docs/segmentation.md).'
            )

    def check_scoring(self, setup: Any) -> None:
        """Refuses a head of other classes than the labels."""
        check_head(self, setup)

    def check(self, config: Config, setup: Any, plans: Sequence[StagePlan], *, chooses: bool) -> None:
        """Refuses images that the task cannot learn from; see `drep_jax.tasks.segmentation_checks`."""
        check_head(self, setup)
        check_run(self, config, setup, plans, chooses=chooses)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def make_segmentation(config: Config) -> Segmentation:
    """Returns the task of `config.segmentation`.

    Raises:
      ConfigError: naming the setting.
    """
    options = config["segmentation"]
    for name, choices in (("average", AVERAGES), ("void_answers", VOID_ANSWERS), ("bootstrap_unit", UNITS)):
        if options[name] not in choices:
            raise ConfigError(f'Unknown segmentation.{name} "{options[name]}".{did_you_mean(options[name], choices)}')
    for name in ("auxiliary_weight", "examples"):
        if not (math.isfinite(options[name]) and options[name] >= 0):
            raise ConfigError(f"segmentation.{name}={options[name]} must be a number of at least 0.")
    if not 0 < options["boundary_ratio"] < 1:
        raise ConfigError(
            f"segmentation.boundary_ratio={options['boundary_ratio']} is a fraction of the image's diagonal, above 0 and "
            "below 1."
        )
    void = tuple(options["void_outputs"])
    if not all(isinstance(place, int) and place >= 0 for place in void) or len(set(void)) < len(void):
        raise ConfigError(f"segmentation.void_outputs={void}: expected different indices of outputs, such as (11,).")
    if config["model"].get("num_classes") == -1:
        raise ConfigError(
            "model.num_classes=-1 is a backbone without a head, and task segmentation scores the logits of one. Give the "
            "number of classes, or 0 for that of the images."
        )
    return Segmentation(
        average=options["average"],
        auxiliary_weight=float(options["auxiliary_weight"]),
        boundary_ratio=float(options["boundary_ratio"]),
        void_outputs=void,
        void_answers=options["void_answers"],
        bootstrap_unit=options["bootstrap_unit"],
        shown=int(options["examples"]),
        fit=config["data"].get("test_resize", "") or TEST_RESIZE,
    )
