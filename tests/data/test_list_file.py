"""List files: both forms, splits, labels, and what is said about lines that cannot be used."""

import numpy as np
import pytest
from PIL import Image

from drep_jax.data import open_source
from drep_jax.errors import ConfigError, DataError


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "some birds").mkdir()
    for i in range(40):
        Image.fromarray(np.full((6, 6, 3), 5 * i, np.uint8)).save(tmp_path / "some birds" / f"{i}.png")
    return tmp_path


def write(folder, text):
    (folder / "list.txt").write_text(text, encoding="utf-8")
    return f"list:{folder / 'list.txt'}"


def opened(spec, split="train", **options):
    return open_source(spec, split, image_size=(6, 6), **options)


def test_words_with_quotes_comments_and_class_names(pictures):
    names = ("'sea eagle'", "owl")
    lines = [f'"some birds/{i}.png" {names[i % 2]}' for i in range(40)]
    spec = write(pictures, "# two birds\n\n" + "\n".join(lines) + "\n")
    parts = {split: opened(spec, split) for split in ("train", "validation", "test")}
    seen = []
    for source in parts.values():
        assert source.class_names == ("owl", "sea eagle") and source.num_classes == 2 and "80 % train" in source.note
        for place in range(len(source)):
            item = source[place]
            number = int(item["image"][0, 0, 0]) // 5
            assert item["label"] == 1 - number % 2 and item["label"].dtype == np.int32
            seen.append(number)
    assert sorted(seen) == list(range(40)) and len(parts["train"]) > 25
    inside = open_source("list:list.txt", "train", image_size=(6, 6), data_dir=str(pictures))
    assert len(inside) == len(parts["train"])


def test_new_lines_move_no_old_one(pictures):
    lines = [f'"some birds/{i}.png"' for i in range(40)]
    few = opened(write(pictures, "\n".join(lines[:30])), "train")
    many = opened(write(pictures, "\n".join(lines[::-1])), "train")
    assert set(few.files) <= set(many.files)
    assert few.num_classes is None and set(few[0]) == {"image"}


def test_csv_with_splits_and_numbers(pictures):
    rows = [f"some birds/{i}.png, {i % 3},{('train', 'val', 'test')[i % 4 % 3]}" for i in range(12)]
    spec = write(pictures, "path,label,split\n" + "\n".join(rows))
    sizes = {split: len(opened(spec, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 6, "validation": 3, "test": 3}
    source = opened(spec, "validation")
    assert source.num_classes == 3 and source.class_names == ("0", "1", "2") and source.note is None
    assert [int(source[i]["image"][0, 0, 0]) // 5 for i in range(3)] == [1, 5, 9]
    assert [int(source[i]["label"]) for i in range(3)] == [1, 2, 0]
    quoted = write(
        pictures,
        'path\n"some birds/1.png"\n"some birds/2.png"\n' + "\n".join(f"some birds/{i}.png" for i in range(3, 30)),
    )
    assert len(opened(quoted)) > 15 and opened(quoted).num_classes is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no images"),
        ("# nothing\n\n", "names no images"),
        ("a.png 0\nb c.png 1\n", "line 2: 3 words"),
        ("a.png 0\n'b.png 1\n", "line 2: No closing quotation"),
        ("path,split\na.png,train\nb.png,\n", "line 3: no split, but other lines have one"),
        ("a.png 0\nb.png owl\n", 'line 2: the class "owl" is a name, but others are numbers'),
        ("a.png 0\nb.png -2\n", "line 2: the class -2 is negative"),
        ("a.png 0\nb.png 01\n", "line 2: the class 01 is written with leading zeros"),
        ("a.png 0\nb.png 99999999\n", "line 2: classes are numbered"),
        ("a.png 0\nb.png 1\na.png 1\n", "line 3: a.png is already in line 1"),
        ("a.png 0\nb.png 1\n", r"images of .* are not there: .*\.png \(line"),
        ("path,lable\na.png,0\n", 'line 1: unknown column "lable"'),
        ("path,path\na.png,0\n", "line 1: a column is there twice"),
        ("path,label\na.png,0\nb.png\n", "line 3: 1 cells, expected 2"),
        ("path,label\n,0\n", "line 2: no path"),
        ("path,split\na.png,tset\n", 'line 2: unknown split "tset".* Did you mean "test"'),
        ('path,label\n"a.png,0\n', "line 2: unexpected end of data"),
        ("path,split\na.png,train\n", "list.txt does not|are not there"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        opened(write(tmp_path, text))


def test_absent_and_foreign_files(tmp_path, pictures):
    with pytest.raises(DataError, match=r"no file .*none\.txt"):
        opened(f"list:{tmp_path}/none.txt")
    with pytest.raises(DataError, match="cannot be read as text"):
        opened(f"list:{pictures / 'some birds' / '0.png'}")
    with pytest.raises(ConfigError, match="list:FILE"):
        opened("list")
    spec = write(pictures, "path,split\nsome birds/1.png,train\nsome birds/2.png,train\n")
    with pytest.raises(DataError, match="falls into the"):
        for split in ("train", "validation", "test"):
            opened(spec, split)
