"""Noise from files: laid as it was photographed (`bank:`), and estimated from noisy images alone (`like:`)."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from drep_jax.data.corruptions import Part, check_spec, corrupt, parse_spec
from drep_jax.data.corruptions.like import estimate, lag_operator
from drep_jax.data.pairs import open_noisy, open_pairs
from drep_jax.errors import ConfigError, DataError

COLORS = np.array([[0.8, 0.2, 0.1], [0.2, 0.8, 0.2], [0.1, 0.2, 0.8]])
SIDE = 64


def camera(images, rng, deviation):
    """Noise of a deviation by level, correlated among neighbors (σ 0.7 pixels) and colors."""
    field = ndimage.gaussian_filter(rng.standard_normal(images.shape), (0, 0.7, 0.7, 0)) * (2 * np.sqrt(np.pi) * 0.7)
    field = field @ COLORS.T / np.sqrt((COLORS**2).sum(axis=1))
    return np.clip(np.rint(images + deviation(images.astype(float)) * field), 0, 255).astype(np.uint8)


def rising(levels):
    """5 gray levels at black, 15 at white."""
    return np.sqrt(25 + 200 * levels / 255)


def scenes(count=12):
    """Smooth scenes between dark and light."""
    ramp = np.linspace(0, 1, SIDE)
    starts, ends = np.random.default_rng(0).uniform(25, 60, (2, count, 1, 3)) + np.array([0, 160])[:, None, None, None]
    return np.rint((starts + (ends - starts) * ramp[:, None])[:, None].repeat(SIDE, axis=1)).astype(np.uint8)


def put(folder, images, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start):
        Image.fromarray(image).save(folder / f"{number:02}.png")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same pairs as a folder and as a file, bursts and dark frames; the second half of the pairs has no noise."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(1)
    clean = scenes()
    noisy = camera(clean, rng, rising)
    put(root / "pairs" / "clean", clean)
    put(root / "pairs" / "corrupted", noisy)

    def png(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return buffer.getvalue()

    members = {}
    for side, images in (("mean", np.concatenate([clean, clean])), ("real", np.concatenate([noisy, clean]))):
        encoded = [png(image) for image in images]
        members[f"{side}_png"] = np.frombuffer(b"".join(encoded), np.uint8)
        members[f"{side}_offsets"] = np.cumsum([0, *map(len, encoded)])
    np.savez(root / "pairs.npz", camera=np.array(["good"] * 12 + ["none"] * 12), **members)
    flat = np.full((6, SIDE, SIDE, 3), 90, np.uint8)
    put(root / "bursts" / "burst" / "lamp", camera(flat[:3], rng, lambda levels: 8 + 0 * levels))
    put(root / "bursts" / "burst" / "sea", camera(flat[:2] + 60, rng, lambda levels: 8 + 0 * levels))
    put(root / "darkness" / "dark", camera(flat[:2] - 60, rng, lambda levels: 8 + 0 * levels))
    return root


def covariance(noise):
    """Covariances by lag and colors of noise (n, h, w, 3): at 0, one to the right, one down; then of the first two colors."""
    centered = noise - noise.mean(axis=(1, 2), keepdims=True)
    right, down = centered[:, :, :-1] * centered[:, :, 1:], centered[:, :-1] * centered[:, 1:]
    return np.array([*(x.mean() for x in (centered**2, right, down)), (centered[..., 0] * centered[..., 1]).mean()])


# ---- bank --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["pairs", "pairs.npz?camera=g*"])
def test_a_bank_keeps_the_second_moments_of_its_pairs(places, place):
    clean = scenes()
    pairs = open_pairs(f"{places}/{place}", (SIDE, SIDE))
    true = np.stack([pairs[i]["corrupted"].astype(float) - pairs[i]["clean"] for i in range(12)])
    seen, index = np.concatenate([clean, clean, clean, clean]), np.arange(48)
    noisy = corrupt(seen, index, f"bank:{places}/{place}", seed=3)
    expected = covariance(true)
    np.testing.assert_allclose(covariance(noisy - seen), expected, rtol=0.12)
    assert expected[1] > 0.4 * expected[0] and expected[3] > 0.3 * expected[0]  # which white noise has not
    np.testing.assert_array_equal(corrupt(seen[7:8], index[7:8], f"bank:{places}/{place}", seed=3)[0], noisy[7])
    half = corrupt(seen, index, f"bank:{places}/{place}{'&' if '?' in place else '?'}strength=0.5", seed=3)
    inside = (noisy > 0) & (noisy < 255)
    np.testing.assert_allclose((half - seen)[inside], 0.5 * (noisy - seen)[inside], atol=1e-4)
    assert (corrupt(seen[:1], index[:1], f"bank:{places}/{place}", seed=4) != noisy[:1]).mean() > 0.9


def test_a_folder_and_a_file_of_the_same_pairs_are_the_same_noise(places):
    images = scenes()[:3]
    folder, file = (
        corrupt(images, np.arange(3), f"bank:{places}/{place}", seed=0) for place in ("pairs", "pairs.npz?camera=good")
    )
    np.testing.assert_array_equal(folder, file)


def test_the_brightness_of_the_image_sets_the_noise_where_the_pairs_show_it(places):
    levels = np.array([50, 120, 200])
    images = np.full((3 * 40, 32, 32, 3), 0, np.uint8) + np.repeat(levels, 40).astype(np.uint8)[:, None, None, None]
    by_level = {}
    for place in ("pairs", "pairs?brightness=off", "bursts", "darkness"):
        (bank,) = check_spec(f"bank:{places}/{place}")
        noise = corrupt(images, np.arange(120), f"bank:{places}/{place}", seed=0) - images
        by_level[place] = noise.reshape(3, -1).std(axis=1)
        assert (bank.variance is not None) == (place == "pairs"), place
        assert ("depending on the brightness" in bank.note) == (place == "pairs")
    np.testing.assert_allclose(by_level["pairs"], rising(levels), rtol=0.1)
    for place in ("bursts", "darkness"):
        np.testing.assert_allclose(by_level[place], 8, rtol=0.05)
    assert np.ptp(by_level["pairs?brightness=off"]) < 0.1 * by_level["pairs?brightness=off"].mean()


def test_residuals_are_laid_on_any_size_scale_and_number_of_channels(places):
    wide = np.full((20, 40, 150, 3), 120, np.uint8)  # wider than the residuals, which are mirrored
    noise = corrupt(wide, np.arange(20), f"bank:{places}/bursts", seed=0) - wide
    np.testing.assert_allclose(noise.std(), 8, rtol=0.05)
    shrunk = corrupt(wide, np.arange(20), f"bank:{places}/bursts?scale=0.25", seed=0) - wide
    before, after = covariance(noise), covariance(shrunk)
    assert after[0] < 0.3 * before[0] and after[1] / after[0] < 0.3 < before[1] / before[0]
    ranges = corrupt(wide, np.arange(20), f"bank:{places}/bursts?scale=0.25..1", seed=0) - wide
    assert after[0] < covariance(ranges)[0] < before[0]
    gray = corrupt(wide[..., :1], np.arange(20), f"bank:{places}/bursts", seed=0) - wide[..., :1]
    np.testing.assert_allclose(gray[..., 0], noise @ np.array([0.299, 0.587, 0.114]), atol=1e-3)


# ---- like --------------------------------------------------------------------------------------------------------------


def test_noise_is_estimated_without_clean_images():
    """Within 10 % of σ(level), and 0.05 of the correlations, on images of which half the area is texture."""
    rng = np.random.default_rng(2)
    images = np.full((48, 128, 128, 3), 0.0) + np.linspace(30, 225, 48)[:, None, None, None]
    texture = ndimage.gaussian_filter(rng.standard_normal((48, 128, 64, 1)), (0, 3, 3, 0))
    images[:, :, 64:] += 30 * texture / texture.std()
    model = estimate("them", list(camera(np.clip(images, 20, 235), rng, rising)))
    levels = np.array([50, 100, 150, 200])
    seen = np.repeat(levels, 12).astype(np.uint8)[:, None, None, None] + np.zeros((48, 64, 64, 3), np.uint8)
    noise = np.stack(
        [model(image.astype(np.float32), np.random.default_rng(i), 1.0) - image for i, image in enumerate(seen)]
    )
    np.testing.assert_allclose(noise.reshape(4, -1).std(axis=1), rising(levels), rtol=0.1)
    flat = seen * 0.0 + 128
    true = camera(flat, rng, lambda levels: 10 + 0 * levels) - flat
    expected, estimated = (covariance(x) / covariance(x)[0] for x in (true, noise))
    np.testing.assert_allclose(estimated, expected, atol=0.05)
    assert expected[1] > 0.5 and expected[3] > 0.4


def test_planes_taken_from_blocks_are_accounted_for():
    """The operator's column of a lag is what blocks of noise with that covariance show, here of white noise."""
    size = 8
    rng = np.random.default_rng(0)
    rows, columns = np.divmod(np.arange(size**2), size)
    basis, _ = np.linalg.qr(np.stack([np.ones(size**2), rows, columns], axis=1).astype(float))
    blocks = rng.standard_normal((20_000, size**2))
    blocks = (blocks - blocks @ basis @ basis.T).reshape(-1, size, size)
    white = lag_operator(size)[:, lag_operator(size).shape[0] // 2].reshape(7, 7)
    assert white[3, 3] == pytest.approx(1 - 3 / size**2) and white[3, 4] < -0.01
    for down, right in ((0, 0), (0, 1), (2, 1)):
        shown = (blocks[:, : size - down, : size - right] * blocks[:, down:, right:]).mean()
        assert white[3 + down, 3 + right] == pytest.approx(shown, abs=0.003)


def test_a_model_is_a_condition_like_any_other(places):
    spec = f"like:{places}/pairs/corrupted"
    (model,) = check_spec(spec)
    assert "12 noisy images" in model.note and len(model) == 12
    images = scenes()[:4]
    noisy = corrupt(images, np.arange(4), spec, seed=0)
    np.testing.assert_array_equal(corrupt(images[2:3], np.array([2]), spec, seed=0)[0], noisy[2])
    np.testing.assert_array_equal(noisy, corrupt(images, np.arange(4), f"like:{places}/pairs.npz?camera=good", seed=0))
    assert 4 < (noisy - images).std() < 20
    gray = corrupt(images[..., :1], np.arange(4), spec, seed=0)
    assert gray.shape == (4, SIDE, SIDE, 1) and 2 < (gray - images[..., :1]).std() < 20


# ---- text and files ----------------------------------------------------------------------------------------------------


def test_specs_from_files_are_parsed():
    assert parse_spec("clean, bank:DIR") == (Part("clean", 0, 0), Part("bank:DIR", 1, 1))
    assert parse_spec("bank:F.npz?camera=Sony+Canon*&strength=0.5..2") == (
        Part("bank:F.npz?camera=Sony+Canon*", 0.5, 2),
    )
    assert parse_spec("like:DIR?strength=0")[0].high == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bank", "needs a place"),
        ("like:", "needs a place"),
        ("bank:nowhere", "There is no directory nowhere"),
        ("bank:nowhere.npz", "There is no file nowhere.npz"),
        ("like:nowhere", "There is no directory nowhere"),
        ("bank:{}", "is no bank of noise.*there are bursts, darkness, pairs"),
        ("bank:{}/pairs?strength=11", 'bank: strength="11": expected a number from 0 to 10'),
        ("bank:{}/pairs?strength=2..1", "expected a number from 0 to 10"),
        ("bank:{}/pairs?scale=0", "scale=.*from 0.015625 to 8"),
        ("bank:{}/pairs?brightness=on", "expected auto or off"),
        ("bank:{}/pairs?camera=Sony", 'has no column "camera".*there is name'),
        ("bank:{}/pairs.npz?camrea=Sony", 'Did you mean "camera"'),
        ("bank:{}/pairs.npz?camera=Sony", 'no image has a "camera" like "Sony".*good, none'),
        ("bank:{}/pairs.npz?camera=none", "so there is no noise to lay"),
        ("bank:{}/pairs?=3", "expected options as in"),
        ("like:{}/pairs", "holds pairs.*Name .*corrupted"),
        ("like:{}/pairs/corrupted?scale=0.05", "has a side of 3 pixels; at least 8"),
        ("like:{}/pairs/corrupted?scale=0.2..1", "one scale"),
        ("bnak:DIR", 'Did you mean "bank"'),
        ("unpaired:DIR", "they corrupt no other images"),
    ],
)
def test_noise_that_cannot_be_read_is_refused(places, spec, message):
    with pytest.raises((ConfigError, DataError), match=message):
        check_spec(spec.format(places))


def test_files_that_are_no_noise_are_refused(places, tmp_path):
    put(tmp_path / "one" / "burst", scenes()[:1])
    put(tmp_path / "black" / "dark", np.zeros((1, 8, 8, 3), np.uint8))
    put(tmp_path / "flat", np.full((3, 64, 64, 3), 90, np.uint8))
    put(tmp_path / "few", camera(scenes(1), np.random.default_rng(0), rising))
    put(tmp_path / "two" / "burst", scenes()[:1])
    put(tmp_path / "two" / "burst", scenes()[:1, :8], start=1)
    np.savez(tmp_path / "lone.npz", clean=scenes())
    np.savez(tmp_path / "uneven.npz", clean=scenes(), noisy=scenes()[:3])
    np.savez(tmp_path / "cut.npz", clean_png=np.zeros(9, np.uint8), clean_offsets=np.array([0, 99]))
    np.savez(tmp_path / "loose.npz", clean_png=np.zeros(9, np.uint8))
    (tmp_path / "text.npz").write_text("no archive")
    for spec, message in (
        ("bank:{}/one", "holds one shot"),
        ("bank:{}/two", "but other shots of its scene"),
        ("bank:{}/black", "100 % of the values are 0"),
        ("like:{}/flat", "only 0 of 48 blocks"),
        ("like:{}/few", "of 16 blocks of 16 x 16 pixels show nothing but noise, and 40 are needed"),
        ("bank:{}/lone.npz", "holds no corrupted images"),
        ("bank:{}/uneven.npz", "expected as many of each"),
        ("bank:{}/cut.npz", "does not divide the 9 bytes"),
        ("bank:{}/loose.npz", 'without "clean_offsets"'),
        ("bank:{}/text.npz", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            check_spec(spec.format(tmp_path))


def test_a_file_serves_as_pairs_and_as_noisy_images(places):
    pairs = open_pairs(f"{places}/pairs.npz?camera=good&name=1*", (SIDE, SIDE))
    assert pairs.names == ("1", "10", "11") and len(pairs) == 3
    folder = open_pairs(f"{places}/pairs", (SIDE, SIDE))
    np.testing.assert_array_equal(pairs[2]["corrupted"], folder[11]["corrupted"])
    noisy = open_noisy(f"{places}/pairs/corrupted", (8, 8))
    assert len(noisy) == 12 and noisy[0]["image"].shape == (8, 8, 3) and noisy.num_classes is None
