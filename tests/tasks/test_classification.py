"""Cross-entropy and accuracies against loops over the images."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from drep_jax.metrics.classification import scores as accuracies
from drep_jax.tasks import classification

LOGITS = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 12, 50)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss(smoothing):
    total = 0.0
    for row, label in zip(LOGITS.astype(np.float64), LABELS, strict=True):
        log_p = row - np.log(np.sum(np.exp(row)))
        target = np.full(12, smoothing / 12)
        target[label] += 1 - smoothing
        total -= target @ log_p
    found = classification.loss(jnp.asarray(LOGITS), {"label": jnp.asarray(LABELS)}, smoothing)
    np.testing.assert_allclose(found, total / 50, rtol=1e-5)


def test_loss_of_mixed_images_is_that_of_both_labels_in_their_shares():
    share = np.random.default_rng(2).uniform(size=50).astype(np.float32)
    mixed = {"label": jnp.asarray(LABELS), "label2": jnp.asarray(LABELS[::-1].copy()), "share": jnp.asarray(share)}
    each = [
        share[i] * float(classification.loss(jnp.asarray(LOGITS[i : i + 1]), {"label": mixed["label"][i : i + 1]}, 0.1))
        + (1 - share[i])
        * float(classification.loss(jnp.asarray(LOGITS[i : i + 1]), {"label": mixed["label2"][i : i + 1]}, 0.1))
        for i in range(50)
    ]
    np.testing.assert_allclose(classification.loss(jnp.asarray(LOGITS), mixed, 0.1), np.mean(each), rtol=1e-5)


def test_scores():
    scores = accuracies(LOGITS, LABELS)
    for k in (1, 5):
        assert scores[f"acc@{k}"].shape == (50,) and set(scores[f"acc@{k}"]) == {0.0, 1.0}
        assert scores[f"acc@{k}"].mean() == top_k_accuracy_score(LABELS, LOGITS, k=k, labels=range(12))


def test_ties_count_against_the_network():
    constant = np.zeros((3, 10), np.float32)
    assert not accuracies(constant, np.array([0, 5, 9]))["acc@1"].any()
    nearly = np.float32([[1, 1, 0, 0, 0, 0]])
    scores = accuracies(nearly, np.array([0]))
    assert scores["acc@1"] == [0] and scores["acc@5"] == [1]


def test_few_classes():
    assert accuracies(np.eye(3, dtype=np.float32), np.arange(3))["acc@5"].all()
