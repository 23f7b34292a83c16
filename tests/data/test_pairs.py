"""Paired folders: both images of a pair are treated alike, and everything that can be wrong is named."""

import numpy as np
import pytest
from PIL import Image

from drep_jax.data.decode import fit
from drep_jax.data.pairs import open_pairs
from drep_jax.errors import ConfigError, DataError


def put(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def image(seed, size=(6, 9)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(["b.png", "a.png", "night/c.png"]):
        put(tmp_path / "clean" / name, image(number))
        put(tmp_path / "corrupted" / name, image(10 + number))
    return tmp_path


def test_pairs_come_in_the_order_of_their_names(root):
    source = open_pairs(str(root), (6, 9), "exact")
    assert len(source) == 3 and source.names == ("a.png", "b.png", "night/c.png")
    for place, number in enumerate([1, 0, 2]):
        pair = source[place]
        assert set(pair) == {"clean", "corrupted"}
        np.testing.assert_array_equal(pair["clean"], image(number))
        np.testing.assert_array_equal(pair["corrupted"], image(10 + number))
    with pytest.raises(IndexError):
        source[3]


@pytest.mark.parametrize("how", ["crop", "squash"])
def test_both_of_a_pair_are_resized_alike(root, how):
    pair = open_pairs(str(root), (4, 4), how)[0]
    np.testing.assert_array_equal(pair["clean"], fit(image(1), (4, 4), how))
    np.testing.assert_array_equal(pair["corrupted"], fit(image(11), (4, 4), how))
    assert pair["clean"].dtype == np.uint8 and pair["clean"].shape == (4, 4, 3)


def test_images_without_partner_are_listed_both_ways(root):
    for number in range(5):
        put(root / "clean" / f"x{number}.png", image(0))
    put(root / "corrupted" / "x0.jpg", image(0))
    with pytest.raises(DataError) as caught:
        open_pairs(str(root), (6, 9))
    assert "Only clean: x0.png, x1.png, x2.png, and 2 more." in str(caught.value)
    assert "Only corrupted: x0.jpg." in str(caught.value)


def test_pairs_of_different_sizes_are_refused(root):
    put(root / "corrupted" / "b.png", image(0, (9, 6)))
    source = open_pairs(str(root), (4, 4))
    with pytest.raises(DataError, match=r"clean.b\.png is 6 x 9 pixels .*corrupted.b\.png is 9 x 6"):
        source[1]
    put(root / "clean" / "a.png", image(0, (6, 8)))
    with pytest.raises(DataError, match=r"a\.png is 6 x 8"):
        open_pairs(str(root), (4, 4))


def test_damaged_images_are_named(root):
    (root / "corrupted" / "b.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"corrupted.b\.png"):
        open_pairs(str(root), (4, 4))[1]


@pytest.mark.parametrize("side", ["clean", "corrupted"])
def test_empty_and_absent_folders_are_refused(root, side):
    for file in [*(root / side).rglob("*.png")]:
        file.unlink()
    (root / side / "readme.txt").write_text("no image")
    with pytest.raises(DataError, match=rf"No images in .*{side}: looked for"):
        open_pairs(str(root), (4, 4))
    (root / side).rename(root / "elsewhere")
    with pytest.raises(DataError, match=rf"There is no directory .*{side}\. Pairs are"):
        open_pairs(str(root), (4, 4))


def test_an_absent_directory_names_both_folders(tmp_path):
    with pytest.raises(DataError, match=r"no directory .*clean and no .*corrupted"):
        open_pairs(str(tmp_path / "nowhere"), (4, 4))


def test_bad_arguments_are_refused(root):
    with pytest.raises(ConfigError, match='Did you mean "crop"'):
        open_pairs(str(root), (4, 4), "corp")
    with pytest.raises(ConfigError, match="height, width"):
        open_pairs(str(root), (4, 0))
    with pytest.raises(ConfigError, match="pairs:DIR"):
        open_pairs("", (4, 4))
