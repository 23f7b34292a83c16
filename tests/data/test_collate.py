"""Collation: padding and what tells of it, there and back; labels of training and evaluation follow their images."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drep_jax.data.augment import Augmentation
from drep_jax.data.collate import collate, read, uncollate, valid_pixels
from drep_jax.data.columns import RESERVED, Column, follow
from drep_jax.data.corruptions import corrupt
from drep_jax.data.geometry import Transform
from drep_jax.data.loader import evaluation_batches, training_batches
from drep_jax.data.source import Subset
from drep_jax.data.unreadable import Tolerant
from drep_jax.errors import ConfigError, DataError, UnreadableError
from tests.pictures import textured

COLUMNS = (
    Column("label", np.uint8, geometry="mask", fill=255),
    Column("boxes", np.float32, (4,), ragged=True, geometry="boxes", capacity=8),
    Column("classes", ragged=True, fill=-1, capacity=8),
    Column("heights", np.float32, geometry="mask", fill=-5),
    Column("weight", np.float32),
)
BOUNDARIES = np.array([[1, 1, 5, 6], [0, 0, 12, 3], [10, 2, 14, 9], [3, 3, 4, 4]], np.float32)


class Scenes:
    """Images whose three channels are each pixel's class, row and column, with maps and boxes that say the same."""

    name, note, class_names, num_classes = "scenes", None, None, 9
    image_size, resize = (16, 20), "keep"

    def __init__(self, sizes, resize="keep", labelled=True):
        self.sizes, self.resize, self.labelled = sizes, resize, labelled

    def __len__(self):
        return len(self.sizes)

    def raw(self, index):
        height, width = self.sizes[index]
        rows, columns = np.indices((height, width))
        classes = (rows // 3 + columns // 4 + index) % 9
        image = np.stack([classes * 20, rows * 5 + 5, columns * 5 + 5], axis=2).astype(np.uint8)
        count = index % 4
        item = {"image": image, "where": f"scene {index}", "camera": np.int32(index)}
        labels = {
            "label": classes.astype(np.uint8),
            "heights": np.float32(rows),
            "boxes": np.minimum(BOUNDARIES, [width, height, width, height])[:count],
            "classes": np.arange(count) + 10 * index,
            "weight": np.float32(index) / 2,
        }
        return {**item, **labels} if self.labelled else item

    def __getitem__(self, index):
        return {name: value for name, value in self.raw(index).items() if name != "where"}

    def size_of(self, index):
        return self.sizes[index]


def items_of(source, indices):
    return [
        follow(source[index], Transform(source.sizes[index]), COLUMNS, "it") if source.labelled else source[index]
        for index in indices
    ]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, Transform):
            assert value == right[name]
        else:
            np.testing.assert_array_equal(value, right[name], err_msg=name)
            assert np.asarray(value).dtype == np.asarray(right[name]).dtype, name


sizes = st.lists(st.tuples(st.integers(1, 16), st.integers(1, 20)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_there_and_back(sizes, below, right, labelled):
    source = Scenes(sizes, labelled=labelled)
    items = items_of(source, range(len(source)))
    shape = (max(height for height, _ in sizes) + below, max(width for _, width in sizes) + right)
    columns = COLUMNS if labelled else ()
    batch = collate(items, columns, shape)
    for item, back in zip(items, uncollate(batch, columns), strict=True):
        given_types = {"boxes": np.float32(item["boxes"])} if labelled else {}
        assert_same({**item, **given_types}, back)
    again = collate(uncollate(batch, columns), columns, shape)
    assert_same(batch, again)


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(0, 9), st.integers(0, 9))
def test_padding_is_told_and_has_the_fill_of_its_column(sizes, below, right):
    source = Scenes(sizes)
    shape = (max(height for height, _ in sizes) + below, max(width for _, width in sizes) + right)
    batch = collate(items_of(source, range(len(source))), COLUMNS, shape)
    assert batch["image"].shape == (len(sizes), *shape, 3) and batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["size"], sizes)
    valid = valid_pixels(batch["size"], shape)
    np.testing.assert_array_equal(valid, batch["image"][..., 1] > 0)
    np.testing.assert_array_equal(valid, jax.jit(lambda size: valid_pixels(size, shape))(batch["size"]))
    np.testing.assert_array_equal(batch["label"] == 255, ~valid)
    np.testing.assert_array_equal(batch["heights"] == -5, ~valid)
    assert batch["label"].dtype == np.uint8 and batch["heights"].dtype == np.float32
    assert batch["boxes"].shape == (len(sizes), 8, 4) and batch["boxes"].dtype == np.float32
    for place, (height, width) in enumerate(sizes):
        boxes = np.minimum(BOUNDARIES, [width, height, width, height])[: place % 4]
        there = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        objects = batch["objects_valid"][place]
        assert objects[: there.sum()].all() and not objects[there.sum() :].any()
        np.testing.assert_array_equal(batch["boxes"][place][objects], boxes[there])
        np.testing.assert_array_equal(batch["classes"][place][objects], np.arange(place % 4)[there] + 10 * place)
        assert (batch["classes"][place][~objects] == -1).all() and not batch["boxes"][place][~objects].any()
        transform = Transform.from_row(batch["transform"][place])
        assert transform.size_in == tuple(batch["original_size"][place]) == (height, width)
        assert transform.size_out == shape
        raw = source.raw(place)
        np.testing.assert_array_equal(transform.image(raw["image"]), batch["image"][place])
        np.testing.assert_array_equal(transform.inverse().mask(batch["label"][place]), raw["label"])
        prediction = np.random.default_rng(0).normal(size=(*shape, 3))
        np.testing.assert_array_equal(transform.inverse().dense(prediction), prediction[:height, :width])


def test_the_capacity_is_declared_or_the_next_power_of_two():
    image = np.zeros((2, 2, 3), np.uint8)
    for counts, places in (((0, 0), 1), ((1, 0), 1), ((3, 2), 4), ((4, 1), 4), ((5, 5), 8)):
        items = [{"image": image, "ids": np.arange(count)} for count in counts]
        batch = collate(items, (Column("ids", ragged=True),))
        assert batch["ids"].shape == batch["objects_valid"].shape == (2, places)
        assert batch["objects_valid"].sum(1).tolist() == list(counts)
        assert set(batch) == {"image", "ids", "objects_valid"}
    with pytest.raises(DataError, match=r'5 objects, but the column "ids" is declared for 4'):
        collate(items, (Column("ids", ragged=True, capacity=4),))


def test_what_cannot_be_collated():
    image = np.zeros((2, 2, 3), np.uint8)
    large = np.zeros((3, 2, 3), np.uint8)
    pair = (Column("ids", ragged=True), Column("marks", ragged=True))
    for items, columns, shape, message in (
        ([{"image": image}, {"image": large}], (), None, r"several sizes: \[\(2, 2\), \(3, 2\)\]. .*data.resize"),
        ([{"image": image}, {"image": large}], (), (2, 4), r"\(3, 2\) pixels .* \(2, 4\) does not hold"),
        ([{"image": image, "a": 1}, {"image": image}], (), None, "different columns"),
        ([{"image": image, "a": [1, 2]}], (), None, r'column "a" has the shape \(2,\); expected \(\)'),
        ([{"image": image, "a": "owl"}], (), None, 'column "a" holds <U3; expected int32'),
        ([{"image": image, "a": [1]}, {"image": image, "a": 1}], (), None, r'"a" has the shape \(1,\)'),
        ([{"image": image, "ids": [1, 2], "marks": [1]}], pair, None, "different numbers of objects"),
    ):
        with pytest.raises(DataError, match=message):
            collate(items, columns, shape)
    for columns, message in (
        *(((Column(name),), "Reserved") for name in RESERVED),
        ((Column("a"), Column("a")), "declared once"),
        ((Column("a", ragged=True, capacity=2), Column("b", ragged=True, capacity=3)), "one capacity"),
    ):
        with pytest.raises(ConfigError, match=message):
            collate([{"image": image}], columns)
    for options, message in (
        ({"geometry": "boxes"}, "ragged and of shape"),
        ({"geometry": "mask", "ragged": True}, "not ragged"),
        ({"geometry": "points"}, '"mask", "boxes" or None'),
        ({"capacity": 3}, "capacity"),
    ):
        with pytest.raises(ConfigError, match=message):
            Column("a", **options)


# ---------------------------------------------------------------------------------------------------------------------
# The loader
# ---------------------------------------------------------------------------------------------------------------------

MIXED = [(10 + 3 * (i % 5), 30 - 2 * (i % 7)) for i in range(24)]


def assert_follows(batch, source):
    """Every label is where the image's own channels say; the transform leads from the stored image to the batch's."""
    for place, index in enumerate(batch["index"].tolist()):
        raw, transform = source.raw(index), Transform.from_row(batch["transform"][place])
        np.testing.assert_array_equal(transform.mask(raw["label"]), batch["label"][place])
        np.testing.assert_array_equal(transform.mask(raw["heights"], fill=-5), batch["heights"][place])
        boxes, keep = transform.boxes(raw["boxes"])
        objects = batch["objects_valid"][place]
        np.testing.assert_array_equal(batch["boxes"][place][objects], boxes[keep].astype(np.float32))
        np.testing.assert_array_equal(batch["classes"][place][objects], raw["classes"][keep])
        assert batch["weight"][place] == index / 2 and batch["camera"][place] == index
        assert tuple(batch["original_size"][place]) == source.sizes[index] == transform.size_in
        yield raw, transform, batch["image"][place]


@pytest.mark.parametrize("how", ["crop", "crop:0.7", "squash", "pad"])
@pytest.mark.parametrize("crop", [(), (0.3, 0.9)])
def test_labels_of_training_follow_their_images(how, crop):
    source = Scenes(MIXED, how)
    augmentation = Augmentation(flip=True, shift=2, crop_scale=crop)
    options = {"seed": 5, "augmentation": augmentation, "columns": COLUMNS}
    batches = list(itertools.islice(training_batches(source, 8, **options), 6))
    flipped, cut = set(), 0
    for batch in batches:
        assert batch["image"].shape == (8, 16, 20, 3) and batch["label"].shape == (8, 16, 20)
        for raw, transform, image in assert_follows(batch, source):
            np.testing.assert_array_equal(transform.image(raw["image"]), image)
            flipped.add("Orient(code=2)" in str(transform))
            cut += len(raw["boxes"])
        cut -= batch["objects_valid"].sum()
    assert flipped == {True, False} and (cut > 0 or how in ("squash", "pad"))
    late = list(itertools.islice(training_batches(source, 8, start_step=4, num_threads=3, **options), 2))
    parts = [list(itertools.islice(training_batches(source, 8, shard=(i, 2), **options), 6)) for i in range(2)]
    for number in (0, 1):
        assert_same(late[number], batches[4 + number])
        joined = {name: np.concatenate([part[number][name] for part in parts]) for name in batches[number]}
        assert_same(joined, batches[number])


def test_images_are_those_of_a_stage_without_labels():
    source = Scenes(MIXED, "crop")
    options = {"seed": 5, "augmentation": Augmentation(flip=True, shift=2, crop_scale=(0.3, 0.9), erase=0.5)}
    plain = Scenes(MIXED, "crop", labelled=False)
    for one, other in zip(
        itertools.islice(training_batches(source, 8, columns=COLUMNS, **options), 3),
        training_batches(plain, 8, **options),
        strict=False,
    ):
        np.testing.assert_array_equal(one["image"], other["image"])
        assert set(other) == {"image", "camera", "index"}


@pytest.mark.parametrize(("setting", "value"), [("randaugment", 2), ("mixup", 0.2), ("cutmix", 1.0)])
def test_augmentation_that_labels_cannot_follow_is_refused(setting, value):
    augmentation = Augmentation(**{setting: value})
    with pytest.raises(ConfigError, match=rf'data\.{setting}={value}.* "label", "boxes", "heights" cannot follow'):
        training_batches(Scenes(MIXED), 8, seed=0, augmentation=augmentation, columns=COLUMNS)
    training_batches(Scenes(MIXED), 8, seed=0, augmentation=augmentation, columns=COLUMNS[-1:])


def test_learning_from_images_of_several_sizes_is_refused_with_the_way_out():
    for columns in ((), COLUMNS):
        batches = training_batches(
            Scenes(MIXED), 8, seed=0, augmentation=Augmentation(flip=True, shift=1), columns=columns
        )
        with pytest.raises(DataError, match=r"scenes gives images of several sizes.*data\.resize=crop, squash or pad"):
            next(batches)


def test_several_hosts_need_a_capacity():
    open_ended = (Column("classes", ragged=True),)
    for batches in (
        lambda shard: training_batches(Scenes(MIXED), 8, seed=0, columns=open_ended, shard=shard),
        lambda shard: evaluation_batches(Scenes(MIXED), 8, columns=open_ended, shard=shard),
    ):
        batches((0, 1))
        with pytest.raises(ConfigError, match="classes is declared without a capacity"):
            batches((0, 2))


def test_evaluation_pads_the_last_batch_with_images_that_show_nothing():
    source = Scenes(MIXED[:10], "squash")
    batches = list(evaluation_batches(source, 4, columns=COLUMNS))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    for batch in batches[:2]:
        list(assert_follows(batch, source))
    last = batches[-1]
    assert last["mask"].tolist() == [True, True, False, False]
    assert not last["image"][2:].any() and (last["label"][2:] == 255).all() and (last["heights"][2:] == -5).all()
    assert not last["objects_valid"][2:].any() and not last["transform"][2:].any()
    assert not last["original_size"][2:].any() and not last["weight"][2:].any()


def test_unreadable_images_show_nothing_too():
    class Broken(Scenes):
        def raw(self, index):
            if index in (0, 1, 2, 3, 6):
                raise UnreadableError(f"Cannot read the image {index}.", str(index))
            return super().raw(index)

    source = Tolerant(Broken(MIXED[:9], "squash"), 5)
    batches = list(evaluation_batches(source, 4, columns=COLUMNS))
    assert [batch["index"].tolist() for batch in batches] == [[-1] * 4, [4, 5, -1, 7], [8, -1, -1, -1]]
    assert (batches[0]["label"] == 255).all() and not batches[0]["objects_valid"].any()
    batch = read(source, np.array([2, 7]), COLUMNS)
    assert batch["index"].tolist() == [4, 7]
    subset = Subset(source, [7, 5])
    np.testing.assert_array_equal(read(subset, np.array([0]), COLUMNS)["label"][0], batch["label"][1])


@pytest.mark.parametrize("spec", ["gaussian:20", "contrast:50", "clean,blur:1,jpeg:40", "cifar10c:fog:3"])
def test_corruption_does_not_depend_on_the_padding(spec):
    images = [textured(1, size, seed=i)[0] for i, size in enumerate([(20, 31), (32, 17), (32, 32)])]
    batch = collate([{"image": image} for image in images], (), (40, 48))
    noisy = corrupt(batch["image"], np.arange(3), spec, 1, batch["size"])
    for place, image in enumerate(images):
        height, width = image.shape[:2]
        np.testing.assert_array_equal(
            noisy[place, :height, :width], corrupt(image[None], np.array([place]), spec, 1)[0]
        )
    assert not noisy[~valid_pixels(batch["size"], (40, 48))].any()
    assert not corrupt(batch["image"], np.arange(3), spec, 1, np.zeros((3, 2), int))[:, 32:].any()
