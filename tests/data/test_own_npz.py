"""`npz:FILE.npz`: images of the user's own in one file."""

import io

import numpy as np
import pytest
from PIL import Image

from drep_jax.data import open_source
from drep_jax.errors import ConfigError, DataError

SIZE = {"image_size": (4, 4)}


def write(path, count=30, **arrays):
    images = np.repeat(np.arange(count, dtype=np.uint8), 16).reshape(count, 4, 4)
    np.savez(path, **{"images": images, **arrays})
    return f"npz:{path}"


@pytest.mark.parametrize("shape", [(30, 4, 4), (30, 4, 4, 1), (30, 4, 4, 3)])
@pytest.mark.parametrize("labels", [None, "numbers", "names"])
def test_one_file_serves_all_splits(tmp_path, shape, labels):
    names = np.array(["cat", "ape", "dog"])
    images = np.broadcast_to(np.arange(30, dtype=np.uint8).reshape(-1, *[1] * (len(shape) - 1)), shape)
    arrays = {"images": images}
    if labels:
        arrays["labels"] = np.arange(30) // 10 if labels == "numbers" else names[np.arange(30) // 10]
    np.savez(tmp_path / "own.npz", **arrays)
    spec, seen = f"npz:{tmp_path}/own.npz", []
    for split, size in (("train", 24), ("validation", 3), ("test", 3)):
        source = open_source(spec, split, **SIZE)
        assert len(source) == size and source.num_classes == (3 if labels else None)
        for place in range(size):
            item = source[place]
            number = int(item["image"][1, 2, 1])
            assert item["image"].shape == (4, 4, 3)
            seen.append(number)
            if labels:
                assert item["label"] == (number // 10 if labels == "numbers" else (1, 0, 2)[number // 10])
        if labels:
            assert {int(source[i]["label"]) for i in range(size)} == {0, 1, 2}, "a file sorted by class"
    assert sorted(seen) == list(range(30))
    inside = open_source("npz:own.npz", "train", data_dir=str(tmp_path), **SIZE)
    assert inside.class_names == (
        None if not labels else ("0", "1", "2") if labels == "numbers" else ("ape", "cat", "dog")
    )


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"labels": np.arange(29)}, "29 labels"),
        ({"labels": np.zeros((30, 2), int)}, r"30 images; their shape is \(30, 2\)"),
        ({"labels": np.full(30, -2)}, "30 of 30 labels lie outside 0 … [0-9,]+, such as -2 of image 0"),
        ({"labels": np.full(30, 0.5)}, "labels are float64"),
        ({"labels": np.full(30, 3), "label_names": np.array(["a", "b"])}, "lie outside 0 … 1, such as 3"),
        ({"labels": np.full(30, "c"), "label_names": np.array(["a", "b"])}, 'label "c" is not among'),
        ({"images": np.zeros((30, 4, 4), np.float32)}, "images are float32"),
        ({"images": np.zeros((30, 16), np.uint8)}, "images are uint8"),
        ({"images": np.zeros((30, 4, 4, 5), np.uint8)}, "5 channels each"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, arrays, said):
    with pytest.raises(DataError, match=said):
        open_source(write(tmp_path / "own.npz", **arrays), "train", **SIZE)


def test_absent_files_and_too_few_images(tmp_path):
    with pytest.raises(DataError, match=r"no file .*none\.npz"):
        open_source(f"npz:{tmp_path}/none.npz", "train", **SIZE)
    spec = write(tmp_path / "few.npz", count=5)
    assert len(open_source(spec, "train", **SIZE)) == 5
    with pytest.raises(DataError, match="holds 5 images, none of which falls into the test part"):
        open_source(spec, "test", **SIZE)


BANDS = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 4), np.uint8)


@pytest.mark.parametrize("shape", [(10, 4, 4, 4), (10, 4, 4, 2), (10, 4, 4, 7), (10, 3, 32, 32), (10, 8, 3), (10, 4)])
def test_channels_that_say_nothing_are_counted_and_asked_for(tmp_path, shape):
    np.savez(tmp_path / "own.npz", images=np.zeros(shape, np.uint8))
    way_out = {
        (10, 4, 4, 4): r"4 channels each.*\?channels=0,1,2 or, if the fourth is transparency, \?channels=rgba",
        (10, 4, 4, 2): r"2 channels each.*\?channels=0\.",
        (10, 4, 4, 7): r"7 channels each.*\?channels=0,1,2\.",
        (10, 3, 32, 32): r"np\.moveaxis\(images, 1, -1\)",
        (10, 8, 3): r"one image, or gray images 3 pixels wide",
        (10, 4): r"expected uint8 \(N, H, W, 3\)",
    }[shape]
    with pytest.raises(DataError, match=rf"own\.npz: images are .*{way_out}"):
        open_source(f"npz:{tmp_path}/own.npz", "train", **SIZE)


def test_the_user_says_which_channels_are_shown(tmp_path):
    np.savez(tmp_path / "own.npz", images=BANDS)
    np.savez(tmp_path / "set_train.npz", images=BANDS)

    def first(channels, name="own.npz"):
        return open_source(f"npz:{name}?channels={channels}", "train", data_dir=str(tmp_path), **SIZE)[0]["image"]

    np.testing.assert_array_equal(first("3,1,0"), BANDS[0][..., [3, 1, 0]])
    np.testing.assert_array_equal(first("3"), BANDS[0][..., [3, 3, 3]])
    np.testing.assert_array_equal(first("0,1,2", "set"), BANDS[0][..., :3])
    alpha = BANDS[0][..., 3:] / 255
    assert np.abs(first("rgba") - (BANDS[0][..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    for bad, said in (("0,1,4", "no channel 4"), ("0,1", "neither"), ("red", "neither"), ("", "expected options")):
        with pytest.raises(ConfigError, match=said):
            first(bad)
    with pytest.raises(ConfigError, match="rgba needs 4 channels, but the images have 3"):
        np.savez(tmp_path / "own.npz", images=BANDS[..., :3])
        first("rgba")


def test_labels_and_names_as_bytes(tmp_path):
    names = np.array([b"katze", "hündin".encode()])
    labels = np.arange(30) % 2
    for arrays in ({"labels": names[labels]}, {"labels": labels, "label_names": names}):
        source = open_source(write(tmp_path / "own.npz", **arrays), "train", **SIZE)
        assert set(source.class_names) == {"katze", "hündin"}
        assert source.class_names[source[1]["label"]] == "hündin"
    with pytest.raises(DataError, match=r"own\.npz holds the bytes b'h\\xfcndin', which are not UTF-8"):
        latin = np.array(["hündin".encode("latin-1")] * 30)
        open_source(write(tmp_path / "own.npz", labels=latin), "train", **SIZE)


def encoded(count, sizes):
    """Gray images, each one level of its number, as PNG one behind the other."""
    pieces = []
    for number in range(count):
        stream = io.BytesIO()
        Image.fromarray(np.full((*sizes[number % len(sizes)], 3), number, np.uint8)).save(stream, "PNG")
        pieces.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, pieces)])
    return {"png": np.frombuffer(b"".join(pieces), np.uint8), "png_offsets": offsets, "labels": np.arange(count)}


@pytest.mark.parametrize("sizes", [((4, 4),), ((4, 4), (6, 9))], ids=["one size", "several sizes"])
def test_encoded_images_and_other_tenths(tmp_path, sizes):
    np.savez(tmp_path / "own.npz", **encoded(20, sizes))
    spec = f"npz:{tmp_path}/own.npz?tenths=3+1+6"
    sources = [open_source(spec, split, **SIZE) for split in ("train", "validation", "test")]
    levels = [[int(source[i]["image"][0, 0, 0]) for i in range(len(source))] for source in sources]
    assert levels == [[0, 1, 2, 10, 11, 12], [3, 13], [*range(4, 10), *range(14, 20)]]
    assert [[int(source[i]["label"]) for i in range(len(source))] for source in sources] == levels
    assert "3 train, 1 validation, 6 test" in sources[0].note
    plain = [len(open_source(spec.partition("?")[0], split, **SIZE)) for split in ("train", "validation", "test")]
    assert plain == [16, 2, 2]
    for wrong in ("3+1+5", "10+0+0", "8+2", "a+1+1"):
        with pytest.raises(ConfigError, match="how many of every ten images"):
            open_source(f"npz:{tmp_path}/own.npz?tenths={wrong}", "train", **SIZE)
    with pytest.raises(ConfigError, match="several files are the parts themselves"):
        open_source("npz:set?tenths=3+1+6", "train", data_dir=str(tmp_path), **SIZE)


def test_offsets_that_do_not_divide_the_bytes_are_refused(tmp_path):
    arrays = encoded(10, ((4, 4),))
    np.savez(tmp_path / "own.npz", **{**arrays, "png_offsets": arrays["png_offsets"] + 1})
    with pytest.raises(DataError, match='"png_offsets" does not divide'):
        open_source(f"npz:{tmp_path}/own.npz", "train", **SIZE)
