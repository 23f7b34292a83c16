"""Image classification: cross-entropy, acc@1 and acc@5; without a head, which image a feature is nearest to."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from drep_jax.metrics import classification
from drep_jax.metrics.nearest import nearest
from drep_jax.metrics.pictures import small
from drep_jax.metrics.reducers import Metric
from drep_jax.tasks.base import Exhibit, Items, Task
from drep_jax.tasks.losses import cross_entropy
from drep_jax.typing import Config, Tree

SHOWN = 8
"""Test images that a report shows."""


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """A backbone gives logits.

    Attributes:
      headless: whether it gives features instead. Then nothing can be scored against labels, and two networks agree on an
        image if the feature of one is nearest to that of the other, among all images.
    """

    headless: bool = False

    name: ClassVar[str] = "classification"
    metrics: ClassVar[Mapping[str, Metric]] = classification.METRICS
    exact_test: ClassVar[str | None] = "acc@1"
    mixes: ClassVar[bool] = True

    def loss(
        self, outputs: Any, batch: Mapping[str, Any], smoothing: float, extra: Mapping[str, Tree]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the mean cross-entropy of this device's images, in nats, and their accuracy."""
        del extra
        accuracy = jnp.mean(jnp.argmax(outputs, -1) == batch["label"])
        return cross_entropy(outputs, batch, smoothing), {"accuracy": accuracy}

    def without_head(self) -> "Classification":
        """Returns the task of features."""
        return dataclasses.replace(self, headless=True)

    def statistics(self, outputs: Any, batch: Mapping[str, Any]) -> Tree:
        """Returns hits, answer and confidence of each image; of a backbone without a head, its feature."""
        if self.headless:
            return {"feature": outputs.reshape(len(outputs), -1)}
        return {**classification.hits(outputs, batch["label"]), **classification.answers(outputs)}

    def pseudo_labels(self, outputs: Any) -> dict[str, Any]:
        """Returns the classes that the backbone answers with."""
        return {} if self.headless else {"label": jnp.argmax(outputs, axis=-1)}

    def agreement(self, statistics: Tree, reference: Tree) -> Items:
        """Returns the hits against the pseudo-labels, or whether each image's own clean feature is the nearest one."""
        if not self.headless:
            return Items(statistics)
        rows = nearest(reference["feature"], statistics["feature"])
        return Items({"acc@1": (rows == np.arange(len(rows))).astype(np.float64)})

    def examples(self, exhibit: Exhibit) -> dict[str, Any]:
        """Returns the report's `examples`: test images with both arms' answers, those whose answer changed first.

        Of the images whose answer changed, those on which the two arms are most confident come first, by turns lost and
        gained; then images drawn at random from the others, as many as are left of the places.
        """
        before, after = (exhibit.statistics[arm] for arm in exhibit.arms)
        if not len(before["answer"]):
            return {}
        gain = after["acc@1"] - before["acc@1"]
        confidence = before["confidence"] + after["confidence"]
        kinds = {
            "corrected": np.flatnonzero(gain > 0),
            "broken": np.flatnonzero(gain < 0),
            "changed": np.flatnonzero((gain == 0) & (before["answer"] != after["answer"])),
        }
        ranked = {kind: rows[np.argsort(-confidence[rows], kind="stable")].tolist() for kind, rows in kinds.items()}
        changed: list[tuple[int, str]] = []
        while any(ranked.values()) and len(changed) < SHOWN - 2:
            changed += [(ranked[kind].pop(0), kind) for kind in kinds if ranked[kind]]
        changed = changed[: SHOWN - 2]
        others = np.flatnonzero(before["answer"] == after["answer"])
        drawn = np.random.default_rng(exhibit.seed).permutation(others)[: SHOWN - len(changed)]
        rows = [*changed, *((int(row), "drawn at random") for row in drawn)]
        names = exhibit.source.class_names

        def called(label: int) -> str:
            return names[label] if names and 0 <= label < len(names) else str(label)

        images = []
        for row, why in rows:
            item = exhibit.source[int(exhibit.index[row])]
            answers = {
                arm: {"answer": called(int(own["answer"][row])), "confidence": float(own["confidence"][row])}
                for arm, own in zip(exhibit.arms, (before, after), strict=True)
            }
            images.append(
                {
                    "index": int(exhibit.index[row]),
                    "why": why,
                    "label": called(int(item["label"])),
                    "clean": small(item["image"]),
                    "corrupted": small(exhibit.picture(int(exhibit.index[row]))),
                    "answers": answers,
                }
            )
        counts = {kind: len(kinds[kind]) for kind in ("corrected", "broken", "changed")}
        return {
            "examples": {
                "condition": exhibit.condition,
                "arms": list(exhibit.arms),
                "counts": counts,
                "of": len(gain),
                "images": images,
            }
        }


def make_classification(config: Config) -> Classification:
    """Returns the task; a model of −1 classes has no head."""
    return Classification(headless=config["model"].get("num_classes") == -1)
