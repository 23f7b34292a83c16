"""Scoring of several arms: padding is masked, all arms see the same images, and the table is what the scores say."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import normalize
from drep_jax.data.npz_source import ArraySource
from drep_jax.data.source import Subset
from drep_jax.errors import ConfigError, DataError
from drep_jax.evaluation import summary
from drep_jax.evaluation.arms import items_of, score_arms
from drep_jax.metrics import classification
from drep_jax.metrics.reducers import mean_of
from drep_jax.parallel import devices
from drep_jax.tasks import Items, Task
from drep_jax.tasks.classification import Classification
from tests.setups import make_setup

MEAN, STD, SEED = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4), 11
CONDITIONS = ("clean", "gaussian:80")
METRICS = {"acc@1": mean_of("acc@1")}


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", "test", image_size=(8, 8))


@pytest.fixture(scope="module")
def arms(digits):
    first = Linear().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    other = Linear().init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))
    return {"baseline": first, "twin": first, "fused": other}


@dataclasses.dataclass(frozen=True)
class Seen(Task):
    """Whose statistics are all that it is given."""

    def statistics(self, outputs, batch):
        return {"logits": outputs, "labels": batch["label"]}


def score(digits, arms, batch_size, task=Seen(), conditions=CONDITIONS, **options):
    setup = make_setup(Linear(), np.zeros((1, 8, 8, 3), np.float32), task=task, mean=MEAN, std=STD)
    return dict(score_arms(setup, arms, digits, conditions, batch_size=batch_size, seed=SEED, **options))


@pytest.mark.parametrize("batch_size", [64, 600, 1024])
def test_scores_are_those_of_a_plain_loop(batch_size, digits, arms):
    outputs = score(digits, arms, batch_size)
    labels = [digits[i]["label"] for i in range(len(digits))]
    images = jnp.stack([digits[i]["image"] for i in range(len(digits))])
    for condition in CONDITIONS:
        noisy = corrupt(images.astype(jnp.float32), jnp.arange(len(digits)), condition, SEED)
        for name, variables in arms.items():
            found = outputs[condition].statistics[name]
            expected = Linear().apply(variables, normalize(noisy, MEAN, STD))
            assert found["logits"].shape == (600, 10)
            np.testing.assert_allclose(found["logits"], expected, atol=2e-4)
            assert np.array_equal(found["labels"], labels)
        assert np.array_equal(outputs[condition].index, np.arange(600))
        assert set(outputs[condition].columns) == {"label"}
        assert np.array_equal(outputs[condition].columns["label"], labels)
    clean, noisy = (outputs[condition].statistics["fused"]["logits"] for condition in CONDITIONS)
    assert np.abs(clean - noisy).max() > 0.1


def test_equal_arms_get_equal_scores_under_noise(digits, arms):
    outputs = score(digits, arms, 64)["gaussian:80"].statistics
    assert np.array_equal(outputs["baseline"]["logits"], outputs["twin"]["logits"])
    assert not np.array_equal(outputs["baseline"]["logits"], outputs["fused"]["logits"])


def test_images_without_a_label_are_left_out_and_counted(digits, arms):
    """The others are scored as they are by themselves; labels out of range are refused."""
    images = np.stack([digits[i]["image"] for i in range(64)])
    labels = np.where(np.arange(64) % 3 == 1, -1, digits.labels[:64])
    source = ArraySource("mine", images, labels.astype(np.int32), tuple("0123456789"), None)
    there = np.flatnonzero(labels >= 0)
    task, options = Classification(), {"conditions": ("gaussian:80",)}
    scored = score(source, arms, 64, task, **options)["gaussian:80"]
    assert scored.unlabeled == 64 - len(there) == 21 and np.array_equal(scored.index, there)
    assert np.array_equal(scored.columns["label"], labels[there]) and set(scored.columns) == {"label"}
    whole = score(Subset(digits, range(64)), arms, 64, task, **options)["gaussian:80"]
    for name, rows in whole.statistics["fused"].items():
        assert np.array_equal(scored.statistics["fused"][name], rows[there]), name
    setup = make_setup(Linear(), np.zeros((1, 8, 8, 3), np.float32), task=task)
    results = {"noisy": items_of(setup, source, scored, "noisy")}
    assert results["noisy"]["fused"].left_out == {"images without a label": 21}
    (entry,) = summary.summarize(results, METRICS, controls=[], resamples=100, seed=0).values()
    assert entry["n"] == 43 and entry["left_out"] == {"images without a label": 21}
    source.labels = np.full(64, -1, np.int32)
    with pytest.raises(DataError, match="None of the 64 images of mine can be scored"):
        score(source, arms, 64, task, **options)
    source.labels = np.where(np.arange(64) == 7, 10, labels)
    with pytest.raises(DataError, match=r"mine: 1 of 64 labels lie outside 0 … 9, such as 10 of image 7"):
        score(source, arms, 64, task, **options)


def test_a_batch_that_does_not_divide_is_refused(digits, arms):
    with pytest.raises(ConfigError, match=r"evaluate\.batch_size=100"):
        score(digits, arms, 100)


def test_summary_compares_every_arm_with_its_references():
    rng = np.random.default_rng(0)
    shares = {"baseline": 0.5, "placebo": 0.4, "continued": 0.6, "closed_form": 0.8, "measured": 0.9}
    right = {name: (rng.uniform(size=200) < share).astype(float) for name, share in shares.items()}
    results = {"clean": {name: Items({"acc@1": v, "acc@5": np.ones(200)}) for name, v in right.items()}}
    options = {"controls": ("placebo", "continued"), "resamples": 500, "seed": 0, "exact_test": "acc@1"}
    table = summary.summarize(results, classification.METRICS, **options)["clean"]
    assert table["n"] == 200
    assert list(table["control"]) == ["placebo", "continued"]
    assert list(table["denoised"]) == ["closed_form", "measured"]
    assert table["denoised"]["measured"]["acc@1"] == pytest.approx(100 * right["measured"].mean())
    pairs = {f"{ours} - {theirs}" for ours in ("closed_form", "measured") for theirs in list(shares)[:3]}
    pairs |= {"placebo - baseline", "continued - baseline"}
    for part in ("difference", "interval", "mcnemar"):
        assert set(table[part]) == pairs
    for pair in pairs:
        ours, theirs = pair.split(" - ")
        difference = 100 * (right[ours].mean() - right[theirs].mean())
        assert table["difference"][pair]["acc@1"] == pytest.approx(difference)
        low, high = table["interval"][pair]["acc@1"]
        assert low < difference < high
        assert table["difference"][pair]["acc@5"] == 0
    assert table["mcnemar"]["measured - baseline"] < 1e-6
    assert table == summary.summarize(results, classification.METRICS, **options)["clean"]
    untested = summary.summarize(results, classification.METRICS, **{**options, "exact_test": None})["clean"]
    assert untested["mcnemar"] == {} and untested["interval"] == table["interval"]


@pytest.mark.parametrize("missing", ["baseline", "placebo"])
def test_summary_names_an_arm_without_scores(missing):
    results = {"clean": {name: Items({"acc@1": np.ones(9)}) for name in ("baseline", "placebo", "measured")}}
    del results["clean"][missing]
    with pytest.raises(DataError, match=f"No scores of the arm '{missing}' under clean; there are: .*measured"):
        summary.summarize(results, METRICS, controls=["placebo"], resamples=500, seed=0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (np.ones(8), "arms baseline and measured have 9 and 8 items under clean"),
        (np.append(np.ones(8), np.nan), "acc@1 of the arm measured under clean is nan; expected a finite number"),
    ],
)
def test_summary_refuses_arms_that_cannot_be_compared(broken, message):
    results = {"clean": {"baseline": Items({"acc@1": np.ones(9)}), "measured": Items({"acc@1": broken})}}
    with pytest.raises(DataError, match=message):
        summary.summarize(results, METRICS, controls=[], resamples=500, seed=0)


def test_the_difference_has_an_interval_of_whole_clusters_and_then_no_exact_test():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(20), 30)
    right = {"baseline": np.zeros(600), "measured": (rng.uniform(size=20) < 0.5).astype(float)[people]}
    options = {"controls": [], "resamples": 500, "seed": 0, "exact_test": "acc@1"}
    widths = {}
    for name, clusters in (("alone", None), ("whole", people)):
        results = {"clean": {arm: Items({"acc@1": values}, clusters) for arm, values in right.items()}}
        entry = summary.summarize(results, METRICS, **options)["clean"]
        low, high = entry["interval"]["measured - baseline"]["acc@1"]
        widths[name] = high - low
        assert bool(entry["mcnemar"]) == (clusters is None)
    assert widths["whole"] > 3 * widths["alone"]


# ---- statistics are made on the devices ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pixels(Task):
    """A mask of every image, of which two numbers an image are asked for."""

    def statistics(self, outputs, batch):
        bright = outputs > outputs.mean(axis=(1, 2, 3), keepdims=True)
        right = (batch["label"] == 3).reshape(-1, 1, 1, 1)
        return {"counts": jnp.stack([(bright & right).sum((1, 2, 3)), bright.sum((1, 2, 3))], axis=-1)}


class Dense(nn.Module):
    """Outputs of 256 KiB an image."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(16, (3, 3))(jnp.repeat(jnp.repeat(x, 8, axis=1), 8, axis=2))


def test_the_host_gets_statistics_only_never_the_outputs(digits, monkeypatch):
    images = np.zeros((1, 8, 8, 3), np.float32)
    setup = make_setup(Dense(), images, source=digits, task=Pixels())
    first = Dense().init(jax.random.key(0), images)
    arms = {"one": first, "other": jax.tree_util.tree_map(jnp.negative, first)}
    sizes, fetch = [], devices.unshard

    def recorded(tree):
        sizes.append(sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(tree)))
        return fetch(tree)

    monkeypatch.setattr(devices, "unshard", recorded)
    ((_, scored),) = score_arms(setup, arms, digits, ("clean",), batch_size=64, seed=SEED)
    assert len(sizes) == 2 * 10 and max(sizes) == 64 * 2 * 4  # two int32 an image
    output = Dense().apply(first, setup.inputs({"image": np.stack([digits[i]["image"] for i in range(50)])}))
    bright = np.asarray(output) > np.asarray(output.mean(axis=(1, 2, 3), keepdims=True))
    shown = scored.statistics["one"]["counts"][:50]
    np.testing.assert_allclose(shown[:, 1], bright.sum((1, 2, 3)), atol=4)  # rounding, at the threshold
    right = np.array([digits[i]["label"] == 3 for i in range(50)])
    assert np.array_equal(shown[:, 0], shown[:, 1] * right) and right.any()


def test_an_explicit_path_is_an_arm_like_the_others(digits, arms):
    """A network given in the place of the backbone is scored on the same images."""
    networks = {"fused": lambda variables, images: 2.0 * Linear().apply(variables, images)}
    plain, doubled = (score(digits, arms, 64, networks=given)["clean"].statistics for given in ({}, networks))
    np.testing.assert_array_equal(doubled["fused"]["logits"], 2.0 * plain["fused"]["logits"])
    np.testing.assert_array_equal(doubled["baseline"]["logits"], plain["baseline"]["logits"])


def test_classification_scored_arm_by_arm_is_its_accuracy(digits, arms):
    scored = score(digits, arms, 64, task=Classification())["clean"]
    items = items_of(make_setup(Linear(), np.zeros((1, 8, 8, 3), np.float32)), digits, scored, "clean")
    for arm, variables in arms.items():
        images = np.stack([digits[i]["image"] for i in range(600)])
        answers = np.argmax(Linear().apply(variables, normalize(images, MEAN, STD)), axis=-1)
        accuracy = summary.value_of(classification.METRICS["acc@1"], items[arm])
        assert accuracy == pytest.approx(np.mean(np.asarray(answers) == scored.columns["label"]), abs=1.1 / 600)
