"""Merged sources: every image, shares by weight, origins, no labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drep_jax.data import open_source
from drep_jax.data.augment import Augmentation
from drep_jax.data.datasets import open_images, sources_of
from drep_jax.data.loader import evaluation_batches, training_batches
from drep_jax.data.merged import MergedSource, epoch_counts, layout
from drep_jax.errors import ConfigError, DataError


def random_sources(*sizes):
    return [open_source(f"random:{size}:3", "train", image_size=(4, 5)) for size in sizes]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0.05, 20)), min_size=1, max_size=5))
def test_shares_are_the_weights_up_to_rounding_and_every_image_is_there(parts):
    sizes, weights = zip(*parts, strict=True)
    counts = epoch_counts(sizes, weights)
    total, exact = sum(counts), np.array(weights) / sum(weights)
    assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    assert np.abs(np.array(counts) - total * exact).max() <= 1.0001
    shorter = min(size / share for size, share in zip(sizes, exact, strict=True))
    assert (
        total <= max(size / share for size, share in zip(sizes, exact, strict=True)) + len(sizes) and total >= shorter
    )
    origins, places = layout(counts)
    assert len(origins) == total
    for number, count in enumerate(counts):
        assert places[origins == number].tolist() == list(range(count)), "in order"
        running = np.cumsum(origins == number)
        assert np.abs(running - np.arange(1, total + 1) * count / total).max() <= 1.5 + len(counts) / 2, (
            "evenly laid out"
        )


def test_equal_sizes_and_weights_alternate_and_small_ones_repeat():
    merged = MergedSource(random_sources(4, 4), [1, 1])
    assert [int(merged[i]["origin"]) for i in range(8)] == [0, 1] * 4 and merged.shares == (0.5, 0.5)
    few, many = random_sources(3, 12)
    merged = MergedSource([few, many], [1.0, 1.0])
    assert len(merged) == 24
    items = [merged[i] for i in range(24)]
    pixels = [item["image"].tobytes() for item in items if item["origin"] == 0]
    assert sorted(pixels) == sorted([few[i]["image"].tobytes() for i in range(3)] * 4)
    assert {item["image"].tobytes() for item in items if item["origin"] == 1} == {
        many[i]["image"].tobytes() for i in range(12)
    }
    assert merged.num_classes is None and merged.class_names is None and set(items[0]) == {"image", "origin"}
    assert "50.0 % random:3:3 (3 images)" in merged.note and merged.name == "random:3:3 + random:12:3"


def test_batches_tell_the_origin_and_stretches_hold_every_source():
    merged = MergedSource(random_sources(30, 10), [2, 1])
    batches = list(evaluation_batches(merged, 9))
    assert all(set(batch) == {"image", "origin", "index", "mask"} for batch in batches)
    assert [int((batch["origin"] == 1).sum()) for batch in batches[:4]] == [3] * 4
    batch = next(training_batches(merged, 9, seed=0, augmentation=Augmentation(flip=True, crop_scale=(0.5, 1.0))))
    assert batch["origin"].dtype == np.int32 and "label" not in batch
    with pytest.raises(ConfigError, match="has none"):
        training_batches(merged, 8, seed=0, augmentation=Augmentation(mixup=1.0))


def test_weights_and_sources_that_cannot_be_merged():
    for weights in ([1, 0], [1, -1.0], [1, float("inf")], [1], [1, "2"]):
        with pytest.raises(ConfigError, match="one weight above 0 a source"):
            MergedSource(random_sources(2, 2), weights)
    with pytest.raises(ConfigError, match="less uneven"):
        epoch_counts([1000, 1000], [1e-7, 1])
    with pytest.raises(DataError, match="no images to merge"):
        MergedSource([*random_sources(2), Empty()], [1, 1])


class Empty:
    name, num_classes, class_names, note = "empty", None, None, None

    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError(index)


def data(**changes):
    return {"source": "digits", "image_size": (8, 8), "resize": "crop", "data_dir": "", **changes}


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        (("random:5",), "pairs of a source and its weight"),
        ((("random:5", 1, 2),), "pairs of a source"),
        (((3, 1.0),), "pairs of a source"),
        ((("random:5", 1), ("random:5", 2)), '"random:5" is there twice'),
        ((("digits", 1),), '"digits" is there twice'),
        ((("random:5", 0),), "weight above 0"),
        ((("foldre:x", 1),), 'Did you mean "folder"'),
    ],
)
def test_bad_entries_are_named(merge, said):
    with pytest.raises(ConfigError, match=said):
        open_images(data(merge=merge), head=True, gallery=5, seed=0)


def test_what_is_opened(tmp_path):
    assert sources_of(data()) == (["digits"], [1.0])
    alone = open_images(data(), head=True, gallery=5, seed=0)
    assert alone.num_classes == 10 and alone.train.num_classes == 10 and alone.others == () and len(alone.test) == 600
    for i in range(30):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    merge = [["random:50:4", 3.0], [f"folder:{tmp_path}", 0.5]]
    images = open_images(data(merge=merge, weight=2.0, max_unreadable=3), head=True, gallery=20, seed=0)
    assert images.num_classes == 10 and images.train.num_classes is None and len(images.test) == 600
    np.testing.assert_allclose(images.train._source.shares, np.array([2, 3, 0.5]) / 5.5, atol=1e-3)
    assert len(images.train) >= 1500 * 5.5 / 3 / 2 and images.held_out.num_classes is None
    assert [other.name for other in images.others] == ["random:50:4"], "the folder has no labels"
    assert len(images.others[0].gallery) == 20 and len(images.others[0].test) == 50 and images.train.limit == 3
    without = open_images(data(merge=merge), head=False, gallery=20, seed=0)
    assert [other.name for other in without.others] == ["digits", "random:50:4"] and without.test is None
    with pytest.raises(ConfigError, match=r"evaluate\.gallery=0"):
        open_images(data(merge=merge), head=True, gallery=0, seed=0)
