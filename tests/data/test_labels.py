"""Labels of every source: missing ones are known as such, those out of range refused, classes of the splits compared."""

import shutil
from collections import Counter
from dataclasses import make_dataclass

import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.data.datasets import open_images
from drep_jax.data.labels import MISSING, check_classes, check_range, check_scorable, described, ignored_note, labels_of
from drep_jax.data.loader import training_batches
from drep_jax.data.merged import MergedSource
from drep_jax.data.npz_source import ArraySource
from drep_jax.data.source import Subset
from drep_jax.data.unreadable import tolerating
from drep_jax.errors import DataError
from drep_jax.jobs import evaluate
from drep_jax.tasks.base import Task
from tests.reid_trees import picture

SIZE = {"image_size": (4, 4), "resize": "squash"}
DATA = {"image_size": (4, 4), "resize": "squash", "data_dir": ""}


def source_of(labels, names=None, *, name="mine", stored=None, classes=3):
    """Returns black images with these labels."""
    names = tuple(map(str, range(classes))) if names is None else names
    return ArraySource(
        name, np.zeros((len(labels), 4, 4, 3), np.uint8), np.array(labels, np.int32), names, None, stored
    )


def arrays(folder, **splits):
    """Writes set_SPLIT.npz with these labels."""
    for split, labels in splits.items():
        np.savez(
            folder / f"set_{split}.npz", images=np.zeros((len(labels), 4, 4, 3), np.uint8), labels=np.array(labels)
        )
    return {"source": "npz:set", **DATA, "data_dir": str(folder)}


def listed(folder, rows):
    """Writes a list file with (label, split) of images."""
    for number in range(len(rows)):
        picture(folder / f"{number}.png", number)
    lines = [f"{number}.png,{label},{split}" for number, (label, split) in enumerate(rows)]
    (folder / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    return {"source": f"list:{folder / 'list.csv'}", **DATA}


def folders(folder, *files):
    for number, file in enumerate(files):
        picture(folder / file, number)
    return {"source": f"folder:{folder}", **DATA}


def test_missing_labels_are_minus_one_in_every_source(tmp_path):
    data = arrays(tmp_path, train=[0, -1, 2, 1] * 5, test=[1, -1])
    train, test = (open_source(data["source"], split, data_dir=str(tmp_path), **SIZE) for split in ("train", "test"))
    assert labels_of(train).tolist() == ([0, -1, 2, 1] * 5)[:18] and train.num_classes == 3
    assert int(train[1]["label"]) == MISSING and labels_of(test).tolist() == [1, -1]
    data = arrays(tmp_path, train=["owl", "", "eagle", "owl"] * 5, test=["owl", "-1"])
    train, test = (open_source(data["source"], split, data_dir=str(tmp_path), **SIZE) for split in ("train", "test"))
    assert labels_of(train)[:3].tolist() == [1, -1, 0] and labels_of(test).tolist() == [1, -1]
    assert train.class_names == test.class_names == ("eagle", "owl"), "a class that one split lacks moves no label"
    spec = listed(tmp_path, [("owl", "train"), ("", "train"), ("-1", "train"), ("cat", "train"), ("cat", "test")])[
        "source"
    ]
    train = open_source(spec, "train", **SIZE)
    whole = [labels_of(open_source(spec, split, **SIZE)).tolist() for split in ("test",)]
    assert set(labels_of(train).tolist()) <= {-1, 0, 1} and MISSING in labels_of(train) and whole == [[0]]
    for wrapper in (Subset(train, range(len(train))), tolerating(train, 1)):
        assert labels_of(wrapper).tolist() == labels_of(train).tolist() and wrapper.stored == "train"
    assert labels_of(MergedSource([train, test], [1.0, 1.0])) is None


@pytest.mark.parametrize(
    ("make", "stored"),
    [
        (lambda f: arrays(f, train=[0, 1] * 10, validation=[0, 1], test=[-1, -1]), "validation"),
        (lambda f: listed(f, [("a", "train")] * 30 + [("a", "val"), ("", "test")]), "validation"),
        (lambda f: folders(f, *(f"train/a/{i}.png" for i in range(30)), "val/a/x.png", "test/y.png"), "validation"),
    ],
    ids=["npz", "list", "folder"],
)
def test_a_test_split_whose_labels_are_withheld_is_not_scored(tmp_path, make, stored):
    data = make(tmp_path)
    images = open_images(data, head=True, gallery=1, seed=0)
    assert images.test.stored == stored and "has no labels: its validation split serves" in images.test.note
    check_scorable(images.test)
    assert images.train.stored == images.held_out.stored == "train"


@pytest.mark.parametrize(
    "make",
    [
        lambda f: arrays(f, train=[0, 1] * 10, test=[-1, -1]),
        lambda f: listed(f, [("a", "train")] * 30 + [("", "test")]),
        lambda f: folders(f, *(f"train/a/{i}.png" for i in range(30)), "test/y.png"),
        lambda f: folders(f, *(f"train/a/{i}.png" for i in range(30)), "val/y.png"),
    ],
    ids=["npz", "list", "flat test", "flat val"],
)
def test_test_images_without_labels_beside_labeled_ones_are_refused(tmp_path, make):
    test = open_images(make(tmp_path), head=True, gallery=1, seed=0).test
    for images in (test, tolerating(test, 1)):
        with pytest.raises(DataError, match=r"None of its \d test images of .* has a label.*remove the split"):
            Task().check_test(images)


def test_labeled_test_images_beside_unlabeled_ones_are_scored(tmp_path):
    data = folders(tmp_path, *(f"train/{i}.png" for i in range(30)), "test/b/x.png", "test/a/y.png")
    images = open_images(data, head=True, gallery=1, seed=0)
    assert images.num_classes == 2 and len(images.test) == 2 and images.train.num_classes is None


def test_labels_that_are_known_by_reading_only_are_looked_at():
    class Reading:
        name, num_classes, class_names, note = "reading", 3, None, None
        given = (-1,) * 100

        def __len__(self):
            return len(self.given)

        def __getitem__(self, index):
            return {"image": np.zeros((4, 4, 3), np.uint8), "label": np.int32(self.given[index])}

    source = Reading()
    with pytest.raises(DataError, match="None of 32 of its 100 test images of reading has a label"):
        check_scorable(source)
    source.given = (*source.given[:-1], 7)
    with pytest.raises(DataError, match=r"1 of 32 labels lie outside 0 … 2, such as 7"):
        check_scorable(source)


def test_labels_out_of_range_are_counted_and_shown(tmp_path):
    check_range(np.array([-1, 0, 2]), 3, "mine")
    with pytest.raises(DataError, match=r"mine: 2 of 4 labels lie outside 0 … 2, such as 3 of image 9"):
        check_range(np.array([0, 3, -2, 1]), 3, "mine", np.array([8, 9, 10, 11]))
    with pytest.raises(DataError, match="1 of 3 labels"):
        check_scorable(source_of([0, 5, 1]))
    np.savez(tmp_path / "one.npz", images=np.zeros((3, 4, 4, 3), np.uint8), labels=[0, 2, -7], label_names=["a", "b"])
    with pytest.raises(DataError, match=r"one\.npz: 2 of 3 labels lie outside 0 … 1, such as 2 of image 1"):
        open_source(f"npz:{tmp_path / 'one.npz'}", "train", **SIZE)


REFUSE = {"unknown": "refuse", "setting": "evaluate.unknown_classes"}


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (([0, 1], ("cat", "dog")), ([0], ("images",)), "no class in common.*Training: cat, dog. Test: images"),
        (
            ([0, 1], ("a", "b", "c")),
            ([1, 2], ("a", "b", "c")),
            r"1 of the 2 classes .* no training image: c\..*=\"score\"",
        ),
        (([0, 1], ("a", "b")), ([0, 1], ("b", "a")), r'The class "b" of mine has another number'),
        (([0, 1, -1], None), ([2, 1, -1], None), "no training image: 2"),
    ],
)
def test_classes_of_test_images_that_training_does_not_know_are_refused(train, test, said):
    with pytest.raises(DataError, match=said):
        check_classes(source_of(*train), source_of(*test), **REFUSE)


def test_classes_of_both_splits_may_differ_otherwise():
    names = ("a", "b", "c")
    train, test = source_of([0, 1, 2], names), source_of([2, -1, 0], names)
    assert check_classes(train, test, **REFUSE) is None
    few = source_of([0, 1], names)
    assert check_classes(few, source_of([1, 0]), **REFUSE) is None, "a file without names has numbers"
    assert check_classes(few, test, **{**REFUSE, "unknown": "score"}).startswith("1 of 2 classes")
    # Divided from the same images: a class of one image may fall into the test part.
    assert check_classes(few, test, also=source_of([2], names), **REFUSE) is None
    assert "no training image: c" in check_classes(few, test, also=source_of([1], names), **REFUSE)


@pytest.mark.parametrize("test", ["val/images/x.png", "val/c/x.png"])
def test_folders_of_the_test_split_that_are_no_classes(tmp_path, test):
    """As in Tiny-ImageNet, whose validation images lie in one folder."""
    data = folders(tmp_path, *(f"train/{name}/{i}.png" for name in "ab" for i in range(9)), test, "val/a/y.png")
    images = open_images(data, head=True, gallery=1, seed=0)
    with pytest.raises(DataError, match="1 of the 2 classes of the test images"):
        check_classes(images.train, images.test, **REFUSE)


def test_idx_files_have_the_classes_of_both(tmp_path):
    from tests.data.test_array_sources import write_idx

    for prefix, labels in (("train", [0, 1, 2] * 10), ("t10k", [0, 1])):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", np.zeros((len(labels), 4, 4), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.array(labels, np.uint8))
    sources = [open_source(f"idx:{tmp_path}", split, **SIZE) for split in ("train", "test")]
    assert [source.num_classes for source in sources] == [3, 3]


def test_stages_with_labels_leave_out_images_without(monkeypatch):
    source = source_of([0, -1, 1, 2, -1, 0, -1, 1])
    order = Task().order(source, 3)
    batches = training_batches(source, 4, seed=3, order=order)
    seen = np.concatenate([next(batches)["index"] for _ in range(5)])
    assert Counter(seen.tolist()) == dict.fromkeys((0, 2, 3, 5, 7), 4)
    assert Task().order(source_of([0, 1, 2]), 3) is None, "then the order is what it was"
    with pytest.raises(DataError, match="None of the 2 images of mine has a label to train with"):
        training_batches(source_of([-1, -1]), 1, seed=0, order=Task().order(source_of([-1, -1]), 0))


def test_an_unreadable_image_is_replaced_by_a_labeled_one(tmp_path):
    rows = [("a", "train"), ("", "train"), ("b", "train"), ("", "test"), ("a", "test"), ("", "val")]
    spec = listed(tmp_path, rows)["source"]
    (tmp_path / "0.png").write_bytes(b"no picture")
    source = tolerating(open_source(spec, "train", **SIZE), 1)
    batch = next(training_batches(source, 2, seed=0, order=Task().order(source, 0)))
    assert batch["label"].tolist() == [1, 1] and batch["index"].tolist() == [2, 2]


def test_what_a_source_says_is_told_with_counts(tmp_path):
    data = folders(tmp_path, *(f"train/a/{i}.png" for i in range(30)), "val/a/x.png")
    for name in ("p.jfif", "q.JFIF", "r.txt", ".hidden"):
        (tmp_path / "train" / "a" / name).write_text("x")
    (tmp_path / "train" / "a" / "deep").mkdir()
    images = open_images(data, head=True, gallery=1, seed=0)
    note = "Ignored 5 entries below "
    assert note in images.train.note
    for kind in ("2 .jfif", "1 .txt", "1 hidden", "1 folders"):
        assert kind in images.train.note
    told = described({"train": images.train, "test": images.test, "none": None})
    assert told["train"] == {
        "source": data["source"],
        "images": len(images.train),
        "classes": 1,
        "unlabeled": 0,
        "notes": [images.train.note],
    }
    assert described({"x": source_of([0, -1])})["x"]["unlabeled"] == 1
    assert ignored_note(Counter(), "DIR", ()) is None


def test_an_evaluation_on_another_source_compares_the_classes_of_both(tmp_path, monkeypatch):
    ours, theirs = (
        folders(tmp_path / name, *(f"{split}/{each}/x.png" for split in ("train", "val") for each in names))
        for name, names in (("ours", "abc"), ("theirs", "bcd"))
    )
    saved = {"data": ours, "evaluate": {}}
    monkeypatch.setattr(evaluate, "_config_there", lambda directory: saved)

    def check(data, **options):
        test = open_source(data["source"], "test", **SIZE)
        setup = make_dataclass("Known", ["test", "task"])(test, Task())
        evaluate._check_classes({"data": data, "evaluate": options}, "run", setup)

    check(ours)
    check(theirs, unknown_classes="score")
    with pytest.raises(
        DataError, match=r"another number in the test split.*The backbone of the run was trained on folder:"
    ):
        check(theirs)
    shutil.rmtree(tmp_path / "ours")
    check(theirs)  # which classes the run had is then not known
