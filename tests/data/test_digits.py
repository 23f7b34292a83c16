"""The digits: right pixels, disjoint stratified splits."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from drep_jax.data import open_source
from drep_jax.data.digits import split_indices
from drep_jax.errors import ConfigError

SIZES = {"train": 1000, "validation": 197, "test": 600}


def test_splits_are_disjoint_complete_and_stratified():
    labels = load_digits().target
    parts = split_indices(labels)
    assert {name: len(part) for name, part in parts.items()} == SIZES
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1797))
    share = np.bincount(labels) / len(labels)
    for part in parts.values():
        assert np.abs(np.bincount(labels[part]) / len(part) - share).max() < 0.01
    assert parts["test"].tolist() == split_indices(labels)["test"].tolist()


@pytest.mark.parametrize("split", SIZES)
def test_pixels_and_labels_are_those_of_scikit_learn(split):
    source = open_source("digits", split, image_size=(8, 8))
    data = load_digits()
    assert len(source) == SIZES[split]
    assert source.num_classes == 10 and source.class_names == tuple("0123456789")
    for i, original in enumerate(split_indices(data.target)[split][:50]):
        item = source[i]
        assert item["image"].dtype == np.uint8 and item["label"].dtype == np.int32
        expected = np.round(data.images[original] * 255 / 16).astype(np.uint8)
        for channel in range(3):
            np.testing.assert_array_equal(item["image"][..., channel], expected)
        assert item["label"] == data.target[original]
    assert source[0]["image"].max() > 200
    assert source.in_memory, "threads would only slow it down"


def test_other_sizes_are_resized():
    source = open_source("digits", "test", image_size=(32, 32))
    assert source[5]["image"].shape == (32, 32, 3)
    small = open_source("digits", "test", image_size=(8, 8))[5]["image"].astype(float)
    back = source[5]["image"].reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), back.ravel())[0, 1] > 0.97


def test_an_argument_is_refused():
    with pytest.raises(ConfigError, match="digits:7"):
        open_source("digits:7", "train", image_size=(8, 8))
