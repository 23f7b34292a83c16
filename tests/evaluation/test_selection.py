"""Choice on held-out images: one program for the whole grid, the same as fusing point by point, never worse than nothing."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drep_jax.core.closed_form import spectrum, wiener_maps
from drep_jax.core.denoisers import init_denoise, scaled
from drep_jax.core.fusion import fuse_exact
from drep_jax.core.moments import Moments
from drep_jax.core.sites import find_sites
from drep_jax.data.loader import normalize
from drep_jax.data.npz_source import ArraySource
from drep_jax.errors import ConfigError, NonFiniteError
from drep_jax.evaluation import selection
from drep_jax.evaluation.selection import Candidate, Point, best_point, choose, grid_statistics
from drep_jax.learners.base import selection_of
from drep_jax.parallel import devices
from drep_jax.run.setup import build
from drep_jax.tasks import Task
from drep_jax.trees import get_in
from tests import trees
from tests.setups import make_setup
from tests.tiny_config import get_config


class Net(nn.Module):
    """Counts its traces."""

    @nn.compact
    def __call__(self, x):
        TRACES.append(1)
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).mean(axis=(1, 2))
        return nn.Dense(3, name="fc")(x)


TRACES: list[int] = []


@dataclasses.dataclass(frozen=True)
class Seen(Task):
    """Whose statistics are the outputs themselves."""

    def statistics(self, outputs, batch):
        return {"logits": outputs, "label": batch["label"]}


def grid_outputs(setup, variables, candidates, points):
    """Returns what every point's network gives for a batch."""
    statistics = grid_statistics(setup, variables, candidates, points, against_labels=True)

    def outputs(x):
        labels = {"label": np.arange(len(x), dtype=np.int32)}
        rows = statistics(x, labels, {})
        assert rows["pseudo"] == {} and rows["labels"]["label"].shape == (len(points), len(x))
        assert np.array_equal(rows["labels"]["label"][-1], labels["label"])
        assert np.array_equal(rows["finite"], np.isfinite(rows["labels"]["logits"]).all(axis=-1))
        return rows["labels"]["logits"]

    return outputs


def small(images):
    """Returns the setup and the variables of the small network."""
    setup = make_setup(Net(), images, task=Seen())
    return setup, setup.backbone.init(jax.random.key(0), images), setup.sites, setup.schedule


def random_maps(sites, seed, size=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map(
        lambda leaf: (size * rng.normal(size=leaf.shape)).astype(np.float32), init_denoise(sites)
    )


def on_devices(net, variables, x):
    """What the plain network says, each device having the rows that it has in the grid."""
    padded = np.pad(x, [(0, -len(x) % 8)] + [(0, 0)] * 3)
    program = devices.on_devices(net.apply)
    return devices.unshard(program(devices.replicate(variables), devices.shard(padded)))[: len(x)]


def test_the_grid_is_fusing_point_by_point_in_one_trace():
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype(np.float32)
    setup, variables, sites, schedule = small(x)
    net = setup.backbone
    candidates = [Candidate("a", random_maps(sites, 1)), Candidate("b", random_maps(sites, 2))]
    points = [(0, 0.0), (0, 1.0), (1, 0.25), (1, 1.5)]
    TRACES.clear()
    outputs = grid_outputs(setup, variables, candidates, points)
    got = np.asarray(outputs(x))
    np.asarray(outputs(x[::-1]))
    assert len(TRACES) == 1
    np.testing.assert_array_equal(got[0], on_devices(net, variables, x))  # strength 0 is the backbone, bit for bit
    for row, (number, tau) in zip(got, points, strict=True):
        params = {"backbone": variables["params"], "denoise": candidates[number].denoise}
        fused = fuse_exact(params, sites, schedule, rule="affine", steps=1, strength=tau)
        np.testing.assert_allclose(row, trees.outputs(net, {"params": fused}, x), atol=1e-5)
        full = fuse_exact(
            {**params, "denoise": scaled(candidates[number].denoise, tau)}, sites, schedule, rule="affine", steps=1
        )
        np.testing.assert_allclose(full["conv"]["kernel"], fused["conv"]["kernel"], atol=1e-6)


def test_candidates_larger_than_the_memory_take_turns_in_the_same_program(monkeypatch):
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
    setup, variables, sites, _ = small(x)
    candidates = [Candidate(str(seed), random_maps(sites, seed)) for seed in range(5)]
    points = [(0, 0.0), (4, 1.0), *((number, tau) for number in range(5) for tau in (0.5, 1.0))]
    together = np.asarray(grid_outputs(setup, variables, candidates, points)(x))
    size = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(candidates[0].denoise))
    monkeypatch.setattr(selection, "STACK_BYTES", 2 * size)
    TRACES.clear()
    outputs = grid_outputs(setup, variables, candidates, points)
    np.testing.assert_array_equal(outputs(x), together)
    assert len(TRACES) == 1
    assert len(np.unique(together[:, 0, 0])) == 1 + 5 * 2  # (4, 1.0) is there twice


def test_strength_zero_is_the_backbone_whatever_the_map():
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
    setup, variables, sites, _ = small(x)
    net = setup.backbone
    candidates = [Candidate("endless", jax.tree_util.tree_map(lambda leaf: leaf * np.inf, random_maps(sites, 1)))]
    got = np.asarray(grid_outputs(setup, variables, candidates, [(0, 0.0), (0, 1.0)])(x))
    np.testing.assert_array_equal(got[0], on_devices(net, variables, x))
    assert not np.isfinite(got[1]).any()


def point(strength, clean, noisy):
    return Point("p", 0, strength, strength, {"clean": clean, "n": noisy}, {"clean": noisy, "n": clean})


def test_the_best_point_respects_the_limit_ties_and_overflow():
    backbone = point(0.0, 90.0, 50.0)
    nan = float("nan")
    table = [backbone, point(0.5, 89.0, 60.0), point(1.0, 85.0, 90.0), point(2.0, nan, nan)]
    assert best_point(table, "accuracy", 1.0) == 1
    assert best_point(table, "accuracy", 5.0) == 2
    assert best_point(table, "accuracy", 0.5) == 0
    assert best_point([backbone, point(1.0, 90.0, 50.0)], "accuracy", 1.0) == 0
    assert best_point([backbone, point(1.0, 90.0, 60.0), point(0.5, 90.0, 60.0)], "accuracy", 1.0) == 2
    # The smaller change, not the smaller number: strengths of two candidates do not compare.
    gentle = dataclasses.replace(point(1.0, 90.0, 60.0), change=0.1)
    assert best_point([backbone, point(0.5, 90.0, 60.0), gentle], "accuracy", 1.0) == 2
    assert best_point([backbone, point(1.0, 89.0, 51.0)], "agreement", 100.0) == 0  # other criterion, other scores
    with pytest.raises(ConfigError, match="max_clean_loss=-1"):
        best_point(table, "accuracy", -1)


@pytest.fixture(scope="module")
def tiny():
    config = get_config().unlock().to_dict()
    config["select"]["conditions"] = ("gaussian:60",)
    return config, build(config)


def test_choosing_scores_held_out_images_by_labels_and_by_agreement(tiny):
    config, known = tiny
    variables = dict(trees.setup(known.backbone, known.images, ())[0])  # untrained, but not blind
    candidates = [
        Candidate("random", random_maps(known.sites, 3)),
        Candidate("huge", random_maps(known.sites, 4, 1e30)),
    ]
    choice = choose(known, variables, candidates, selection_of(config))
    assert choice.conditions == ("clean", "gaussian:60") and choice.criterion == "accuracy"
    assert choice.images == len(known.held_out) == 197
    first = choice.points[0]
    images = np.stack([known.held_out[i]["image"] for i in range(197)])
    labels = np.array([known.held_out[i]["label"] for i in range(197)])
    logits = trees.outputs(known.backbone, variables, normalize(images, known.mean, known.std))
    assert first.accuracy["clean"] == pytest.approx(100 * np.mean(np.argmax(logits, -1) == labels))
    assert first.agreement["clean"] == 100.0 and first.agreement["gaussian:60"] < 100.0
    # The two criteria differ by at most the backbone's clean error.
    for found in choice.points:
        for condition in choice.conditions:
            if np.isfinite(found.accuracy[condition]):
                gap = abs(found.accuracy[condition] - found.agreement[condition])
                assert gap <= 100 - first.accuracy["clean"] + 1e-9
    huge = [p for p in choice.points if p.label == "huge"]
    assert huge and all(np.isnan(p.accuracy["clean"]) for p in huge)
    best = choice.points[choice.chosen]
    assert sum(best.accuracy.values()) >= sum(first.accuracy.values())
    assert choice.front()["points"][0] == {"label": "backbone", "strength": 0.0, "scores": first.accuracy}

    broken = jax.tree_util.tree_map(lambda leaf: leaf * np.float32(np.nan), variables)
    with pytest.raises(NonFiniteError, match="unchanged backbone"):
        choose(known, broken, candidates[:1], selection_of(config))

    blind = choose(known, variables, candidates, selection_of(config, labels=False))
    assert blind.criterion == "agreement" and blind.points[0].accuracy is None
    assert [p.agreement["clean"] for p in blind.points[:3]] == [p.agreement["clean"] for p in choice.points[:3]]

    # Images without a label count for agreement alone.
    there = np.arange(197) % 4 > 0
    partly = ArraySource("partly", images, np.where(there, labels, -1), known.held_out.class_names, None)
    point = choose(dataclasses.replace(known, held_out=partly), variables, candidates, selection_of(config)).points[0]
    assert point.accuracy["clean"] == pytest.approx(100 * np.mean((np.argmax(logits, -1) == labels)[there]))
    assert point.agreement == first.agreement


def test_wiener_maps_shrink_each_principal_axis_as_they_should():
    x = jnp.zeros((2, 5))
    net = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3, use_bias=False)])
    sites = find_sites(net, x, pattern=".*")
    rng = np.random.default_rng(0)
    moments = {}
    for site in sites:
        features = rng.normal(size=(1000, site.width)) @ np.diag(np.arange(1.0, site.width + 1)) + 2.0
        moments[site.path] = Moments(1000, features.mean(0), np.cov(features.T, bias=True))
    for ratio in (0.01, 1.0):
        maps = wiener_maps(moments, sites, ratio)
        for site in sites:
            known, leaves = moments[site.path], get_in(maps, site.path)
            spread = known.covariance if site.bias else known.second
            value, axes = np.linalg.eigh(spread)
            noise = ratio * np.trace(known.second) / site.width
            expected = axes @ np.diag(value / (value + noise)) @ axes.T
            np.testing.assert_allclose(np.eye(site.width) - leaves["kernel"].T, expected, atol=1e-6)
            assert ("bias" in leaves) == site.bias
            if site.bias:  # the mean is left where it is
                np.testing.assert_allclose(expected @ known.mean - leaves["bias"], known.mean, atol=1e-5)
                shape = spectrum(known, expected)
                np.testing.assert_allclose(shape["variance"], value[::-1], rtol=1e-9)
                np.testing.assert_allclose(shape["gain"], (value / (value + noise))[::-1], atol=1e-9)
    dead = dataclasses.replace(moments[sites[0].path], mean=np.zeros(5), covariance=np.zeros((5, 5)))
    flat = wiener_maps({**moments, sites[0].path: dead}, sites, 0.1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree_util.tree_leaves(flat))
