"""`npz:FILE.npz`: images of the user's own in one file."""

import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.errors import DataError

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
        ({"labels": np.full(30, -1)}, "labels are int64 from -1 to -1"),
        ({"labels": np.full(30, 0.5)}, "labels are float64"),
        ({"labels": np.full(30, 3), "label_names": np.array(["a", "b"])}, "below 2"),
        ({"labels": np.full(30, "c"), "label_names": np.array(["a", "b"])}, 'label "c" is not among'),
        ({"images": np.zeros((30, 4, 4), np.float32)}, "images are float32"),
        ({"images": np.zeros((30, 16), np.uint8)}, "images are uint8"),
        ({"images": np.zeros((30, 4, 4, 5), np.uint8)}, "not an image"),
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
