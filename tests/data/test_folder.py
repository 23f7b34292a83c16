"""Folders of images: layouts, splits, and every way in which a folder can be wrong."""

import numpy as np
import pytest
from PIL import Image

from drep_jax.data import open_source
from drep_jax.errors import DataError


def put(path, value=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def opened(root, split="train", **options):
    return open_source(f"folder:{root}", split, **{"image_size": (6, 5), **options})


def test_split_and_class_folders(tmp_path):
    for number, where in enumerate(["train/cat/b", "train/cat/a", "train/dog/c", "val/dog/d", "test/bird/e"]):
        put(tmp_path / f"{where}.png", number)
    train, validation, test = (opened(tmp_path, split) for split in ("train", "validation", "test"))
    assert train.class_names == validation.class_names == test.class_names == ("bird", "cat", "dog")
    assert [(int(x["image"][0, 0, 0]), int(x["label"])) for x in map(train.__getitem__, range(3))] == [
        (1, 1),
        (0, 1),
        (2, 2),
    ]
    assert train[0]["label"].dtype == np.int32
    assert (len(validation), int(validation[0]["label"])) == (1, 2)
    assert (len(test), int(test[0]["label"])) == (1, 0)
    assert train.note is None and train.num_classes == 3


def test_one_class_folder_level_is_divided_in_tenths_by_name(tmp_path):
    for number in range(400):
        put(tmp_path / ("cat" if number % 2 else "dog") / f"{number}.PNG", number % 256, (2, 2))
    parts = {split: opened(tmp_path, split, image_size=(2, 2)) for split in ("train", "validation", "test")}
    files = [file for part in parts.values() for file in part.files]
    assert len(files) == len(set(files)) == 400
    assert 290 < len(parts["train"]) < 350 and len(parts["validation"]) > 20 and len(parts["test"]) > 20
    assert "80 % train" in parts["train"].note
    for part in parts.values():
        assert part.files == sorted(part.files)
        for i, file in enumerate(part.files[:20]):
            assert part.class_names[part[i]["label"]] == file.parent.name
            assert part[i]["image"][0, 0, 0] == int(file.stem) % 256
    # A new image leaves every other where it was.
    put(tmp_path / "cat" / "new.png", size=(2, 2))
    for split, part in parts.items():
        assert set(part.files) <= set(opened(tmp_path, split, image_size=(2, 2)).files)


def test_flat_folders_are_unlabelled(tmp_path):
    for number in range(60):
        put(tmp_path / f"{number}.jpg", number)
    source = opened(tmp_path)
    assert source.num_classes is None and source.class_names is None
    assert set(source[0]) == {"image"} and 35 < len(source) < 58


def test_flat_split_folders(tmp_path):
    put(tmp_path / "train" / "a.bmp", 1)
    put(tmp_path / "validation" / "b.webp", 2)
    put(tmp_path / "test" / "c.gif", 3)
    assert [len(opened(tmp_path, split)) for split in ("train", "validation", "test")] == [1, 1, 1]
    assert opened(tmp_path).num_classes is None


def test_val_serves_as_test_and_validation_is_held_out_of_train(tmp_path):
    for number in range(100):
        put(tmp_path / "train" / "a" / f"{number}.png", size=(2, 2))
    put(tmp_path / "val" / "a" / "x.png", size=(2, 2))
    train, validation, test = (opened(tmp_path, split, image_size=(2, 2)) for split in ("train", "validation", "test"))
    assert [file.name for file in test.files] == ["x.png"] and "validation" in test.note
    assert not set(train.files) & set(validation.files) and len(train) + len(validation) == 100
    assert 0 < len(validation) < 25


def test_hidden_files_and_other_files_are_counted(tmp_path):
    put(tmp_path / "train" / "a" / "x.png")
    put(tmp_path / "train" / "a" / ".hidden.png")
    (tmp_path / "train" / "a" / "labels.txt").write_text("x")
    (tmp_path / "train" / ".DS_Store").write_text("x")
    for name in ("test", "val"):
        put(tmp_path / name / "a" / "y.png")
    source = opened(tmp_path)
    assert len(source) == 1 and "Ignored 3" in source.note


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "No images in .*png.*DIR/SPLIT/CLASS/IMAGE"),
        (["notes.txt"], "No images in"),
        (["cat/notes.txt", "dog/"], "No images in"),
        (["cat/a.png", "dog/"], 'class folder "dog" .* has no images'),
        (["cat/a.png", "dog/deep/b.png"], 'class folder "dog" .* has no images directly'),
        (["a.png", "cat/b.png"], r"mixes two layouts: a\.png lies beside folders of images \(cat\)"),
        (["train/a.png", "train/cat/b.png"], "mixes two layouts"),
        (["train/cat/a.png", "b.png"], r"mixes two layouts: beside the split folders train there are images in b\.png"),
        (["train/cat/a.png", "vaildation/cat/b.png"], "mixes two layouts.*vaildation"),
        (["train/", "val/a.png", "test/a.png"], "No images in .*train"),
        (["val/a/a.png", "validation/a/a.png"], '"val" and a "validation"'),
        (["val/a/a.png"], "no train split"),
    ],
)
def test_bad_folders_are_explained(tmp_path, files, message):
    for name in files:
        if name.endswith("/"):
            (tmp_path / name).mkdir(parents=True)
        elif name.endswith(".txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        else:
            put(tmp_path / name)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_absent_directory_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no directory .*nowhere"):
        opened(tmp_path / "nowhere")


def test_a_part_without_images_is_refused(tmp_path):
    put(tmp_path / "a.png")
    results = []
    for split in ("train", "validation", "test"):
        try:
            results.append(len(opened(tmp_path, split)))
        except DataError as error:
            assert "None of the 1 images" in str(error)
            results.append(0)
    assert sorted(results) == [0, 0, 1]


def test_unreadable_and_wrongly_sized_images_are_named(tmp_path):
    for name in ("train", "val", "test"):
        put(tmp_path / name / "good.png")
    (tmp_path / "train" / "bad.png").write_bytes((tmp_path / "train" / "good.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"Cannot read the image .*bad\.png"):
        opened(tmp_path)[0]
    with pytest.raises(DataError, match=r"good\.png is 6 x 5 .* 8 x 8 is wanted"):
        opened(tmp_path, image_size=(8, 8), resize="exact")[1]
    assert opened(tmp_path, image_size=(8, 9), resize="squash")[1]["image"].shape == (8, 9, 3)
