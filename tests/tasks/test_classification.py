"""Cross-entropy and accuracies against loops over the images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import top_k_accuracy_score

from drep_jax.metrics.classification import METRICS, PLACES, answers, hits
from drep_jax.tasks.losses import cross_entropy

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
    found = cross_entropy(jnp.asarray(LOGITS), {"label": jnp.asarray(LABELS)}, smoothing)
    np.testing.assert_allclose(found, total / 50, rtol=1e-5)


def test_loss_of_mixed_images_is_that_of_both_labels_in_their_shares():
    share = np.random.default_rng(2).uniform(size=50).astype(np.float32)
    mixed = {"label": jnp.asarray(LABELS), "label2": jnp.asarray(LABELS[::-1].copy()), "share": jnp.asarray(share)}
    each = [
        share[i] * float(cross_entropy(jnp.asarray(LOGITS[i : i + 1]), {"label": mixed["label"][i : i + 1]}, 0.1))
        + (1 - share[i])
        * float(cross_entropy(jnp.asarray(LOGITS[i : i + 1]), {"label": mixed["label2"][i : i + 1]}, 0.1))
        for i in range(50)
    ]
    np.testing.assert_allclose(cross_entropy(jnp.asarray(LOGITS), mixed, 0.1), np.mean(each), rtol=1e-5)


def accuracies(logits, labels):
    """Hits as NumPy arrays, computed by a compiled program as in an evaluation."""
    rows = jax.jit(hits)(jnp.asarray(logits), jnp.asarray(labels))
    return {name: np.asarray(values) for name, values in rows.items()}


def by_a_loop(logits, labels):
    """Hits of one image after the other."""
    rows = {f"acc@{k}": [] for k in PLACES}
    for row, label in zip(logits, labels, strict=True):
        before = sum(row[other] >= row[label] for other in range(len(row)) if other != label)
        for k in PLACES:
            rows[f"acc@{k}"].append(float(before < k and all(np.isfinite(row))))
    return rows


def test_scores():
    scores = accuracies(LOGITS, LABELS)
    assert list(scores) == ["acc@1", "acc@5"] == list(METRICS)
    for k in (1, 5):
        assert scores[f"acc@{k}"].shape == (50,) and set(scores[f"acc@{k}"]) == {0.0, 1.0}
        expected = top_k_accuracy_score(LABELS, LOGITS, k=k, labels=range(12))
        assert METRICS[f"acc@{k}"](scores, np.ones(50)) == scores[f"acc@{k}"].mean(dtype=np.float64) == expected


@given(
    arrays(np.float32, (4, 7), elements=st.sampled_from([0.0, 1.0, 2.0, -1.0, np.nan, np.inf, -np.inf])),
    arrays(np.int32, 4, elements=st.integers(0, 6)),
)
@settings(max_examples=60, deadline=None)
def test_ties_and_numbers_that_are_none_against_a_loop(logits, labels):
    scores = accuracies(logits, labels)
    for name, expected in by_a_loop(logits, labels).items():
        assert scores[name].tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["label", "other", "all"])
def test_an_image_whose_logits_are_no_numbers_is_wrong(bad, place):
    logits = np.eye(10, dtype=np.float32)[:4]
    assert accuracies(logits, np.arange(4))["acc@1"].all()
    columns = {"label": 2, "other": 9, "all": slice(None)}[place]
    logits[2, columns] = bad
    for values in accuracies(logits, np.arange(4)).values():
        assert values[[0, 1]].all() and values[2] == 0


def test_answers_are_the_class_and_its_probability():
    told = answers(jnp.asarray(LOGITS))
    exponents = np.exp(LOGITS.astype(np.float64))
    np.testing.assert_array_equal(told["answer"], np.argmax(LOGITS, axis=1))
    np.testing.assert_allclose(told["confidence"], exponents.max(1) / exponents.sum(1), rtol=1e-5)


def test_ties_count_against_the_network():
    constant = np.zeros((3, 10), np.float32)
    assert not accuracies(constant, np.array([0, 5, 9]))["acc@1"].any()
    nearly = np.float32([[1, 1, 0, 0, 0, 0]])
    scores = accuracies(nearly, np.array([0]))
    assert scores["acc@1"] == [0] and scores["acc@5"] == [1]


def test_few_classes():
    assert accuracies(np.eye(3, dtype=np.float32), np.arange(3))["acc@5"].all()
