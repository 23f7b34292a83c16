"""The rivals of benchmarks/adaptation.py: streams show every image once, TENT moves scale and shift and nothing else."""

import flax.linen as nn
import jax
import numpy as np

from benchmarks import adaptation
from drep_jax.exporting.statistics import MixedStatistics, Statistics
from tests import trees


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.BatchNorm(True, name="norm")(nn.Dense(4, name="layer")(x)).mean((1, 2)))


IMAGES = {name: np.random.default_rng(k).normal(size=(7, 2, 2, 3)).astype(np.float32) for k, name in enumerate("abc")}
VARIABLES = jax.tree.map(abs, dict(trees.setup(Net(), IMAGES["a"], ())[0]))


def test_streams_show_every_image_once_and_one_corruption_or_many():
    counts = {name: len(images) for name, images in IMAGES.items()}
    for stream in (adaptation.SORTED, adaptation.MIXED):
        parts = adaptation.batches(counts, adaptation.Adaptation(batch=4, stream=stream), seed=0)
        seen = sorted((name, int(image)) for batch in parts for name, index in batch for image in index)
        assert seen == [(name, image) for name in "abc" for image in range(7)]
        assert all(sum(len(index) for _, index in batch) <= 4 for batch in parts)
        assert (max(len(batch) for batch in parts) > 1) == (stream == adaptation.MIXED)


def test_answers_of_a_mixed_stream_are_put_back_in_order():
    how = adaptation.Adaptation(batch=5, stream=adaptation.MIXED)
    logits = adaptation.predict(Net(), VARIABLES, IMAGES, lambda x: x, how)
    for name, images in IMAGES.items():
        np.testing.assert_allclose(logits[name], Net().apply(VARIABLES, images), rtol=1e-5, atol=1e-6)


def test_tent_lowers_the_entropy_by_scale_and_shift_and_starts_again():
    network = MixedStatistics(Net(), Statistics("batch", 1.0))
    tent = adaptation.Tent(network, VARIABLES, 0.05)
    first = np.asarray(tent(IMAGES["a"]))
    np.testing.assert_allclose(first, network.apply(VARIABLES, IMAGES["a"]), rtol=1e-5)  # before the step
    for _ in range(5):
        last = tent(IMAGES["a"])
    moved = jax.tree.map(lambda new, old: bool(np.any(new != old)), dict(tent.params), VARIABLES["params"])
    assert moved == {
        "layer": {"kernel": False, "bias": False},
        "norm": {"scale": True, "bias": True},
        "head": {"kernel": False, "bias": False},
    }

    def entropy(logits):
        log_p = jax.nn.log_softmax(logits)
        return float(-(np.exp(log_p) * log_p).sum(-1).mean())

    assert entropy(last) < entropy(first)
    tent.reset()
    np.testing.assert_array_equal(tent(IMAGES["a"]), first)
