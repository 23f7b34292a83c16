"""Corruptions: right strengths in their own units, and random numbers that belong to an image, not to a batch."""

import collections
import io
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from drep_jax.data.corruptions import CORRUPTIONS, Part, corrupt, parse_spec
from drep_jax.errors import ConfigError, DataError
from tests.pictures import textured

GREY = np.full((8, 32, 32, 3), 127, np.uint8)
INDEX = np.arange(8) + 100


def one(image, spec, seed=0):
    return corrupt(image[None], np.array([0]), spec, seed)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------

MIXED = "clean,gaussian:5..30,blur,jpeg,cifar10c:fog:4"


@pytest.mark.parametrize("spec", [*sorted(CORRUPTIONS), "gaussian:10", "motion:5", MIXED])
def test_the_result_depends_on_seed_and_image_only(spec):
    images, index = textured(8), INDEX
    before = images.copy()
    whole = corrupt(images, index, spec, seed=3)
    np.testing.assert_array_equal(images, before)
    assert whole.dtype == np.float32 and whole.shape == images.shape
    assert whole.min() >= 0 and whole.max() <= 255 and np.isfinite(whole).all()
    assert (whole != images).any()
    order = np.array([5, 2, 7])
    np.testing.assert_array_equal(corrupt(images[order], index[order], spec, seed=3), whole[order])
    np.testing.assert_array_equal(corrupt(images[:1], index[:1], spec, seed=3), whole[:1])
    np.testing.assert_array_equal(corrupt(images.astype(np.float32), index, spec, seed=3), whole)
    assert (corrupt(images, index, spec, seed=4) != whole).any()


def test_images_and_channels_share_no_noise():
    noise = (corrupt(GREY, INDEX, "gaussian:20", seed=0) - 127).reshape(8, -1)
    assert np.abs(np.corrcoef(noise) - np.eye(8)).max() < 0.08
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.05
    other = corrupt(GREY, INDEX, "gaussian:20", seed=1) - 127
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.03


def test_two_strengths_of_one_corruption_draw_the_same_noise():
    weak, strong = (corrupt(GREY, INDEX, f"gaussian:{std}", seed=0) - 127 for std in (5, 10))
    np.testing.assert_allclose(2 * weak, strong, atol=1e-4)


def test_noise_is_the_same_as_ever():
    first = corrupt(GREY[:1], np.array([7]), "gaussian:10", seed=3)[0, 0, :2] - 127
    recorded = [[-18.395523, -13.195084, -8.802963], [6.477829, 0.605713, 0.080040]]
    np.testing.assert_allclose(first, recorded, atol=1e-4)


@pytest.mark.parametrize(("index", "seed"), [(-1, 0), (2**40, 0), (0, -5), (0, 2**63)])
def test_any_integer_is_an_index_and_a_seed(index, seed):
    out = corrupt(GREY[:2], np.array([index, 1]), "gaussian:10", seed)
    assert (out[0] != out[1]).any() and (out[0] != corrupt(GREY[:1], np.array([0]), "gaussian:10", 0)[0]).any()


def test_a_range_draws_one_strength_an_image_uniformly():
    small = np.full((400, 16, 16, 3), 127, np.uint8)
    stds = (corrupt(small, np.arange(400), "gaussian:10..40", seed=1) - 127).std(axis=(1, 2, 3))
    assert 9 < stds.min() < 12 and 38 < stds.max() < 44
    assert abs(stds.mean() - 25) < 1.5 and abs(stds.std() - 30 / np.sqrt(12)) < 0.8


def test_a_drawn_strength_acts_as_if_asked_for():
    drawn = corrupt(GREY, INDEX, "gaussian:5..20", seed=1) - 127
    unit = (corrupt(GREY, INDEX, "gaussian:5", seed=1) - 127) / 5
    ratio = drawn.std(axis=(1, 2, 3)) / unit.std(axis=(1, 2, 3))
    np.testing.assert_allclose(drawn, unit * ratio[:, None, None, None], atol=1e-3)


def test_a_name_alone_is_its_default_range():
    for name, corruption in CORRUPTIONS.items():
        low, high = corruption.default
        assert 0 <= low < high <= corruption.largest
        images, index = textured(), np.arange(4)
        spec = f"{name}:{low}..{high}"
        np.testing.assert_array_equal(corrupt(images, index, name, 0), corrupt(images, index, spec, 0))


def test_each_image_gets_one_of_several_with_equal_chances():
    count = 600
    images = np.full((count, 4, 4, 3), 127, np.uint8)
    parts = ("clean", "brightness:20", "gaussian:5")
    mixed = corrupt(images, np.arange(count), ",".join(parts), seed=0)
    alone = [corrupt(images, np.arange(count), part, seed=0) for part in parts]
    chosen = [next(n for n, other in enumerate(alone) if np.array_equal(mixed[i], other[i])) for i in range(count)]
    shares = collections.Counter(chosen)
    assert all(abs(shares[n] / count - 1 / 3) < 0.06 for n in range(3))
    twice = corrupt(images, np.arange(count), "clean,clean,clean,gaussian:5", seed=0)
    assert abs((twice == 127).all(axis=(1, 2, 3)).mean() - 0.75) < 0.06


# ---------------------------------------------------------------------------------------------------------------------
# Strengths
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["clean", *(f"{name}:0" for name in sorted(CORRUPTIONS)), "gaussian:0..0"])
def test_strength_zero_and_clean_change_nothing(spec):
    images = textured()
    for form in (images, images.astype(np.float32) + np.float32(0.25) * (images < 255)):
        out = corrupt(form, np.arange(4), spec, seed=0)
        assert out.dtype == np.float32 and out is not form
        np.testing.assert_array_equal(out, form)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_more_strength_is_more_change(name):
    images, index = textured(16), np.arange(16)
    low, high = CORRUPTIONS[name].default
    strengths = [low + (high - low) * part for part in (0.25, 0.5, 1)]
    changes = [np.abs(corrupt(images, index, f"{name}:{s}", seed=0) - images).mean() for s in strengths]
    assert 0.3 < changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
@pytest.mark.parametrize("size", [(1, 1), (3, 8), (40, 17)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_corruption_bears_every_size_and_strength(name, size, channels):
    images = textured(2, size, channels)
    for strength in (1e-200, 1, CORRUPTIONS[name].largest):
        out = corrupt(images, np.arange(2), f"{name}:{strength}", seed=0)
        assert out.shape == images.shape and np.isfinite(out).all() and out.min() >= 0 and out.max() <= 255


@pytest.mark.parametrize("std", [2.0, 20.0])
def test_gaussian_has_the_stated_deviation_in_gray_levels(std):
    noise = corrupt(GREY, INDEX, f"gaussian:{std}", seed=0) - 127
    assert abs(noise.std() / std - 1) < 0.02 and abs(noise.mean()) < 0.02 * std


def test_values_stay_gray_levels():
    for level in (0, 255):
        out = corrupt(np.full((2, 8, 8, 3), level, np.uint8), INDEX[:2], "gaussian:50", seed=0)
        assert out.min() >= 0 and out.max() <= 255 and out.std() > 5


@pytest.mark.parametrize("level", [51, 127, 204])
def test_shot_noise_grows_as_the_root_of_the_light(level):
    noise = corrupt(np.full((8, 32, 32, 3), level, np.uint8), INDEX, "shot:15", seed=0) - level
    assert abs(noise.std() / (15 * np.sqrt(level / 255)) - 1) < 0.03 and abs(noise.mean()) < 0.5


def test_blur_spreads_a_point_by_sigma():
    point = np.zeros((65, 65, 3), np.uint8)
    point[32, 32] = 255
    spread = one(point, "blur:3")
    rows = np.arange(65) - 32
    assert abs(spread.sum() / (3 * 255) - 1) < 1e-3
    for axis in (0, 1):
        profile = spread[..., 0].sum(axis=1 - axis) / 255
        assert abs(np.sqrt((profile * rows**2).sum()) - 3) < 0.05


def test_motion_draws_a_point_into_a_line_of_the_stated_length():
    point = np.zeros((33, 33, 3), np.uint8)
    point[16, 16] = 255
    lines = corrupt(np.stack([point] * 40), np.arange(40), "motion:10", seed=0)[..., 0] / 255
    rows, columns = np.mgrid[:33, :33] - 16.0
    angles = []
    for line in lines:
        assert abs(line.sum() - 1) < 1e-3
        moments = [[(line * a * b).sum() for a in (rows, columns)] for b in (rows, columns)]
        (thin, long), axes = np.linalg.eigh(moments)
        # A uniform line of length L has variance L² / 12; drawing it on pixels adds at most 1 / 4 to either axis.
        assert 100 / 12 - 0.1 < long < 100 / 12 + 0.5 and thin < 0.3
        angles.append(np.arctan2(*axes[:, 1]) % np.pi)
    assert np.ptp(angles) > 2.5, "every direction occurs"


def test_jpeg_is_that_of_pillow():
    image = textured(1)[0]
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=25)
    np.testing.assert_array_equal(one(image, "jpeg:75"), np.asarray(Image.open(stream), np.float32))


@pytest.mark.parametrize("stops", [1, 3, 5])
def test_low_light_halves_the_light_a_stop(stops):
    picture = np.full((1, 64, 64, 3), 200, np.uint8)
    dark = corrupt(picture, np.array([0]), f"low_light:{stops}", seed=0).astype(np.float64)

    def light(level):
        return ((level / 255 + 0.055) / 1.055) ** 2.4 if level > 11 else level / 255 / 12.92

    electrons = np.vectorize(light)(dark) * 4000
    expected = light(200) * 4000 / 2**stops
    assert abs(electrons.mean() / expected - 1) < 0.02
    assert abs(electrons.std() / np.sqrt(expected + 2.5**2) - 1) < 0.04


def test_impulse_sets_the_stated_share_of_the_pixels():
    out = corrupt(GREY, INDEX, "impulse:10", seed=0)
    struck = (out != 127).all(axis=3)
    assert np.array_equal(struck, (out != 127).any(axis=3)), "whole pixels"
    assert abs(struck.mean() - 0.10) < 0.01
    assert set(np.unique(out[struck])) == {0, 255} and abs((out[struck] == 255).mean() - 0.5) < 0.06


def test_brightness_moves_all_levels_alike_up_or_down():
    moves = corrupt(np.full((200, 2, 2, 3), 127, np.uint8), np.arange(200), "brightness:30", seed=0) - 127
    assert set(np.unique(moves)) == {-30, 30} and (np.ptp(moves, axis=(1, 2, 3)) == 0).all()
    assert 0.35 < (moves[:, 0, 0, 0] > 0).mean() < 0.65


def test_contrast_keeps_the_mean_and_scales_the_rest():
    image = textured(1)[0].astype(np.float32)
    mean = image.mean(axis=(0, 1))
    np.testing.assert_allclose(one(image, "contrast:40"), mean + 0.6 * (image - mean), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def test_specs_are_parsed():
    assert parse_spec("clean") == (Part("clean", 0, 0),)
    assert parse_spec("gaussian:2.5") == (Part("gaussian", 2.5, 2.5),)
    assert parse_spec("gaussian:1..2e1") == (Part("gaussian", 1, 20),)
    assert parse_spec("jpeg") == (Part("jpeg", *CORRUPTIONS["jpeg"].default),)
    assert parse_spec("jpeg:99, cifar10c:fog:3") == (Part("jpeg", 99, 99), Part("cifar10c:fog", 3, 3))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("guassian:3", 'Did you mean "gaussian"'),
        ("claen", 'Did you mean "clean"'),
        ("lowlight:2", 'Did you mean "low_light"'),
        ("clean,guassian:3", 'Unknown corruption "guassian" in "clean,guassian:3".*Did you mean "gaussian"'),
        ("fog:3", 'write "cifar10c:fog:3"'),
        ("pairs:DIR", "Pairs of images are read from a folder"),
        ("clean:3", "takes no strength"),
        ("gaussian:", "finite strength"),
        ("gaussian:-1", "finite strength"),
        ("gaussian:nan", "finite strength"),
        ("gaussian:inf", "finite strength"),
        ("gaussian:strong", "finite strength"),
        ("gaussian:5..", "finite strength"),
        ("gaussian:..5", "finite strength"),
        ("gaussian:-1..5", "finite strength"),
        ("gaussian:0..nan", "finite strength"),
        ("gaussian:30..10", 'from a high to a low strength; write "gaussian:10..30"'),
        ("jpeg:100", 'The strength of "jpeg" is at most 99'),
        ("jpeg:0..100", "at most 99"),
        ("impulse:101", "at most 100 .percent"),
        ("cifar10c", "cifar10c:NAME:SEVERITY"),
        ("cifar10c:frog:3", 'Unknown CIFAR-10-C corruption "frog".*Did you mean "fog"'),
        ("cifar10c:fog", "severity of .*fog.* is 1, 2, 3, 4 or 5"),
        ("cifar10c:fog:0", "severity"),
        ("cifar10c:fog:6", "severity"),
        ("cifar10c:fog:2.5", "severity"),
        ("cifar10c:fog:1..3", "severity"),
        ("gaussian:3,", "Unknown corruption"),
        ("", "Unknown corruption"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_spec(spec)
    with pytest.raises(ConfigError, match=message):
        corrupt(GREY, INDEX, spec, seed=0)


@pytest.mark.parametrize(
    ("shape", "count"), [((8, 32, 32), 8), ((8, 32, 32, 3), 7), ((8, 32, 32, 4), 8), ((8, 32, 32, 2), 8)]
)
def test_arrays_of_another_shape_are_refused(shape, count):
    with pytest.raises(DataError, match="1 or 3 channels"):
        corrupt(np.zeros(shape, np.uint8), np.arange(count), "gaussian:3", seed=0)


def test_arrays_of_jax_are_accepted():
    noisy = corrupt(jnp.asarray(GREY), jnp.asarray(INDEX, jnp.int32), "gaussian:3", seed=0)
    assert isinstance(noisy, np.ndarray)
    np.testing.assert_array_equal(noisy, corrupt(GREY, INDEX, "gaussian:3", seed=0))


def test_the_documented_table_is_the_one_in_the_code():
    page = (Path(__file__).parents[2] / "docs" / "corruptions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d.]+\.\.[\d.]+ \| [\d.]+) \|", page, re.MULTILINE))
    assert rows == {name: f"{c.default[0]:g}..{c.default[1]:g} | {c.largest:g}" for name, c in CORRUPTIONS.items()}
