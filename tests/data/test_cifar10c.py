"""The CIFAR-10-C protocol: all 75 conditions, each against what its definition says."""

import colorsys
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from drep_jax.data.corruptions import CIFAR10C, corrupt
from drep_jax.data.corruptions.cifar10c import PROTOCOL
from tests.pictures import textured

SEVERITIES = (1, 2, 3, 4, 5)
IMAGES, INDEX = textured(24), np.arange(24)


def run(name, severity, images=IMAGES, seed=0):
    return corrupt(images, np.arange(len(images)), f"cifar10c:{name}:{severity}", seed)


def change(name, severity, seed=0):
    return np.abs(run(name, severity, seed=seed) - IMAGES).mean()


def test_there_are_the_fifteen_of_the_paper():
    assert len(CIFAR10C) == len(set(CIFAR10C)) == 15
    assert all(len(constants) == 5 for _, constants in PROTOCOL.values())


@pytest.mark.parametrize("name", CIFAR10C)
def test_results_are_whole_gray_levels_and_belong_to_the_image(name):
    for severity in SEVERITIES:
        whole = run(name, severity)
        assert whole.dtype == np.float32 and whole.shape == IMAGES.shape
        assert whole.min() >= 0 and whole.max() <= 255
        np.testing.assert_array_equal(whole, np.floor(whole))
        assert (whole != IMAGES).any(axis=(1, 2, 3)).all()
    part = corrupt(IMAGES[[5, 2]], np.array([5, 2]), f"cifar10c:{name}:5", 0)
    np.testing.assert_array_equal(part, whole[[5, 2]])


# Where the published constants ask for no more change at a higher severity (the elastic ones move the image ever less);
# zooms are compared with SciPy's at three severities below.
@pytest.mark.parametrize("name", sorted(set(CIFAR10C) - {"elastic_transform", "frost", "glass_blur", "zoom_blur"}))
def test_higher_severities_change_more(name):
    changes = [change(name, severity) for severity in SEVERITIES]
    assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(changes))
    assert changes[4] > 1.3 * changes[0] > 0.5


@pytest.mark.parametrize("name", CIFAR10C)
@pytest.mark.parametrize("shape", [(8, 8, 3), (20, 33, 1), (64, 48, 3)])
def test_other_sizes_are_borne(name, shape):
    images = textured(2, shape[:2], shape[2])
    for severity in SEVERITIES:
        out = run(name, severity, images)
        assert out.shape == images.shape and np.isfinite(out).all()


@pytest.mark.parametrize("name", CIFAR10C)
def test_flat_and_black_images_stay_finite(name):
    for level in (0, 255):
        assert np.isfinite(run(name, 5, np.full((2, 32, 32, 3), level, np.uint8))).all()


@pytest.mark.parametrize(("severity", "std"), list(enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1)))
def test_gaussian_noise(severity, std):
    gray = np.full((8, 32, 32, 3), 127, np.uint8)
    assert abs((run("gaussian_noise", severity, gray) - 127).std() / (255 * std) - 1) < 0.02


@pytest.mark.parametrize(("severity", "photons"), list(enumerate((500, 250, 100, 75, 50), 1)))
def test_shot_noise(severity, photons):
    gray = np.full((8, 32, 32, 3), 127, np.uint8)
    noise = (run("shot_noise", severity, gray) - 127) / 255
    assert abs(noise.std() / np.sqrt(127 / 255 / photons) - 1) < 0.03


@pytest.mark.parametrize(("severity", "share"), list(enumerate((0.01, 0.02, 0.03, 0.05, 0.07), 1)))
def test_impulse_noise(severity, share):
    gray = np.full((24, 32, 32, 3), 127, np.uint8)
    out = run("impulse_noise", severity, gray)
    assert set(np.unique(out)) == {0, 127, 255}
    assert abs((out != 127).mean() / share - 1) < 0.08
    assert abs((out == 255).sum() / (out != 127).sum() - 0.5) < 0.06


def test_defocus_blur_is_a_smoothed_disk():
    point = np.zeros((1, 9, 9, 3), np.uint8)
    point[0, 4, 4] = 255
    out = run("defocus_blur", 2, point)[0, ..., 0] / 255
    line = np.exp(-np.array([1, 0, 1]) / (2 * 0.5**2))
    np.testing.assert_allclose(out[3:6, 3:6], np.outer(line, line) / line.sum() ** 2, atol=1 / 255)
    out = run("defocus_blur", 5, point)[0, ..., 0]
    np.testing.assert_allclose(out[3:6, 3:6], 255 / 9, atol=1.001)
    assert out.sum() == out[3:6, 3:6].sum()


def test_glass_blur_brings_each_pixel_from_a_near_one():
    rows, columns = np.mgrid[:32, :32].astype(np.uint8)
    places = np.stack([rows, columns, 0 * rows], axis=2)[None]
    out = run("glass_blur", 1, places)[0]  # its Gaussian of 0.05 pixels blurs nothing
    moved = out[..., :2] - places[0, ..., :2]
    assert (out[..., 2] == 0).all() and (moved != 0).any()
    assert np.abs(moved).max() <= 4 and 0.3 < np.abs(moved[2:, 2:]).mean() < 1
    assert (moved[:2] == 0).all() and (moved[:, :2] == 0).all(), "the border is left alone"


def test_motion_blur_smears_to_one_side_within_45_degrees():
    point = np.zeros((40, 33, 33, 3), np.uint8)
    point[:, 16, 16] = 255
    smeared = run("motion_blur", 3, point)[..., 0]
    rows, columns = np.mgrid[:33, :33] - 16
    assert (smeared[:, columns > 0] == 0).all(), "what is at a place came from its right"
    weight = smeared.sum(axis=(1, 2))
    slope = (smeared * rows).sum(axis=(1, 2)) / (smeared * columns).sum(axis=(1, 2))
    assert np.abs(slope).max() < 1.15 and np.ptp(slope) > 1
    half = np.exp(-(np.arange(13) ** 2) / (2 * 2.0**2))
    assert np.allclose(smeared[:, 16, 16] / 255, half[0] / half.sum(), atol=0.01) and (weight > 240).all()


@pytest.mark.parametrize(("severity", "end"), [(1, 1.06), (3, 1.16), (5, 1.26)])
def test_zoom_blur_is_the_mean_of_scipy_zooms(severity, end):
    image = IMAGES[0] / 255.0
    layers = [image]
    for factor in np.arange(1, end, 0.01):
        cut = int(np.ceil(32 / factor))
        top = (32 - cut) // 2
        layer = ndimage.zoom(image[top : top + cut, top : top + cut], (factor, factor, 1), order=1)
        trim = (layer.shape[0] - 32) // 2
        layers.append(layer[trim : trim + 32, trim : trim + 32])
    np.testing.assert_allclose(run("zoom_blur", severity)[0], 255 * np.mean(layers, axis=0), atol=1.01)


def test_snow_frost_and_fog_lighten_dark_images():
    dark = np.full((16, 32, 32, 3), 40, np.uint8)
    for name in ("snow", "frost"):
        means = run(name, 5, dark).mean(axis=(1, 2, 3))
        assert means.min() > 60 and np.ptp(means) > 0
    mist = run("fog", 5, dark)
    # Fog moves towards the image's own brightest value, which is all that a flat image has.
    assert mist.max() <= 40 and mist.std() > 3


def test_fog_is_smooth_and_scaled_to_the_brightest_value():
    flat = np.full((16, 32, 32, 3), 200, np.uint8)
    mist = run("fog", 3, flat)
    steps = np.abs(np.diff(mist[..., 0], axis=1)).mean()
    assert steps < 0.5 * mist.std() and (np.ptp(mist, axis=3) == 0).all()
    top, amount = 200 / 255, 0.75
    assert mist.max() <= 200 and mist.min() >= np.floor(255 * top * top / (top + amount)) - 1


def test_frost_is_a_pane_over_the_image():
    flat = np.full((64, 32, 32, 3), 0, np.uint8)
    pane = run("frost", 1, flat) / 0.2
    assert 110 < pane.mean() < 190 and 10 < pane.std(axis=(1, 2)).mean() < 40
    assert (pane[..., 2] > pane[..., 0]).mean() > 0.9, "ice is bluish"
    assert np.ptp(pane.mean(axis=(1, 2, 3))) > 60, "panes differ"


@pytest.mark.parametrize(("severity", "added"), list(enumerate((0.05, 0.1, 0.15, 0.2, 0.3), 1)))
def test_brightness_raises_the_value_of_hsv(severity, added):
    out = run("brightness", severity)[0].reshape(-1, 3)
    for before, after in zip(IMAGES[0].reshape(-1, 3)[:200], out, strict=False):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        expected = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1)))
        np.testing.assert_allclose(after, expected, atol=1.01)


@pytest.mark.parametrize(("severity", "factor"), list(enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1)))
def test_contrast(severity, factor):
    image = IMAGES[0].astype(float)
    expected = image.mean(axis=(0, 1)) + factor * (image - image.mean(axis=(0, 1)))
    np.testing.assert_allclose(run("contrast", severity)[0], expected, atol=1.01)


def test_elastic_transform_moves_and_does_not_recolor():
    flat = np.full((2, 32, 32, 3), 90, np.uint8)
    ramp = np.broadcast_to((4 * np.arange(32, dtype=np.uint8))[:, None, None], (24, 32, 32, 3))
    inner = np.s_[:, 8:24, 8:24, 0]
    for severity, (amplitude, _, jitter) in enumerate(PROTOCOL["elastic_transform"][1], 1):
        assert np.abs(run("elastic_transform", severity, flat) - 90).max() <= 1
        moved = (run("elastic_transform", severity, ramp) - ramp)[inner] / 4
        # No further than the three points, extrapolated, and the field.
        assert np.abs(moved).mean() > 0.2 and np.abs(moved).max() < 32 * (4 * jitter + amplitude)


@pytest.mark.parametrize(("severity", "side"), list(enumerate((30, 28, 27, 24, 20), 1)))
def test_pixelate_is_that_of_pillow(severity, side):
    small = Image.fromarray(IMAGES[0]).resize((side, side), Image.Resampling.BOX)
    np.testing.assert_array_equal(run("pixelate", severity)[0], small.resize((32, 32), Image.Resampling.BOX))


@pytest.mark.parametrize(("severity", "quality"), list(enumerate((80, 65, 58, 50, 40), 1)))
def test_jpeg_compression_is_that_of_pillow(severity, quality):
    stream = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(stream, "JPEG", quality=quality)
    np.testing.assert_array_equal(run("jpeg_compression", severity)[0], Image.open(stream))


def test_the_documented_constants_are_those_in_the_code():
    page = (Path(__file__).parents[2] / "docs" / "corruptions.md").read_text(encoding="utf-8")
    for name, (_, constants) in PROTOCOL.items():
        if name == "zoom_blur":  # there the table has the last magnification, and the code the end of `numpy.arange`
            constants = [(np.arange(1, end, 0.01)[-1].round(2),) for (end,) in constants]
        rows = re.findall(rf"^\| `{name}` \| [^|]+ \|((?: [\d., ]+ \|){{5}})$", page, re.MULTILINE)
        severities = zip(*(row.strip(" |").split("|") for row in rows), strict=True)  # many constants take several rows
        documented = [tuple(float(number) for cell in cells for number in cell.split(",")) for cells in severities]
        assert documented == [tuple(map(float, values)) for values in constants], name
