"""Buckets: every image once, in a shape that holds it, whatever the order and the hosts; sizes without decoding."""

import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drep_jax.data import open_source
from drep_jax.data.buckets import make_buckets, padding_of, restore_order
from drep_jax.data.decode import decode, stored_size
from drep_jax.data.loader import evaluation_batches
from drep_jax.data.merged import MergedSource
from drep_jax.data.source import Subset, sizes_of
from drep_jax.data.unreadable import tolerating
from drep_jax.errors import ConfigError, DataError, UnreadableError
from tests.pictures import textured

many_sizes = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=80)
@given(many_sizes, st.sampled_from([1, 8, 32]), st.integers(1, 6))
def test_every_image_is_in_the_smallest_of_a_few_shapes_that_hold_it(sizes, multiple, limit):
    sizes = np.array(sizes)
    buckets = make_buckets(sizes, multiple=multiple, limit=limit)
    assert 1 <= len(buckets) <= limit
    assert sorted(np.concatenate([bucket.indices for bucket in buckets]).tolist()) == list(range(len(sizes)))
    shapes = [bucket.shape for bucket in buckets]
    areas = [height * width for height, width in shapes]
    assert len(set(shapes)) == len(shapes) and areas == sorted(areas, reverse=True)
    for bucket in buckets:
        height, width = bucket.shape
        assert height % multiple == width % multiple == 0
        assert (np.diff(bucket.indices) > 0).all() and bucket.indices.dtype == np.int32
        for index in bucket.indices:
            holding = [h * w for h, w in shapes if h >= sizes[index, 0] and w >= sizes[index, 1]]
            assert height * width == min(holding)
            assert height >= sizes[index, 0] and width >= sizes[index, 1]
    rounded = -(-sizes // multiple) * multiple
    exact = len(np.unique(rounded, axis=0)) <= limit
    if exact:
        assert {tuple(size) for size in rounded.tolist()} == set(shapes), "nothing is merged without need"
    pixels = sum(area * len(bucket.indices) for area, bucket in zip(areas, buckets, strict=True))
    np.testing.assert_allclose(padding_of(buckets, sizes), pixels / sizes.prod(axis=1).sum() - 1)
    one = make_buckets(sizes, multiple=multiple, limit=1)
    assert one[0].shape == tuple(rounded.max(axis=0)) and padding_of(one, sizes) >= padding_of(buckets, sizes)


@settings(deadline=None, max_examples=40)
@given(many_sizes, st.randoms())
def test_the_order_of_the_images_changes_no_shape(sizes, random):
    order = list(range(len(sizes)))
    random.shuffle(order)
    buckets, shuffled = make_buckets(np.array(sizes)), make_buckets(np.array(sizes)[order])
    assert [bucket.shape for bucket in buckets] == [bucket.shape for bucket in shuffled]
    for one, other in zip(buckets, shuffled, strict=True):
        assert sorted(order[index] for index in other.indices) == one.indices.tolist()


def test_merging_takes_the_pair_that_costs_least():
    sizes = [(64, 64)] * 50 + [(64, 96)] * 3 + [(320, 320)] * 2 + [(320, 352)] * 30
    merged = make_buckets(np.array(sizes), limit=3)
    # 3 images of 64 x 96 would make 50 others half as large again; 2 of 320 x 320 get 10 % more.
    assert [bucket.shape for bucket in merged] == [(320, 352), (64, 96), (64, 64)]
    assert [len(bucket.indices) for bucket in merged] == [32, 3, 50]


def test_odd_cases_of_sizes():
    assert make_buckets(np.zeros((0, 2), int)) == ()
    unknown = make_buckets(np.array([[0, 0], [40, 40], [90, 90], [0, 0]]))
    assert [(bucket.shape, bucket.indices.tolist()) for bucket in unknown] == [((96, 96), [2]), ((64, 64), [0, 1, 3])]
    assert make_buckets(np.zeros((2, 2), int))[0].shape == (32, 32)
    for bad in ({"multiple": 0}, {"limit": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            make_buckets(np.ones((1, 2), int), **bad)
    with pytest.raises(DataError, match=r"\(n, 2\)"):
        make_buckets(np.ones(4, int))


class Uneven:
    """Image i is filled with i + 1 and as large as it is told."""

    name, note, class_names, num_classes, in_memory = "uneven", None, None, 100, True

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def size_of(self, index):
        return self.sizes[index]

    def __getitem__(self, index):
        return {"image": np.full((*self.sizes[index], 3), index + 1, np.uint8), "label": np.int32(index + 100)}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=25),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 4),
)
def test_batches_hold_every_image_once_on_any_number_of_hosts(sizes, part, hosts, limit):
    source = Uneven(sizes)
    buckets = make_buckets(sizes_of(source), multiple=8, limit=limit)
    streams = [
        list(evaluation_batches(source, part * hosts, shard=(host, hosts), buckets=buckets)) for host in range(hosts)
    ]
    assert len({len(stream) for stream in streams}) == 1, "every host takes as many steps"
    rows = {"index": [], "label": [], "mean": []}
    for batches in zip(*streams, strict=True):
        assert len({batch["image"].shape for batch in batches}) == 1, "all hosts have the same shape at the same step"
        for batch in batches:
            assert batch["image"].shape[0] == part and batch["image"].shape[1:3] in {b.shape for b in buckets}
            for row, (height, width) in enumerate(batch["size"].tolist()):
                index, image = int(batch["index"][row]), batch["image"][row]
                assert bool(batch["mask"][row]) == (index >= 0)
                assert (height, width) == (sizes[index] if index >= 0 else (0, 0))
                assert (image[:height, :width] == index + 1).all() and image.sum() == height * width * 3 * (index + 1)
            for name in ("index", "label"):
                rows[name].append(batch[name])
            rows["mean"].append(batch["image"].mean((1, 2, 3)))
    joined = {name: np.concatenate(values) for name, values in rows.items()}
    ordered = restore_order(joined["index"], {"label": joined["label"], "deep": {"mean": joined["mean"]}})
    np.testing.assert_array_equal(ordered["label"], np.arange(len(sizes)) + 100)
    assert len(ordered["deep"]["mean"]) == len(sizes)
    assert len({batch["image"].shape for stream in streams for batch in stream}) == len(buckets)


def test_without_buckets_several_sizes_are_refused_with_the_way_out():
    with pytest.raises(DataError, match=r"uneven gives images of several sizes.*data\.resize.*buckets"):
        next(evaluation_batches(Uneven([(3, 4), (4, 4)]), 2))
    same = list(evaluation_batches(Uneven([(3, 4)] * 3), 2))
    assert "size" not in same[0] and same[1]["mask"].tolist() == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# Sizes from headers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in itertools.product(("train", "validation", "test"), range(12)):
        (tmp_path / split).mkdir(exist_ok=True)
        size, options = rng.integers(20, 90, 2), {}
        if number % 3 == 0:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = int(rng.integers(2, 9))
        form = ("png", "jpg", "webp", "gif")[number % 4]
        picture = Image.fromarray(textured(1, tuple(size), seed=number)[0])
        picture.save(tmp_path / split / f"{number:02}.{form}", **options if form != "gif" else {})
    return tmp_path


@pytest.mark.parametrize("how", ["keep", "keep:32", "crop", "squash", "pad"])
def test_sizes_are_those_of_the_images(folder, how, monkeypatch):
    source = open_source(f"folder:{folder}", "test", image_size=(40, 50), resize=how)
    actual = np.array([source[index]["image"].shape[:2] for index in range(len(source))])
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("an image was decoded to know its size"))
    sizes = sizes_of(source)
    np.testing.assert_array_equal(sizes, actual)
    assert sizes.dtype == np.int32 and (len(np.unique(sizes, axis=0)) > 1) == how.startswith("keep")
    chosen = Subset(tolerating(source, 3), [5, 2, 7])
    np.testing.assert_array_equal(sizes_of(chosen), actual[[5, 2, 7]])
    merged = MergedSource([source, chosen], [1.0, 1.0])
    np.testing.assert_array_equal(
        np.sort(sizes_of(merged), axis=0)[[0, -1]],
        np.sort(np.concatenate([actual, actual[[5, 2, 7]]]), axis=0)[[0, -1]],
    )


def test_images_of_their_own_size_are_evaluated_in_buckets(folder):
    source = open_source(f"folder:{folder}", "test", image_size=(40, 50), resize="keep")
    (folder / "test" / "05.jpg").write_bytes(b"no image")
    (folder / "test" / "06.webp").write_bytes((folder / "test" / "06.webp").read_bytes()[:-200])
    with pytest.raises(UnreadableError, match=r"05\.jpg"):
        sizes_of(source)
    source = tolerating(source, 2)
    buckets = make_buckets(sizes_of(source), limit=3)
    batches = list(evaluation_batches(source, 4, buckets=buckets))
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in ("index", "mask", "size")}
    good = [index for index in range(12) if index not in (5, 6)]
    assert sorted(joined["index"][joined["mask"]].tolist()) == good
    sizes = restore_order(joined["index"], joined["size"])
    np.testing.assert_array_equal(sizes, [source[index]["image"].shape[:2] for index in good])


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_png_may_tell_its_orientation_behind_the_pixels(tmp_path, orientation, place):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, picture = tmp_path / "a.png", Image.fromarray(textured(1, (20, 31))[0])
    picture.save(path, **({"exif": exif} if place == "before" else {}))
    if place == "behind":
        data = exif.tobytes()[6:]
        chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
        path.write_bytes(path.read_bytes()[:-12] + chunk + path.read_bytes()[-12:])  # before the end chunk, IEND
    assert stored_size(path, "it") == decode(path, "it").shape[:2] == ((31, 20) if orientation > 4 else (20, 31))
    assert stored_size(path.read_bytes(), "it") == stored_size(str(path), "it")
