"""Losses of retrieval: against NumPy loops, on one device and on eight, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.default import get_default
from drep_jax.errors import ConfigError
from drep_jax.evaluation import summary
from drep_jax.parallel import devices
from drep_jax.tasks import make_task
from drep_jax.tasks.losses import center_loss, triplet_loss, view_triplet_loss
from drep_jax.tasks.retrieval import CENTERS, Retrieval

PEOPLE, EACH = 6, 4
LABELS = np.repeat(np.arange(PEOPLE), EACH).astype(np.int32)
VIEWS = np.tile(np.array([0, 0, 1, 1], np.int32), PEOPLE)


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).normal(size=(2, PEOPLE * EACH, 5)).astype(np.float32)


def everywhere(function, *arrays, count=8):
    """Returns the mean over devices of a loss, each device with its share of the rows, and its gradient by the first array."""
    cut = [array.reshape(count, -1, *array.shape[1:]) for array in arrays]

    def one(first, *others):
        value, gradient = jax.value_and_grad(function)(first, *others)
        return jax.lax.pmean(value, devices.AXIS), gradient / count

    many = jax.pmap(one, axis_name=devices.AXIS, devices=jax.devices()[:count])
    values, gradients = many(*cut)
    assert np.ptp(np.asarray(values)) == 0
    return float(values[0]), np.asarray(gradients).reshape(arrays[0].shape)


def naive(distance, positives, negatives, margin):
    """Returns the batch-hard loss by loops: `distance(which, a, b)`, masks as functions of two images."""
    terms = []
    for a in range(len(LABELS)):
        far = [distance(0, a, b) for b in range(len(LABELS)) if a != b and positives(a, b)]
        near = [distance(1, a, b) for b in range(len(LABELS)) if negatives(a, b)]
        if far and near:
            gap = max(far) - min(near)
            terms.append(max(0.0, gap + margin) if margin else np.log1p(np.exp(gap)))
    return np.mean(terms) if terms else 0.0


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_triplets_are_those_of_a_loop_on_any_number_of_devices(features, margin):
    x = features[0]

    def distance(_, a, b):
        return np.linalg.norm(x[a] - x[b])

    expected = naive(distance, lambda a, b: LABELS[a] == LABELS[b], lambda a, b: LABELS[a] != LABELS[b], margin)
    (one, slope), (eight, same_slope) = (
        everywhere(lambda f, y: triplet_loss(f, y, margin), x, LABELS, count=n) for n in (1, 8)
    )
    assert one == pytest.approx(expected, rel=1e-5) and eight == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(same_slope, slope, atol=1e-6)
    assert np.abs(slope).max() > 1e-3


def test_an_anchor_without_a_positive_is_left_out(features):
    labels = LABELS.copy()
    labels[0] = PEOPLE  # alone
    x = features[0]
    kept = naive(
        lambda _, a, b: np.linalg.norm(x[a] - x[b]),
        lambda a, b: labels[a] == labels[b],
        lambda a, b: labels[a] != labels[b],
        0.5,
    )
    assert everywhere(lambda f, y: triplet_loss(f, y, 0.5), x, labels)[0] == pytest.approx(kept, rel=1e-5)
    lonely, slope = everywhere(lambda f, y: triplet_loss(f, y, 0.5), x, np.arange(len(x), dtype=np.int32))
    assert lonely == 0 and not slope.any()
    equal, slope = everywhere(lambda f, y: triplet_loss(f, y, 0.5), np.zeros_like(x), LABELS)
    assert equal == pytest.approx(0.5, abs=1e-4) and np.isfinite(slope).all()


def test_triplets_by_view_compare_each_pair_in_its_own_space(features):
    same, different = features
    space = (same, different)

    def total(spaces, positives, negatives):
        return naive(
            lambda k, a, b: np.linalg.norm(space[spaces[k]][a] - space[spaces[k]][b]), positives, negatives, 0.4
        )

    def one_view(a, b):
        return VIEWS[a] == VIEWS[b]

    expected = (
        total(
            (0, 0),
            lambda a, b: LABELS[a] == LABELS[b] and one_view(a, b),
            lambda a, b: LABELS[a] != LABELS[b] and one_view(a, b),
        )
        + total(
            (1, 1),
            lambda a, b: LABELS[a] == LABELS[b] and not one_view(a, b),
            lambda a, b: LABELS[a] != LABELS[b] and not one_view(a, b),
        )
        + total(
            (1, 0),
            lambda a, b: LABELS[a] == LABELS[b] and not one_view(a, b),
            lambda a, b: LABELS[a] != LABELS[b] and one_view(a, b),
        )
    )
    found, _ = everywhere(lambda s, d, y, v: view_triplet_loss(s, d, y, v, 0.4), same, different, LABELS, VIEWS)
    assert found == pytest.approx(expected, rel=1e-5)
    assert everywhere(lambda f, y: triplet_loss(f, y, 0.4), same, LABELS)[0] != pytest.approx(found)


def test_centers_pull_and_are_pulled(features):
    x, centers = features[0], np.random.default_rng(1).normal(size=(PEOPLE, 5)).astype(np.float32)
    expected = np.mean([np.sum((row - centers[label]) ** 2) for row, label in zip(x, LABELS, strict=True)])
    value, slope = jax.value_and_grad(center_loss, argnums=2)(x, LABELS, centers)
    assert value == pytest.approx(expected, rel=1e-6)
    means = np.stack([x[label == LABELS].mean(axis=0) for label in range(PEOPLE)])
    np.testing.assert_allclose(slope, 2 * (centers - means) / PEOPLE, rtol=1e-4, atol=1e-6)


def test_parts_are_weighted_as_published(features):
    logits = [jnp.asarray(np.random.default_rng(k).normal(size=(PEOPLE * EACH, PEOPLE)), jnp.float32) for k in range(3)]
    outputs = {"features": tuple(jnp.asarray(f) for f in (*features, features[0] * 2)), "logits": tuple(logits)}

    def parts(aggregate, **options):
        task = Retrieval(aggregate=aggregate, **options)
        each = [
            task.loss({"features": (f,), "logits": (z,)}, {"label": LABELS}, 0.1, {})[0]
            for f, z in zip(outputs["features"], outputs["logits"], strict=True)
        ]
        return task.loss(outputs, {"label": LABELS}, 0.1, {})[0], each

    def on_one_device(function):
        return jax.pmap(lambda _: function(), axis_name=devices.AXIS, devices=jax.devices()[:1])(jnp.zeros(1))

    for aggregate, shares in (("half", (0.5, 0.25, 0.25)), ("sum", (1, 1, 1)), ("mean", (1 / 3,) * 3)):
        for options in ({}, {"id_weight": 0.0}, {"triplet_weight": 0.0, "id_weight": 2.0}):
            whole, each = on_one_device(lambda aggregate=aggregate, options=options: parts(aggregate, **options))
            assert float(whole[0]) == pytest.approx(
                sum(s * float(e[0]) for s, e in zip(shares, each, strict=True)), rel=1e-5
            )
            assert float(whole[0]) > 0


def test_every_setting_of_the_losses_has_an_effect(features):
    batch = {"label": LABELS, "view": VIEWS}
    outputs = {
        "features": tuple(features),
        "logits": tuple(f[:, :PEOPLE] for f in np.pad(features, ((0, 0), (0, 0), (0, 1)))),
    }
    extra = {CENTERS: {str(k): np.zeros((PEOPLE, 5), np.float32) for k in range(2)}}

    def value(smoothing=0.0, **options):
        task = Retrieval(**options)
        run = jax.pmap(
            lambda _: task.loss(outputs, batch, smoothing, extra)[0],
            axis_name=devices.AXIS,
            devices=jax.devices()[:1],
        )
        return float(run(jnp.zeros(1))[0])

    base = value()
    others = [
        value(smoothing=0.1),
        value(id_weight=0.5),
        value(triplet_weight=0.5),
        value(margin=0.3),
        value(center_weight=0.01),
        value(aggregate="sum"),
        value(views=True),
    ]
    assert len({round(v, 6) for v in (base, *others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("metric", "cosin", 'Unknown retrieval.metric "cosin". Did you mean "cosine"'),
        ("corrupted", "all", 'Unknown retrieval.corrupted "all"'),
        ("side", "cameras", 'Unknown retrieval.side "cameras". Did you mean "camera"'),
        ("aggregate", "x", "Unknown retrieval.aggregate"),
        ("singletons", "keep", "Unknown retrieval.singletons"),
        ("rerank", (20, 6), r"retrieval.rerank=\(20, 6\): expected \(k1, k2, λ\)"),
        ("rerank", (20, 6, 1.5), "retrieval.rerank"),
        ("rerank", (4, 6, 0.3), r"retrieval.rerank=\(4, 6, 0.3\): k2 = 6 of re-ranking: expected at most"),
        ("margin", -1.0, r"retrieval.margin=-1.0 must be a number of at least 0"),
        ("instances", 1, "retrieval.instances=1 make no batch for triplets"),
        ("identities", 1, "retrieval.identities=1"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, value, message):
    config = get_default().to_dict()
    config["task"] = "retrieval"
    with pytest.raises(ConfigError, match=message):
        make_task({**config, "retrieval": {**config["retrieval"], name: value}})


def test_queries_without_a_match_are_counted_and_left_out():
    source = dataclasses.make_dataclass("Listed", ["table"])(
        {
            "label": np.array([0, 1, 2, 0, 1]),
            "camera": np.array([0, 0, 0, 1, 0]),
            "view": np.zeros(5, np.int32),
            "query": np.array([1, 1, 1, 0, 0]),
            "gallery": np.array([0, 0, 0, 1, 1]),
        }
    )
    items = Retrieval().items({"feature": np.eye(5, dtype=np.float32)}, source, np.arange(5), "an arm")
    assert items.left_out == {"queries without a match": 2} and len(items.statistics["mAP"]) == 1
    results = {"clean": {"baseline": items, "fused": items}}
    entry = summary.summarize(results, Retrieval.metrics, controls=[], resamples=100, seed=0)["clean"]
    assert entry["n"] == 1 and entry["left_out"] == {"queries without a match": 2}


def test_an_unknown_task_is_refused_and_labels_must_teach_something():
    config = get_default().to_dict()
    two_spaces = {**config["retrieval"], "rerank": (20, 6, 0.3), "views": True}
    with pytest.raises(ConfigError, match="rerank compares neighbors in one space"):
        make_task({**config, "task": "retrieval", "retrieval": two_spaces})
    with pytest.raises(ConfigError, match=r'Unknown task "retrival"\. Did you mean "retrieval"'):
        make_task({**config, "task": "retrival"})
    nothing = {**config["retrieval"], "id_weight": 0.0, "triplet_weight": 0.0}
    with pytest.raises(ConfigError, match="there is nothing to train"):
        make_task({**config, "task": "retrieval", "retrieval": nothing})
