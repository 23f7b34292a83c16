"""Random images: the same for the same index, different otherwise."""

import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.errors import ConfigError


def test_items_depend_on_split_and_index_only():
    source = open_source("random:30:7", "train", image_size=(5, 4))
    again = open_source("random:90:7", "train", image_size=(5, 4))
    other = open_source("random:30:7", "test", image_size=(5, 4))
    assert len(source) == 30 and source.num_classes == 7
    labels = {int(source[i]["label"]) for i in range(30)}
    assert labels <= set(range(7)) and len(labels) > 3
    for i in (0, 29):
        assert source[i]["image"].shape == (5, 4, 3) and source[i]["image"].dtype == np.uint8
        np.testing.assert_array_equal(source[i]["image"], again[i]["image"])
        assert (source[i]["image"] != other[i]["image"]).any()
    assert (source[0]["image"] != source[1]["image"]).any()


def test_the_default_is_a_thousand_classes_and_iteration_ends():
    source = open_source("random:3", "train", image_size=(2, 2))
    assert source.num_classes == 1000
    assert len(list(source)) == 3


@pytest.mark.parametrize("spec", ["random", "random:0", "random:ten", "random:5:0", "random:5:2:1", "random:-3"])
def test_bad_counts_are_refused(spec):
    with pytest.raises(ConfigError, match="COUNT"):
        open_source(spec, "train", image_size=(2, 2))
