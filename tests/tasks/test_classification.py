"""Cross-entropy and accuracies against loops over the images, and the images that a report shows."""

import base64
import io
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.metrics import top_k_accuracy_score

from drep_jax.metrics.classification import METRICS, PLACES, answers, expected_hits, hits
from drep_jax.tasks import Exhibit
from drep_jax.tasks.classification import SHOWN, Classification
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


# ---- what a report shows ---------------------------------------------------------------------------------------------


class Photos:
    """Forty images, each of one gray, of four named classes."""

    name, num_classes, note = "photos", 4, None

    def __init__(self, class_names):
        self.class_names = class_names

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"image": np.full((8, 8, 3), 5 * index, np.uint8), "label": np.int32(index % 4)}


def exhibit(before, after, confidence=None, names=("cat", "dog", "eel", "fox"), seed=0, index=None):
    """Returns what two arms have answered to the first images of `Photos`, shown as negatives."""
    index = np.arange(len(before)) if index is None else index
    labels = index % 4
    sure = np.full(len(before), 0.5) if confidence is None else confidence

    def rows(answers):
        return {"answer": np.array(answers), "confidence": sure, "acc@1": (answers == labels).astype(float)}

    return Exhibit(
        source=Photos(names),
        condition="gaussian:60",
        arms={"baseline": {}, "measured": {}},
        index=index,
        statistics={"baseline": rows(before), "measured": rows(after)},
        look=lambda networks: {},
        picture=lambda number: np.full((8, 8, 3), 255 - 5 * number, np.uint8),
        outputs=lambda number: ({}, {}),
        sites=[],
        alone=lambda name: {},
        seed=seed,
    )


def gray(encoded):
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as opened:
        return int(np.asarray(opened).mean().round())


def test_images_whose_answer_changed_come_first_the_surest_of_each_kind_before_the_others():
    right = np.arange(40) % 4
    before, after = right.copy(), right.copy()
    before[[1, 2, 3, 4, 5]] = (right[[1, 2, 3, 4, 5]] + 1) % 4  # corrected
    after[[10, 11]] = (right[[10, 11]] + 1) % 4  # broken
    before[20], after[20] = (right[20] + 1) % 4, (right[20] + 2) % 4  # another wrong answer
    before[30] = after[30] = (right[30] + 1) % 4  # wrong and unchanged
    sure = np.linspace(0.3, 0.9, 40)
    shown = Classification().examples(exhibit(before, after, sure))["examples"]
    assert shown["counts"] == {"corrected": 5, "broken": 2, "changed": 1} and shown["of"] == 40
    assert (shown["condition"], shown["arms"]) == ("gaussian:60", ["baseline", "measured"])
    expected = [(5, "corrected"), (11, "broken"), (20, "changed"), (4, "corrected"), (10, "broken"), (3, "corrected")]
    assert [(image["index"], image["why"]) for image in shown["images"][:6]] == expected
    assert len(shown["images"]) == SHOWN == 8
    for image in shown["images"][6:]:
        assert image["why"] == "drawn at random" and before[image["index"]] == after[image["index"]]
    for image in shown["images"]:
        row, names = image["index"], ("cat", "dog", "eel", "fox")
        assert image["label"] == names[row % 4]
        for arm, classes in (("baseline", before), ("measured", after)):
            assert image["answers"][arm] == {"answer": names[classes[row]], "confidence": pytest.approx(sure[row])}
        assert abs(gray(image["clean"]) - 5 * row) <= 2 and abs(gray(image["corrupted"]) - (255 - 5 * row)) <= 2


def test_examples_are_those_of_the_images_that_were_read():
    index = np.arange(39, 19, -1)  # others are unreadable
    before = np.zeros(20, int)
    shown = Classification().examples(exhibit(before, index % 4, index=index))["examples"]
    assert shown["of"] == 20 and shown["counts"] == {"corrected": 15, "broken": 0, "changed": 0}
    for image in shown["images"]:
        assert image["label"] == ("cat", "dog", "eel", "fox")[image["index"] % 4]
        assert image["answers"]["measured"]["answer"] == image["label"]


def test_equal_arms_show_images_drawn_at_random_by_the_seed():
    same = np.zeros(40, int)
    draws = set()
    for seed in range(4):
        shown = Classification().examples(exhibit(same, same, names=None, seed=seed))["examples"]
        assert shown["counts"] == {"corrected": 0, "broken": 0, "changed": 0}
        assert {image["why"] for image in shown["images"]} == {"drawn at random"}
        assert all(image["label"] == str(image["index"] % 4) for image in shown["images"])
        draws.add(tuple(image["index"] for image in shown["images"]))
    assert len(draws) == 4


def test_no_images_show_nothing():
    assert Classification().examples(exhibit(np.zeros(0, int), np.zeros(0, int))) == {}


def test_a_run_shows_examples_with_the_names_of_its_classes(finished):
    shown = finished.report["examples"]
    entry = finished.report["metrics"][shown["condition"]]
    assert shown["arms"] == ["baseline", "algorithm1"] and shown["of"] == entry["n"] == 600
    change = 100 * (shown["counts"]["corrected"] - shown["counts"]["broken"]) / 600
    assert change == pytest.approx(entry["difference"]["algorithm1 - baseline"]["acc@1"])
    largest = max(abs(e["difference"]["algorithm1 - baseline"]["acc@1"]) for e in finished.report["metrics"].values())
    assert abs(change) == pytest.approx(largest), "the condition under which the arms differ most"
    assert len(shown["images"]) == SHOWN
    source = finished.setup.test
    for image in shown["images"]:
        item = source[image["index"]]
        assert image["label"] == source.class_names[int(item["label"])]
        with Image.open(io.BytesIO(base64.b64decode(image["clean"]))) as opened:
            assert np.abs(np.asarray(opened).astype(int) - item["image"]).mean() < 12  # it is a JPEG
        right = {arm: answer["answer"] == image["label"] for arm, answer in image["answers"].items()}
        expected = {"corrected": (False, True), "broken": (True, False), "changed": (False, False)}
        if image["why"] in expected:
            assert tuple(right.values()) == expected[image["why"]]
    assert os.path.getsize(os.path.join(finished.directory, "plots", "examples.png")) > 2000
    assert "answers" in pathlib.Path(finished.directory, "report.md").read_text(encoding="utf-8")


def test_weighted_agreement_is_the_expected_accuracy_under_the_backbones_probabilities():
    """Labels drawn from the clean probabilities: the mean of the hits tends to the weighted agreement."""
    task, clean = Classification(weighted=True), jnp.asarray(2 * LOGITS)
    other = clean + np.random.default_rng(5).normal(size=clean.shape)
    pseudo = task.pseudo_labels(clean)
    chances = np.asarray(jax.nn.softmax(clean))
    assert np.array_equal(pseudo["label"], np.argmax(clean, -1))
    own, theirs = (np.asarray(task.statistics(logits, pseudo)["acc@1"]) for logits in (clean, other))
    np.testing.assert_allclose(own, chances.max(-1), rtol=1e-5)
    assert (theirs <= own + 1e-6).all() and theirs.mean() < own.mean()
    rng, answer = np.random.default_rng(6), np.argmax(np.asarray(other), -1)
    drawn = np.stack([rng.choice(12, 2000, p=row / row.sum()) for row in chances.astype(np.float64)], axis=1)
    assert np.mean(answer == drawn) == pytest.approx(theirs.mean(), abs=0.01)
    order = np.argsort(-np.asarray(other), axis=-1)[:, :5]
    five = np.take_along_axis(chances, order, axis=-1).sum(-1)
    np.testing.assert_allclose(expected_hits(other, chances)["acc@5"], five, rtol=1e-5)
    broken = other.at[3, 2].set(np.nan)
    assert expected_hits(broken, chances)["acc@1"][3] == 0
    assert "chances" not in Classification().pseudo_labels(clean)
