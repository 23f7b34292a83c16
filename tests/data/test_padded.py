"""Images that fitting pads: batches say the size of the picture, whatever moves it, and labels follow."""

import itertools

import numpy as np
import pytest
from PIL import Image

from drep_jax.data.augment import OFF, Augmentation
from drep_jax.data.collate import read, uncollate, valid_pixels
from drep_jax.data.fits import pads, picture_size, transform_of_fit
from drep_jax.data.geometry import Transform
from drep_jax.data.loader import evaluation_batches, training_batches
from drep_jax.data.merged import MergedSource
from drep_jax.data.pairs import open_noisy, open_pairs
from drep_jax.data.source import Subset
from drep_jax.data.unreadable import Tolerant
from drep_jax.learners.distilled import PairsInOne
from tests.data.test_collate import COLUMNS, Scenes

STORED = [(16, 20), (32, 20), (8, 20), (20, 50), (11, 9), (40, 25)]
SHOWN = [(16, 20), (16, 10), (8, 20), (8, 20), (16, 13), (16, 10)]  # fitted into 16 × 20
AUGMENTATIONS = {
    "none": OFF,
    "flip": Augmentation(flip=True),
    "shift": Augmentation(flip=True, shift=5),
    "crop": Augmentation(flip=True, crop_scale=(0.3, 1.0)),
    "scale": Augmentation(flip=True, scale=(0.3, 1.2)),
    "erase": Augmentation(erase=1.0, photometric=True),
}


def test_the_size_of_the_picture_in_what_a_fit_gives():
    assert [picture_size(transform_of_fit(size, (16, 20), "pad")) for size in STORED] == SHOWN
    assert picture_size(transform_of_fit((30, 40), (1, 1), "keep:32")) == (30, 40)
    for how in ("crop", "crop:0.5", "squash", "short:16:20", "keep"):
        transform = transform_of_fit((11, 50), (16, 20), how)
        assert not pads(how) and picture_size(transform) == transform.size_out
    assert pads("pad") and pads("keep:32") and not pads("keep:1")


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_size_stays_right_and_labels_follow(name):
    """What lies inside the size is the picture, all of it; outside is padding, in labels as well."""
    augmentation, source = AUGMENTATIONS[name], Scenes(STORED, "pad")
    options = {"seed": 3, "augmentation": augmentation, "columns": COLUMNS, "num_threads": 0, "sizes": True}
    smaller = flipped = 0
    for batch in itertools.islice(training_batches(source, 6, **options), 5):
        assert ("size" in batch) == (name != "crop"), "a random resized crop has no padding"
        sizes = batch.get("size", np.full((6, 2), (16, 20)))
        inside = valid_pixels(sizes, (16, 20))
        for place, (index, row) in enumerate(zip(batch["index"].tolist(), batch["transform"], strict=True)):
            transform, raw = Transform.from_row(row), source.raw(index)
            assert transform.size_out == (16, 20)
            shows = transform.shows()
            assert not (shows & ~inside[place]).any()
            assert name == "shift" or (shows == inside[place]).all()
            np.testing.assert_array_equal(batch["label"][place], transform.mask(raw["label"], fill=255))
            boxes, there = transform.boxes(raw["boxes"])
            np.testing.assert_allclose(
                batch["boxes"][place][batch["objects_valid"][place]], boxes[there], rtol=0, atol=1e-4
            )
            if name in ("none", "flip", "shift"):
                assert tuple(sizes[place]) == SHOWN[index]
                np.testing.assert_array_equal(batch["image"][place], transform.image(raw["image"]))
            smaller += int(not inside[place].all())
            left, right = transform.points(np.array([[0.0, 0], [1, 0]]))[:, 0]
            flipped += int(right < left)
    assert bool(smaller) == (name != "crop")
    assert name in ("none", "erase", "crop") or flipped > 3


def test_only_padded_images_say_it_and_only_if_they_are_asked_to():
    source = Scenes(STORED, "pad")
    plain = read(source, np.arange(6), COLUMNS)
    told = read(source, np.arange(6), COLUMNS, sizes=True)
    assert told.pop("size").tolist() == [list(size) for size in SHOWN] and told.keys() == plain.keys()
    for column, values in plain.items():
        np.testing.assert_array_equal(values, told[column], err_msg=column)
    assert "size" not in read(Scenes(STORED, "squash"), np.arange(6), COLUMNS, sizes=True)
    flipped = {"seed": 3, "augmentation": Augmentation(flip=True), "columns": COLUMNS, "num_threads": 0}
    batch = next(training_batches(source, 6, **flipped))
    assert "size" not in batch and batch["image"][:, :, -1].any(axis=(1, 2)).sum() > 2, "the canvas is flipped"

    *_, last = evaluation_batches(source, 4, columns=COLUMNS, sizes=True)
    assert last["size"].tolist() == [[16, 13], [16, 10], [0, 0], [0, 0]] and last["mask"].tolist() == [1, 1, 0, 0]
    item = uncollate({**read(source, np.array([1]), COLUMNS, sizes=True)}, COLUMNS)[0]
    assert item["image"].shape == (16, 10, 3) and item["transform"] == Transform(STORED[1]).resize((16, 10))


def test_sources_of_sources_say_it():
    source = Scenes(STORED, "pad", labelled=False)
    assert read(Subset(source, [3, 1]), np.arange(2), sizes=True)["size"].tolist() == [[8, 20], [16, 10]]
    assert read(Tolerant(source, 1), np.array([4]), sizes=True)["size"].tolist() == [[16, 13]]
    merged = read(MergedSource([source, source], (1, 1)), np.arange(4), sizes=True)
    assert merged["size"].tolist() == [[16, 20], [16, 20], [16, 10], [16, 10]]


def test_pairs_and_noisy_images_say_it(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 256, (2, 30, 20, 3), np.uint8)
    for side, image in zip(("clean", "corrupted"), pixels, strict=True):
        (tmp_path / side).mkdir()
        for number in range(4):
            Image.fromarray(image).save(tmp_path / side / f"{number}.png")
    pairs = open_pairs(str(tmp_path), (15, 16), "pad")
    assert pairs[0]["size"].tolist() == [15, 10] and "size" not in open_pairs(str(tmp_path), (15, 16), "squash")[0]
    options = {"seed": 0, "num_threads": 0, "augmentation": Augmentation(flip=True)}
    assert "size" not in next(training_batches(PairsInOne(pairs), 4, **options))
    batch = next(training_batches(PairsInOne(pairs, sizes=True), 4, **options, sizes=True))
    assert batch["size"].tolist() == [[15, 10]] * 4 and not batch["image"][:, :, 10:].any()
    assert batch["image"][:, :, :10].all() and len(np.unique(batch["image"], axis=0)) == 2, "some are flipped"
    noisy = open_noisy(str(tmp_path / "corrupted"), (15, 16), "pad")
    batch = read(noisy, np.array([2]), sizes=True)
    assert batch["size"].tolist() == [[15, 10]]
    np.testing.assert_array_equal(batch["image"][0], noisy[2]["image"])
