"""Augmentations: what each does to pixels, and that every draw depends on (seed, position) alone."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.default import get_default
from drep_jax.data.augment import OFF, Augmentation, augmentation_of, randaugment
from drep_jax.data.augment.erasing import erase
from drep_jax.data.augment.flip_crop import crop_box, crop_numbers, flip_and_shift
from drep_jax.data.augment.mixing import mix
from drep_jax.data.augment.randaugment import OPERATIONS
from drep_jax.data.augment.random_bits import words
from drep_jax.data.loader import training_batches
from drep_jax.errors import ConfigError
from tests.pictures import textured

EVERYTHING = Augmentation(
    flip=True, shift=1, crop_scale=(0.2, 0.9), randaugment=2, erase=0.5, mixup=0.8, cutmix=1.0, randaugment_magnitude=15
)


class Pictures:
    """Textured pictures held in memory, with labels 0, 1, 2, …."""

    name, note, class_names = "pictures", None, None

    def __init__(self, count, labelled=True):
        self.images = textured(count, (10, 12))
        self.num_classes = count if labelled else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        item = {"image": self.images[i]}
        return {**item, "label": np.int32(i)} if self.num_classes else item


def take(count, batch_size=8, **options):
    options = {"seed": 3, "augmentation": EVERYTHING, **options}
    return list(itertools.islice(training_batches(Pictures(30), batch_size, **options), count))


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, values in left.items():
        np.testing.assert_array_equal(values, right[name], err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Where the numbers come from
# ---------------------------------------------------------------------------------------------------------------------


def test_resuming_batch_sizes_hosts_and_threads_change_nothing():
    whole = joined(take(9, num_threads=0))
    assert set(whole) == {"image", "label", "label2", "share", "index"}
    assert whole["share"].dtype == np.float32 and whole["label2"].dtype == np.int32 and whole["image"].dtype == np.uint8
    assert_equal(joined(take(5, start_step=4, num_threads=3)), {name: v[32:] for name, v in whole.items()})
    assert_equal(joined(take(6, batch_size=12, num_threads=2)), whole)
    parts = [take(9, shard=(i, 2)) for i in range(2)]
    assert_equal(joined([batch for pair in zip(*parts, strict=True) for batch in pair]), whole)
    other = joined(take(9, seed=4))
    assert (other["share"] != whole["share"]).mean() > 0.9
    later = joined(take(9, start_step=9))
    assert (later["share"] != whole["share"]).mean() > 0.9, "every epoch draws anew"


def test_flip_and_shift_are_those_of_the_first_release():
    images = np.arange(6 * 3 * 3 * 3, dtype=np.uint8).reshape(6, 3, 3, 3)
    raw = np.random.Philox(key=np.array([7, 2**64 - 1], np.uint64), counter=np.array([5, 0, 0, 0], np.uint64))
    raw = raw.random_raw(24).reshape(6, 4)
    for image, moved, word in zip(
        images, flip_and_shift(images, seed=7, first_position=5, flip=True, shift=1), raw, strict=True
    ):
        image = image[:, ::-1] if word[0] % 2 else image
        top, left = int(word[1] % 3), int(word[2] % 3)
        np.testing.assert_array_equal(moved, np.pad(image, ((1, 1), (1, 1), (0, 0)))[top : top + 3, left : left + 3])
    assert raw[0].tolist() == [14246778075689031890, 4278505195856448256, 14044021079404752419, 12477088012452538932]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**40), st.integers(1, 7), st.integers(1, 3))
def test_words_of_a_position_do_not_depend_on_what_is_drawn_with_it(first, cut, blocks):
    whole = words(1, 9, first, 8, blocks)
    parts = [words(1, 9, first, cut, blocks), words(1, 9, first + cut, 8 - cut, blocks)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(whole, words(1, 10, first, 8, blocks)).any()


def test_what_is_off_leaves_images_alone():
    batch = {"image": textured(3), "index": np.arange(3)}
    assert_equal(OFF(batch, seed=0, first_position=0), batch)
    assert augmentation_of(get_default().data.to_dict()) == OFF
    assert augmentation_of({}) == OFF, "configurations of the first release have no such entries"


# ---------------------------------------------------------------------------------------------------------------------
# Crops
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**30))
def test_boxes_lie_in_the_image_with_the_area_and_shape_asked_for(height, width, position):
    top, left, rows, columns = crop_box(crop_numbers(0, position, 1)[0], height, width, (0.3, 0.8), (0.5, 2.0))
    assert 0 <= top <= top + rows <= height and 0 <= left <= left + columns <= width and rows > 0 < columns
    if min(height, width) > 100 and 0.5 < width / height < 2:
        assert 0.28 < rows * columns / (height * width) < 0.82
        assert 0.48 < columns / rows < 2.1


def test_boxes_cover_the_whole_range():
    boxes = np.array([crop_box(numbers, 300, 400, (0.1, 1.0), (3 / 4, 4 / 3)) for numbers in crop_numbers(5, 0, 2000)])
    shares = boxes[:, 2] * boxes[:, 3] / (300 * 400)
    assert shares.min() < 0.12 and shares.max() > 0.95 and 0.4 < shares.mean() < 0.6
    shapes = np.log(boxes[:, 3] / boxes[:, 2])
    assert abs(shapes.mean()) < 0.05 and shapes.min() < -0.25 and shapes.max() > 0.25
    assert boxes[:, 0].max() > 150 and (boxes[:, 0] + boxes[:, 2]).max() == 300
    np.testing.assert_array_equal(crop_box(crop_numbers(0, 0, 1)[0], 20, 400, (0.9, 1.0), (1.0, 1.0)), (0, 190, 20, 20))


# ---------------------------------------------------------------------------------------------------------------------
# RandAugment
# ---------------------------------------------------------------------------------------------------------------------


def apply(name, image, strength):
    return np.asarray(OPERATIONS[name](Image.fromarray(image), strength)).astype(int)


def test_operations_against_plain_formulas():
    image = textured(1, (20, 30))[0]
    wide = image.astype(int)
    np.testing.assert_array_equal(apply("posterize", image, -0.5), wide // 4 * 4)
    np.testing.assert_array_equal(apply("solarize", image, 0.25), np.where(wide < 192, wide, 255 - wide))
    np.testing.assert_array_equal(apply("translate_x", image, 0.25)[:, :-3], wide[:, 3:])
    np.testing.assert_array_equal(apply("translate_y", image, -0.5)[5:], wide[:-5])
    assert not apply("translate_y", image, -0.5)[:4].any()
    np.testing.assert_allclose(apply("brightness", image, -0.5), wide * 0.55, atol=1)
    gray = wide @ (0.299, 0.587, 0.114)
    np.testing.assert_allclose(apply("color", image, -1.0), 0.1 * wide + 0.9 * gray[..., None], atol=2)
    np.testing.assert_allclose(apply("contrast", image, -1.0), 0.1 * wide + 0.9 * gray.mean(), atol=2)
    low, high = wide.min((0, 1)), wide.max((0, 1))
    np.testing.assert_allclose(apply("autocontrast", image, 1.0), (wide - low) * 255 / (high - low), atol=1.01)
    assert np.ptp(np.histogram(apply("equalize", image, 1.0), 4)[0]) < np.ptp(np.histogram(wide, 4, (0, 255))[0])
    sheared = apply("shear_x", image, 1.0)
    np.testing.assert_allclose(sheared[9:11, 8:-8], wide[9:11, 8:-8], atol=40)
    assert (sheared[0] != wide[0]).mean() > 0.9
    turned = apply("rotate", np.full((20, 20, 3), 200, np.uint8), 1.0)
    assert turned[10, 10, 0] == 200 and turned[0, 0, 0] == 0


def test_magnitude_zero_and_what_is_drawn(monkeypatch):
    images = textured(60, (8, 8))
    plain = {"autocontrast", "equalize"}
    calls = []

    def spy(name, operation):
        def called(image, strength):
            calls.append((name, strength))
            return image if name in plain else operation(image, strength)

        return called

    for name, operation in list(OPERATIONS.items()):
        monkeypatch.setitem(OPERATIONS, name, spy(name, operation))
    np.testing.assert_array_equal(randaugment(images, seed=0, first_position=0, count=3, magnitude=0), images)
    calls.clear()
    out = randaugment(images, seed=0, first_position=0, count=3, magnitude=15)
    assert (out != images).any((1, 2, 3)).mean() > 0.8
    assert {name for name, _ in calls} == set(OPERATIONS) and len(calls) == 180
    assert {strength for _, strength in calls} == {0.5, -0.5}
    np.testing.assert_array_equal(randaugment(images[7:9], seed=0, first_position=7, count=3, magnitude=15), out[7:9])


# ---------------------------------------------------------------------------------------------------------------------
# Erasing and mixing
# ---------------------------------------------------------------------------------------------------------------------


def test_erasing_fills_one_box_with_noise():
    images = np.full((200, 24, 32, 3), 77, np.uint8)
    out = erase(images, seed=0, first_position=0, probability=0.4)
    hit = (out != 77).any((1, 2, 3))
    assert 0.3 < hit.mean() < 0.5 and (images == 77).all()
    areas = []
    for image in out[hit]:
        rows, columns = (np.flatnonzero((image != 77).any((axis, 2))) for axis in (1, 0))
        box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        areas.append(box[..., 0].size / (24 * 32))
        assert (box == 77).mean() < 0.1
    assert 0.015 < min(areas) < 0.08 and 0.25 < max(areas) < 0.35
    noise = np.concatenate([image[image != 77] for image in out[hit]])
    assert 120 < noise.mean() < 135 and noise.max() == 255
    np.testing.assert_array_equal(erase(images[9:], seed=0, first_position=9, probability=0.4), out[9:])
    np.testing.assert_array_equal(erase(images, seed=0, first_position=0, probability=0.0), images)


def test_erasing_with_a_color_takes_the_same_boxes():
    images = np.full((50, 24, 32, 3), 77, np.uint8)
    out = erase(images, seed=0, first_position=0, probability=0.4, fill=(0.0, 0.5, 1.0))
    noisy = erase(images, seed=0, first_position=0, probability=0.4)
    hit = (out != 77).all(3)
    assert hit.any() and (out[hit] == (0, 128, 255)).all() and (out[~hit] == 77).all()
    assert ((noisy != 77).any(3) <= hit).all() and (noisy[hit] != 77).any(1).mean() > 0.99


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_shares_are_what_was_mixed(mixup, cutmix):
    count = 400
    values = np.arange(count) % 200
    images = np.broadcast_to(values.astype(np.uint8)[:, None, None, None], (count, 10, 8, 3)).copy()
    labels = np.arange(count, dtype=np.int32)
    mixed = mix(images, labels, seed=1, first_position=0, mixup=mixup, cutmix=cutmix)
    np.testing.assert_array_equal(mixed["label"], labels)
    np.testing.assert_array_equal(mixed["label2"].reshape(-1, 2), labels.reshape(-1, 2)[:, ::-1])
    share = mixed["share"].astype(float)
    expected = share * values + (1 - share) * values[mixed["label2"]]
    np.testing.assert_allclose(mixed["image"].mean((1, 2, 3)), expected, atol=0.51)
    assert share.min() >= 0 and share.max() <= 1 and len(np.unique(share)) > 20
    boxes = np.array([len(np.unique(image)) == 2 for image in mixed["image"]])
    assert boxes.any() == (cutmix > 0)
    if mixup and cutmix:
        assert 0.25 < boxes.mean() < 0.6
    if not cutmix:  # Beta(0.4, 0.4): mean 1/2, variance 1 / (4 · 1.8)
        assert abs(share.mean() - 0.5) < 0.06 and abs(share.var() - 1 / 7.2) < 0.02


def test_a_mixture_is_of_neighbors_and_keeps_the_own_label_first():
    batch = joined(take(4, augmentation=Augmentation(mixup=1.0)))
    images = Pictures(30).images.astype(float)
    own, other = images[batch["index"]], images[batch["label2"]]
    share = batch["share"].astype(float)[:, None, None, None]
    np.testing.assert_array_equal(batch["label"], batch["index"])
    np.testing.assert_array_equal(batch["label2"], batch["index"].reshape(-1, 2)[:, ::-1].ravel())
    np.testing.assert_allclose(batch["image"], share * own + (1 - share) * other, atol=0.51)


def test_stages_without_labels_never_mix():
    data = {**get_default().data.to_dict(), "mixup": 0.8, "cutmix": 1.0, "flip": True}
    assert augmentation_of(data).mixes
    assert augmentation_of(data, labeled=False) == Augmentation(flip=True)
    with pytest.raises(ConfigError, match=r"pictures has none"):
        training_batches(Pictures(8, labelled=False), 4, seed=0, augmentation=augmentation_of(data))
    for options in ({"batch_size": 5}, {"batch_size": 6, "shard": (0, 2)}):
        with pytest.raises(ConfigError, match="must be even"):
            training_batches(Pictures(8), seed=0, augmentation=augmentation_of(data), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", -2),
        ("shift", 1.5),
        ("crop_scale", (0.5,)),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 1.2)),
        ("crop_scale", (0.9, 0.5)),
        ("crop_ratio", ()),
        ("crop_ratio", (0.5, "2")),
        ("randaugment", -1),
        ("randaugment_magnitude", 31),
        ("erase", 1.5),
        ("erase_fill", (0.5, 0.5)),
        ("erase_fill", (0.5, 0.5, 128)),
        ("mixup", -0.1),
        ("cutmix", float("nan")),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ConfigError, match=f"data.{name}="):
        augmentation_of({name: value})


def test_every_setting_is_in_the_default_configuration():
    data = get_default().data
    for field in dataclasses.fields(Augmentation):
        assert data[field.name] == field.default, field.name
