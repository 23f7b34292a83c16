"""Scoring of several arms: padding is masked, all arms see the same images, and the table is what the scores say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.data.corruptions import corrupt
from drep_jax.data.loader import normalize
from drep_jax.errors import ConfigError, DataError
from drep_jax.evaluation import summary
from drep_jax.evaluation.arms import score_arms
from drep_jax.metrics import classification

MEAN, STD, SEED = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4), 11
CONDITIONS = ("clean", "gaussian:80")


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


def hits(logits, columns):
    return classification.scores(logits, columns["label"])


def score(digits, arms, batch_size, scores=hits, conditions=CONDITIONS):
    def inputs(batch):
        return normalize(batch["image"], MEAN, STD)

    return score_arms(Linear(), arms, digits, conditions, scores, batch_size=batch_size, inputs=inputs, seed=SEED)


@pytest.mark.parametrize("batch_size", [64, 600, 1024])
def test_scores_are_those_of_a_plain_loop(batch_size, digits, arms):
    outputs = score(digits, arms, batch_size, lambda logits, columns: {"logits": logits, "labels": columns["label"]})
    images = jnp.stack([digits[i]["image"] for i in range(len(digits))])
    for condition in CONDITIONS:
        noisy = corrupt(images.astype(jnp.float32), jnp.arange(len(digits)), condition, SEED)
        for name, variables in arms.items():
            found = outputs[condition][name]
            expected = Linear().apply(variables, normalize(noisy, MEAN, STD))
            assert found["logits"].shape == (600, 10)
            np.testing.assert_allclose(found["logits"], expected, atol=2e-4)
            assert np.array_equal(found["labels"], [digits[i]["label"] for i in range(len(digits))])
    assert np.abs(outputs["clean"]["fused"]["logits"] - outputs["gaussian:80"]["fused"]["logits"]).max() > 0.1


def test_equal_arms_get_equal_scores_under_noise(digits, arms):
    outputs = score(digits, arms, 64, lambda logits, columns: {"logits": logits})["gaussian:80"]
    assert np.array_equal(outputs["baseline"]["logits"], outputs["twin"]["logits"])
    assert not np.array_equal(outputs["baseline"]["logits"], outputs["fused"]["logits"])


def test_a_batch_that_does_not_divide_is_refused(digits, arms):
    with pytest.raises(ConfigError, match=r"evaluate\.batch_size=100"):
        score(digits, arms, 100)


def test_summary_compares_every_arm_with_its_references():
    rng = np.random.default_rng(0)
    shares = {"baseline": 0.5, "placebo": 0.4, "continued": 0.6, "closed_form": 0.8, "measured": 0.9}
    right = {name: (rng.uniform(size=200) < share).astype(float) for name, share in shares.items()}
    results = {"clean": {name: {"acc@1": v, "acc@5": np.ones(200)} for name, v in right.items()}}
    options = {"controls": ("placebo", "continued"), "resamples": 500, "seed": 0}
    table = summary.summarize(results, **options)["clean"]
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
    assert table == summary.summarize(results, **options)["clean"]


@pytest.mark.parametrize("missing", ["baseline", "placebo"])
def test_summary_names_an_arm_without_scores(missing):
    results = {"clean": {name: {"acc@1": np.ones(9)} for name in ("baseline", "placebo", "measured")}}
    del results["clean"][missing]
    with pytest.raises(DataError, match=f"No scores of the arm '{missing}' under clean; there are: .*measured"):
        summary.summarize(results, controls=["placebo"], resamples=500, seed=0)
