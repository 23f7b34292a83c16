"""Random scale, crops that look at the labels, photometric distortion; evaluation with labels of the stored size."""

import colorsys
import dataclasses

import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.data.augment import Augmentation, augmentation_of
from drep_jax.data.augment.photometric import _colored, photometric
from drep_jax.data.augment.scaled_crop import scaled_crop, scaled_crop_numbers
from drep_jax.data.buckets import make_buckets
from drep_jax.data.collate import collate, read, read_augmented, uncollate
from drep_jax.data.columns import Column
from drep_jax.data.datasets import open_images
from drep_jax.data.fits import transform_of_fit
from drep_jax.data.geometry import Transform
from drep_jax.data.loader import evaluation_batches, training_batches
from drep_jax.data.masks.source import LABEL
from drep_jax.data.resampling import plain_bilinear
from drep_jax.data.source import original_sizes_of, sizes_of
from drep_jax.errors import ConfigError, DataError
from tests import mask_trees as trees
from tests.pictures import textured

ORIGINAL = dataclasses.replace(LABEL, original=True)
PAD = (9, 8, 7)


def colored(labels):
    """An image that shows its labels: all that is done to one can be compared with the other."""
    return np.repeat((labels * 20)[..., None], 3, axis=2).astype(np.uint8)


@pytest.fixture
def source(tmp_path):
    """Images whose pixels are 20 times their labels, of several sizes."""
    files = {"classes.txt": "a\nb\nc\nd\n"}
    for number, size in enumerate([(6, 8), (12, 10), (5, 16), (9, 9), (7, 5), (8, 20)]):
        labels = np.random.default_rng(number).integers(0, 4, (size[0] // 2 + 1, size[1] // 2 + 1))
        labels = np.kron(labels, np.ones((2, 2), int))[: size[0], : size[1]].astype(np.uint8)
        files[f"images/train/{number}.png"], files[f"masks/train/{number}.png"] = colored(labels), labels
        files[f"images/test/{number}.png"], files[f"masks/test/{number}.png"] = colored(labels), labels
    trees.write(tmp_path, files)
    return lambda split, size, resize: open_source(f"seg_folder:{tmp_path}", split, image_size=size, resize=resize)


def test_a_crop_is_a_function_of_its_position_and_labels_follow_it(source):
    train = source("train", (8, 8), "crop")
    options = Augmentation(scale=(0.5, 2.0), flip=True, cat_max_ratio=0.75, mean=tuple(level / 255 for level in PAD))
    indices = np.arange(len(train)).repeat(8)
    whole = read_augmented(train, indices, options, (LABEL,), seed=3, first_position=40)
    one = read_augmented(train, indices[5:7], options, (LABEL,), seed=3, first_position=45)
    for name, column in one.items():
        np.testing.assert_array_equal(column, whole[name][5:7])
    kinds = set()
    for image, label, row, index in zip(whole["image"], whole["label"], whole["transform"], indices, strict=True):
        transform = Transform.from_row(row)
        assert transform.size_out == (8, 8)
        stored = np.asarray(train.raw(int(index))["label"])
        np.testing.assert_array_equal(transform.mask(stored), label)
        shows = transform.shows()
        assert (label[~shows] == 255).all() and (label[shows] < 4).all() and (image[~shows] == PAD).all()
        inner = shows.sum(axis=0).max(), shows.sum(axis=1).max()
        assert shows[: inner[0], : inner[1]].all() and shows.sum() == inner[0] * inner[1], "padded below and right"
        kinds.add((bool(shows.all()), any(type(step).__name__ == "Orient" for step in transform.steps)))
    assert len(kinds) == 4, "some are padded, some flipped"
    plain = read_augmented(train, indices, options, seed=3, first_position=40)
    assert "label" not in plain and plain["image"].shape == whole["image"].shape


def test_a_crop_of_one_class_is_drawn_again():
    labels = np.zeros((8, 64), np.uint8)
    labels[:, 60:] = 1
    numbers = scaled_crop_numbers(0, 0, 300)
    arguments = {"scale": (1, 1), "base": (), "labels": labels, "flipped": False}

    def mixed(most, labels=labels):
        crops = [
            scaled_crop(row, (8, 64), (8, 8), **arguments | {"labels": labels}, cat_max_ratio=most).shown
            for row in numbers
        ]
        return np.array([len(np.unique(crop.mask(arguments["labels"]))) > 1 for crop in crops])

    assert mixed(1.0).mean() < 0.15 < 0.35 < mixed(0.9).mean(), (
        "crops with both classes, without and with drawing again"
    )
    np.testing.assert_array_equal(mixed(0.9, None), mixed(1.0, None))


def test_the_base_is_what_factor_1_stands_for():
    numbers = np.zeros(24)
    arguments = {"labels": None, "cat_max_ratio": 1.0, "flipped": False}
    for size, base, factor, expected in (
        ((683, 512), (512, 2048), 0.5, (342, 256)),
        ((300, 400), (512, 2048), 1.0, (512, 683)),
        ((100, 800), (512, 2048), 2.0, (512, 4096)),
        ((360, 480), (), 2.0, (720, 960)),
    ):
        crop = scaled_crop(numbers, size, (64, 64), scale=(factor, factor), base=base, **arguments)
        assert crop.shown.steps[0].size(size) == expected if crop.shown.steps else expected == size


def test_training_batches_go_through_random_scales(source):
    train = source("train", (8, 8), "crop")
    options = augmentation_of(
        {"scale": (0.5, 2.0), "flip": True, "photometric": True, "cat_max_ratio": 0.75, "mean": (0.5, 0.25, 0.0)}
    )
    assert options.pad_color == (128, 64, 0) and options.slow
    batches = training_batches(train, 4, seed=1, augmentation=options, columns=(LABEL,), num_threads=0)
    first, second = next(batches), next(batches)
    later = next(
        training_batches(train, 4, seed=1, start_step=1, augmentation=options, columns=(LABEL,), num_threads=0)
    )
    for name, column in later.items():
        np.testing.assert_array_equal(column, second[name])
    assert first["label"].shape == (4, 8, 8) and first["label"].dtype == np.uint8
    for image, label, row in zip(first["image"], first["label"], first["transform"], strict=True):
        padding = ~Transform.from_row(row).shows()
        assert (image[padding] == (128, 64, 0)).all() and (label[padding] == 255).all(), "padding is not distorted"


def test_test_images_have_a_way_of_resizing_of_their_own(tmp_path):
    trees.camvid(tmp_path)
    data = {"source": f"camvid:{tmp_path}", "image_size": (4, 4), "resize": "crop", "data_dir": ""}
    for change, resize in (({}, "crop"), ({"test_resize": ""}, "crop"), ({"test_resize": "short:3"}, "short:3")):
        images = open_images(data | change, head=True, gallery=1, seed=0)
        assert (images.train.resize, images.held_out.resize, images.test.resize) == ("crop", "crop", resize)
        assert images.num_classes == 11


BAD = [
    ({"scale": (2.0, 0.5)}, "data.scale"),
    ({"scale": (0.5,)}, "data.scale"),
    ({"scale": (0.5, 2.0), "crop_scale": (0.5, 1.0)}, "data.scale and data.crop_scale"),
    ({"scale": (0.5, 2.0), "cat_max_ratio": 0.0}, "data.cat_max_ratio"),
    ({"cat_max_ratio": 0.75}, "set data.scale, too"),
    ({"scale_base": (512, 2048)}, "set data.scale, too"),
    ({"scale": (0.5, 2.0), "scale_base": (2048, 512)}, "short, long"),
]


@pytest.mark.parametrize(("settings", "words"), BAD)
def test_settings_of_random_scale_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Augmentation(**settings)


def test_distortion_is_of_the_image_alone_and_of_its_position():
    images = textured(40, (5, 6))
    out = photometric(images, seed=2, first_position=7)
    assert out.dtype == np.uint8 and out.shape == images.shape
    np.testing.assert_array_equal(photometric(images[9:11], seed=2, first_position=16), out[9:11])
    unchanged = (out == images).all(axis=(1, 2, 3)).mean()
    assert unchanged < 0.3 and (photometric(images, seed=3, first_position=7) != out).any()
    gray = np.full((60, 4, 4, 3), 100, np.uint8)
    levels = photometric(gray, seed=0, first_position=0)[:, 0, 0]
    assert (levels == levels[:, :1]).all(), "gray stays gray: saturation and hue act on color"
    assert levels.min() < 60 and levels.max() > 140 and (np.abs(levels - 100.0) < 100 * 0.5 + 1.32 * 50).all()


def test_hue_and_saturation_are_those_of_hsv():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    for saturation, turn in ((1.0, 0.3), (0.6, -0.6), (1.4, 0.0), (1.4, 0.5)):
        out = _colored(pixels, saturation, turn)
        for given, result in zip(pixels.reshape(-1, 3) / 255, out.reshape(-1, 3), strict=True):
            hue, part, value = colorsys.rgb_to_hsv(*given)
            expected = np.array(colorsys.hsv_to_rgb((hue + turn / 6) % 1, min(1.0, part * saturation), value))
            np.testing.assert_allclose(result, 255 * expected, atol=0.51)


def test_test_images_get_the_size_of_the_protocol_and_labels_keep_their_own(source):
    test = source("test", (8, 8), "short:6:12:4")
    sizes, originals = sizes_of(test), original_sizes_of(test)
    assert len(np.unique(sizes, axis=0)) > 1 and not (sizes % 4).any()
    buckets = make_buckets(sizes, multiple=1, limit=99, originals=originals)
    assert len(buckets) == len(np.unique(sizes, axis=0)), "one bucket a size: no padding"
    seen = []
    for batch in evaluation_batches(test, 2, columns=(ORIGINAL,), buckets=buckets, num_threads=0):
        assert batch["label"].shape[1:] != batch["image"].shape[1:3]
        for item in uncollate(batch, (ORIGINAL,), original=True):
            if not item["mask"]:
                assert item["label"].size == 0
                continue
            index = int(item["index"])
            seen.append(index)
            stored = np.asarray(test.raw(index)["label"])
            np.testing.assert_array_equal(item["label"], stored)
            assert item["image"].shape[:2] == tuple(sizes[index])
            twice = transform_of_fit(stored.shape, (8, 8), "short:6:12:4")
            np.testing.assert_array_equal(item["image"], twice.image(colored(stored), interpolation="plain_bilinear"))
            assert item["transform"].inverse().size_out == stored.shape
        place = np.flatnonzero(batch["mask"])
        for row in place:
            height, width = batch["original_size"][row]
            assert (batch["label"][row, height:] == 255).all() and (batch["label"][row, :, width:] == 255).all()
    assert sorted(seen) == list(range(len(test)))
    following = next(evaluation_batches(test, 2, columns=(LABEL,), buckets=buckets, num_threads=0))
    assert following["label"].shape[1:] == following["image"].shape[1:3], "a map that is not declared so follows"
    assert read(source("test", (8, 8), "crop"), np.arange(2), (ORIGINAL,))["label"].shape == (2, 8, 8)


def test_only_maps_have_a_size_of_their_own_and_it_has_to_fit():
    with pytest.raises(ConfigError, match="only a map of the pixels"):
        Column("label", original=True)
    item = {"image": np.zeros((4, 4, 3), np.uint8), "label": np.zeros((8, 9), np.uint8)}
    item["transform"] = Transform((8, 9)).resize((4, 4))
    with pytest.raises(DataError, match=r"label.*\(8, 9\).*\(8, 8\) does not hold"):
        collate([item], (ORIGINAL,), (4, 4), original=(8, 8))


def test_plain_bilinear_does_not_blur_what_it_shrinks():
    image = textured(1, (12, 15))[0]
    np.testing.assert_array_equal(plain_bilinear(image, (4, 5)), image[1::3, 1::3])
    assert plain_bilinear(image, (12, 15)) is image
    part = (slice(3, 9), slice(5, 6))
    np.testing.assert_array_equal(plain_bilinear(image, (20, 20), part), plain_bilinear(image, (20, 20))[part])
