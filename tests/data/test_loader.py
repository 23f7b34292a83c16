"""The loader: order, resuming, augmentation, padding, threads and errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drep_jax.data import open_source
from drep_jax.data.augment import Augmentation
from drep_jax.data.augment.flip_crop import flip_and_shift
from drep_jax.data.loader import epoch_order, evaluation_batches, normalize, training_batches
from drep_jax.errors import ConfigError, DataError


class Numbered:
    """Image i is filled with i; labels are i + 1000."""

    num_classes, class_names, note = 5000, None, None

    def __init__(self, count, labelled=True, size=(4, 6)):
        self.name, self.count, self.labelled, self.size = "numbered", count, labelled, size

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        image = np.full((*self.size, 3), i, np.uint8)
        return {"image": image, "label": np.int32(i + 1000)} if self.labelled else {"image": image}


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("threads", [0, 3])
def test_every_epoch_has_every_image_once_in_a_new_order(threads):
    batches = take(training_batches(Numbered(50), 16, seed=3, num_threads=threads), 25)
    order = np.concatenate([batch["index"] for batch in batches])
    epochs = order.reshape(8, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 8 and list(range(50)) not in epochs.tolist()
    for batch in batches:
        assert batch["image"].shape == (16, 4, 6, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == batch["index"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        np.testing.assert_array_equal(batch["label"], batch["index"] + 1000)


@pytest.mark.parametrize("threads", [0, 4])
def test_a_late_start_continues_exactly(threads):
    options = {"seed": 11, "augmentation": Augmentation(flip=True, shift=2)}
    fresh = take(training_batches(Numbered(30), 8, num_threads=0, **options), 20)
    for start in (3, 7, 15):  # epochs end inside batches 3, 7 and 11
        late = take(training_batches(Numbered(30), 8, start_step=start, num_threads=threads, **options), 5)
        assert_same(late, fresh[start : start + 5])


def test_seeds_give_different_orders_and_the_same_seed_the_same():
    first, again, other = (take(training_batches(Numbered(40), 40, seed=seed), 2) for seed in (0, 0, 1))
    assert_same(first, again)
    assert (first[0]["index"] != other[0]["index"]).any()
    assert (first[1]["index"] != other[0]["index"]).any(), "seed and epoch must not simply add up"


def test_the_order_is_the_same_on_every_machine():
    assert epoch_order(6, seed=1, epoch=2).tolist() == [4, 2, 0, 1, 5, 3]
    assert epoch_order(6, seed=1, epoch=2).dtype == np.int32


def test_shards_together_are_the_whole_batch():
    options = {"seed": 5, "augmentation": Augmentation(flip=True, shift=1)}
    whole = take(training_batches(Numbered(30), 12, **options), 4)
    parts = [take(training_batches(Numbered(30), 12, shard=(i, 3), **options), 4) for i in range(3)]
    joined = [{name: np.concatenate([p[n][name] for p in parts]) for name in whole[0]} for n in range(4)]
    assert_same(joined, whole)
    whole = list(evaluation_batches(Numbered(14), 12))
    parts = [list(evaluation_batches(Numbered(14), 12, shard=(i, 3))) for i in range(3)]
    joined = [{name: np.concatenate([p[n][name] for p in parts]) for name in whole[0]} for n in range(2)]
    assert_same(joined, whole)


def test_unlabelled_batches_have_no_label():
    assert set(next(training_batches(Numbered(9, labelled=False), 4, seed=0))) == {"image", "index"}
    assert set(next(evaluation_batches(Numbered(9, labelled=False), 4))) == {"image", "index", "mask"}


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 8)])
@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_sees_every_image_once_in_order(count, batch_size, threads):
    batches = list(evaluation_batches(Numbered(count), batch_size, num_threads=threads))
    assert len(batches) == -(-count // batch_size)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    mask = joined["mask"]
    assert mask.dtype == bool and all(len(values) == len(batches) * batch_size for values in joined.values())
    assert joined["index"][mask].tolist() == list(range(count))
    assert joined["label"][mask].tolist() == list(range(1000, 1000 + count))
    np.testing.assert_array_equal(joined["image"][mask][:, 1, 1, 1], np.arange(count))
    assert (joined["index"][~mask] == -1).all() and not joined["image"][~mask].any()
    assert joined["index"].dtype == joined["label"].dtype == np.int32


def test_fewer_images_than_a_batch_is_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"numbered has 7 images .* batch of 8"):
        training_batches(Numbered(7), 8, seed=0)
    assert len(next(training_batches(Numbered(8), 8, seed=0))["index"]) == 8


@pytest.mark.parametrize(
    "change", [{"seed": -1}, {"start_step": -1}, {"shard": (2, 2)}, {"shard": (0, 3)}, {"batch_size": 0}]
)
def test_bad_arguments_are_refused(change):
    with pytest.raises(ConfigError):
        training_batches(Numbered(20), **{"batch_size": 4, "seed": 0, **change})


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_unreadable_images_reach_the_caller_by_name(tmp_path, threads):
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        for i in range(12):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / split / f"{i:02}.png")
    broken = tmp_path / "train" / "05.png"
    broken.write_bytes(broken.read_bytes()[:45])
    source = open_source(f"folder:{tmp_path}", "train", image_size=(8, 8))
    for batches in (
        training_batches(source, 4, seed=0, num_threads=threads),
        evaluation_batches(source, 4, num_threads=threads),
    ):
        with pytest.raises(DataError, match=r"Cannot read the image .*05\.png") as caught:
            take(batches, 3)
        assert isinstance(caught.value, DataError)
    fine = open_source(f"folder:{tmp_path}", "test", image_size=(8, 8))
    assert_same(
        take(training_batches(fine, 4, seed=0, num_threads=threads), 4), take(training_batches(fine, 4, seed=0), 4)
    )


def test_images_of_several_sizes_are_refused():
    class Uneven(Numbered):
        def __getitem__(self, i):
            return {"image": np.zeros((4 + i % 2, 4, 3), np.uint8)}

    with pytest.raises(DataError, match="several sizes"):
        next(evaluation_batches(Uneven(4), 4))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_augmentation_depends_on_the_position_only(first, cut, shift, flip):
    images = np.random.default_rng(0).integers(1, 256, (10, 5, 7, 3), np.uint8)
    whole = flip_and_shift(images, seed=4, first_position=first, flip=flip, shift=shift)
    options = {"seed": 4, "flip": flip, "shift": shift}
    left = flip_and_shift(images[:cut], first_position=first, **options)
    right = flip_and_shift(images[cut:], first_position=first + cut, **options)
    np.testing.assert_array_equal(np.concatenate([left, right]), whole)
    if not (shift or flip):
        np.testing.assert_array_equal(whole, images)


def test_flips_are_mirror_images_half_of_the_time():
    images = np.random.default_rng(0).integers(0, 256, (400, 3, 4, 3), np.uint8)
    out = flip_and_shift(images, seed=0, first_position=0, flip=True, shift=0)
    same, mirrored = ((out == images).all((1, 2, 3)), (out == images[:, :, ::-1]).all((1, 2, 3)))
    assert (same ^ mirrored).all() and 160 < same.sum() < 240


def test_shifts_move_every_pixel_alike_and_fill_with_zeros():
    images = np.random.default_rng(0).integers(1, 256, (500, 6, 5, 3), np.uint8)
    out = flip_and_shift(images, seed=2, first_position=9, flip=False, shift=2)
    seen = set()
    for before, after in zip(images, out, strict=True):
        matches = []
        for dy, dx in itertools.product(range(-2, 3), repeat=2):
            moved = np.zeros_like(before)
            moved[max(0, dy) : 6 + min(0, dy), max(0, dx) : 5 + min(0, dx)] = before[
                max(0, -dy) : 6 - max(0, dy), max(0, -dx) : 5 - max(0, dx)
            ]
            matches += [(dy, dx)] * bool((moved == after).all())
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 25


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalize(dtype):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(dtype)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = jax.jit(lambda x: normalize(x, mean, std))(images)
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(normalize(images, (0.5,), (0.25,)), (images / 255.0 - 0.5) / 0.25, atol=2e-6)
    for bad in ((mean[:2], std), (mean, (0.2, 0.0, 0.2))):
        with pytest.raises(ConfigError):
            normalize(images, *bad)
