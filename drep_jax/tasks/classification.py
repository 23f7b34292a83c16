"""Image classification: cross-entropy, acc@1 and acc@5; nearest features without a head."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from drep_jax.metrics import classification
from drep_jax.metrics.nearest import nearest
from drep_jax.metrics.pictures import small
from drep_jax.metrics.reducers import Metric
from drep_jax.tasks.base import Exhibit, Items, Task
from drep_jax.tasks.losses import cross_entropy
from drep_jax.typing import Config, Tree

CHANCES = "chances"
"""Pseudo-labels with the backbone's probabilities, (n, classes)."""

SHOWN = 8
"""Number of test images in a report."""


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Classification by the logits of a backbone.

    Attributes:
      headless: whether the backbone outputs features instead. Then nothing is scored against
        labels, and two networks agree on an image if, among all images, its features by the two are
        nearest to each other.
      weighted: whether agreement weighs an answer by the probability that the backbone gives it on
        the clean image, an estimate of the accuracy, instead of counting the backbone's answers.
    """

    headless: bool = False
    weighted: bool = False

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

    def distillation_loss(self, outputs: Any, clean_outputs: Any) -> Any:
        """Returns the mean Kullback-Leibler divergence from the clean probabilities, in nats.

        Σ p (log p − log q) with p and q the probabilities by the clean and by the other logits.
        Its gradient is that of the cross-entropy against p. Features are compared as in `Task`.
        """
        if self.headless:
            return super().distillation_loss(outputs, clean_outputs)
        log_p, log_q = (jax.nn.log_softmax(logits, axis=-1) for logits in (clean_outputs, outputs))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    def without_head(self) -> "Classification":
        """Returns the task with features instead of logits."""
        return dataclasses.replace(self, headless=True)

    def statistics(self, outputs: Any, batch: Mapping[str, Any]) -> Tree:
        """Returns hits, answer and confidence of each image, or its feature without a head."""
        if self.headless:
            return {"feature": outputs.reshape(len(outputs), -1)}
        if CHANCES in batch:
            hits = classification.expected_hits(outputs, batch[CHANCES])
        else:
            hits = classification.hits(outputs, batch["label"])
        return {**hits, **classification.answers(outputs)}

    def pseudo_labels(self, outputs: Any) -> dict[str, Any]:
        """Returns the predicted classes, and with `weighted` the probabilities of all classes."""
        if self.headless:
            return {}
        chances = {CHANCES: jax.nn.softmax(outputs)} if self.weighted else {}
        return {"label": jnp.argmax(outputs, axis=-1), **chances}

    def agreement(self, statistics: Tree, reference: Tree) -> Items:
        """Returns hits on pseudo-labels, or without a head on the own clean feature as nearest."""
        if not self.headless:
            return Items(statistics)
        rows = nearest(reference["feature"], statistics["feature"])
        return Items({"acc@1": (rows == np.arange(len(rows))).astype(np.float64)})

    def examples(self, exhibit: Exhibit) -> dict[str, Any]:
        """Returns the report's `examples`: test images with answers of both arms, changed first.

        Changed answers are sorted by the confidence of both arms, alternating between corrected,
        broken and otherwise changed. Random images with unchanged answers fill the remaining
        places.
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
        random = np.random.default_rng(exhibit.seed).permutation(others)[: SHOWN - len(changed)]
        rows = [*changed, *((int(row), "drawn at random") for row in random)]
        names = exhibit.source.class_names

        def class_name(label: int) -> str:
            return names[label] if names and 0 <= label < len(names) else str(label)

        images = []
        for row, reason in rows:
            item = exhibit.source[int(exhibit.index[row])]
            answers = {
                arm: {
                    "answer": class_name(int(rows_of["answer"][row])),
                    "confidence": float(rows_of["confidence"][row]),
                }
                for arm, rows_of in zip(exhibit.arms, (before, after), strict=True)
            }
            images.append(
                {
                    "index": int(exhibit.index[row]),
                    "why": reason,
                    "label": class_name(int(item["label"])),
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
    """Returns the task; `num_classes` of −1 means a backbone without a head."""
    headless = config["model"].get("num_classes") == -1
    return Classification(headless=headless, weighted=config["select"]["weighted"])
