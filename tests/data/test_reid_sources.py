"""Data sets for re-identification, read from small trees with their true names: labels, cameras, flags, splits, notes."""

import os
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from drep_jax.data import open_source
from drep_jax.data.loader import read_images, training_batches
from drep_jax.data.source import Subset
from drep_jax.data.unreadable import tolerating
from drep_jax.errors import ConfigError
from drep_jax.metrics.protocol import Protocol
from tests import reid_trees
from tests.reid_trees import picture

SPLITS = ("train", "validation", "test")


def opened(spec, split="test", **options):
    return open_source(spec, split, image_size=(8, 4), resize="squash", **options)


def rows(source):
    """Every image's identity, camera and flags, in order."""
    table = source.table
    flags = [table[name] for name in ("query", "gallery") if name in table]
    return [
        (source.class_names[label], int(camera), *map(int, more))
        for label, camera, *more in zip(table["label"], table["camera"], *flags, strict=True)
    ]


def test_market_1501(tmp_path):
    reid_trees.market(tmp_path)
    test = opened(f"market1501:{tmp_path}")
    assert rows(test) == [
        ("0001", 0, 1, 0),
        ("0001", 1, 1, 0),
        ("0003", 0, 1, 0),
        ("0005", 0, 1, 0),
        ("0000", 0, 0, 1),
        ("0000", 3, 0, 1),
        ("0001", 0, 0, 1),
        ("0001", 2, 0, 1),
        ("0003", 1, 0, 1),
        ("0005", 0, 0, 1),
    ]
    assert test.class_names == ("0000", "0001", "0003", "0005") and test.num_classes == 4
    assert test.protocol == Protocol(cross_camera=True, trials=0) and test.cameras == 6 and test.views == 0
    assert "query 3 identities, 4 images (published: 750 and 3,368)" in test.note
    assert (
        "2 junk images left out" in test.note and "1 query has no gallery image of the identity by another" in test.note
    )
    train, validation = (opened(f"market1501:{tmp_path}", split) for split in ("train", "validation"))
    names = tuple(f"{2 * i + 2:04d}" for i in range(12))
    assert train.class_names == validation.class_names == names and train.num_classes == 12
    assert rows(validation) == [("0020", 0), ("0020", 5)], "every tenth identity"
    assert rows(train) == [(name, camera) for name in names if name != "0020" for camera in (0, 5)]
    assert set(train.table) == {"label", "camera", "view"} and (train.table["view"] == -1).all()


def test_further_distractors_join_the_gallery(tmp_path):
    base = reid_trees.market(tmp_path)
    picture(base / "images" / "0000_c3s1_000001_00.jpg")
    picture(base / "images" / "-1_c3s1_000002_00.jpg")
    with_distractors = rows(opened(f"market1501:{base}?distractors=images"))
    assert with_distractors[:-1] == rows(opened(f"market1501:{base}")) and with_distractors[-1] == ("0000", 2, 0, 1)


def test_duke(tmp_path):
    reid_trees.duke(tmp_path)
    test = opened(f"duke:{tmp_path}")
    assert rows(test) == [("0002", 0, 1, 0), ("0002", 1, 0, 1), ("0002", 4, 0, 1), ("7139", 1, 0, 1)]
    train = opened(f"duke:{tmp_path}?held_out=0", "train")
    assert rows(train) == [(name, camera) for name in ("0001", "0005", "0009") for camera in (1, 7)]
    assert train.cameras == 8 and "train 3 identities, 6 images (published: 702 and 16,522)" in train.note


@pytest.mark.parametrize("version", [1, 2])
def test_msmt17_of_both_versions(tmp_path, version):
    base = reid_trees.msmt17(tmp_path, version)
    test = opened(f"msmt17:{tmp_path}")
    assert f"MSMT17-V{version}" in test.note and test.cameras == 15
    assert rows(test) == [
        ("0000", 0, 1, 0),
        ("0001", 13, 1, 0),
        *(("0000", camera, 0, 1) for camera in (0, 1, 2)),
        *(("0001", camera, 0, 1) for camera in (13, 8)),
    ]
    train = opened(f"msmt17:{base}?held_out=0&version={version}", "train")
    assert rows(train) == [(f"000{p}", c) for p in range(4) for c in (0, 14)] + [("0003", 6)], "train, then val"


@pytest.mark.parametrize("form", ["mat", "json", "np"])
@pytest.mark.parametrize("boxes", ["labeled", "detected"])
def test_cuhk03_in_every_form(tmp_path, form, boxes):
    reid_trees.cuhk03(tmp_path, form, boxes)
    spec = f"cuhk03:{tmp_path}" + ("" if boxes == "labeled" else "?boxes=detected")
    test = opened(spec)
    name = (lambda pair, person: f"{pair}{person}") if form == "np" else (lambda pair, person: f"{pair}_{person}")
    assert rows(test) == [
        (name("2", "003"), 0, 1, 0),
        (name("2", "003"), 1, 1, 0),
        (name("2", "003"), 0, 0, 1),
        (name("2", "003"), 1, 0, 1),
        (name("3", "001"), 0, 0, 1),
    ]
    assert rows(opened(spec, "validation")) == [(name("5", "010"), 0), (name("5", "010"), 1)]
    assert ("5,328" if boxes == "labeled" else "5,332") in test.note


def test_vehicleid_has_one_pool_and_ten_trials(tmp_path):
    reid_trees.vehicleid(tmp_path)
    test = opened(f"vehicleid:{tmp_path}?size=800")
    assert rows(test) == [("7", 0, 1, 1), ("7", 0, 1, 1), ("30", 0, 1, 1)]
    assert test.protocol == Protocol(cross_camera=False, trials=10)
    assert (
        "test 2 identities, 3 images (published: 800 and 6,493)" in test.note and "1 query has no gallery" in test.note
    )
    train = opened(f"vehicleid:{tmp_path}?held_out=0", "train")
    assert train.class_names == ("2", "9", "10"), "numbers are sorted as numbers"
    assert train.table["label"].tolist() == [1, 1, 2, 2, 0]


def test_veri_merges_queries_that_are_gallery_images(tmp_path):
    reid_trees.veri(tmp_path)
    test = opened(f"veri:{tmp_path}")
    assert rows(test) == [("0002", 1, 1, 1), ("0002", 2, 0, 1), ("0005", 0, 0, 1)]
    assert test.table["view"].tolist() == [3, -1, -1] and test.views == 4 and test.cameras == 20
    assert test.attributes["color"].tolist() == [5, 5, 5] and test.attributes["type"].tolist() == [0, 1, 2]
    train = opened(f"veri:{tmp_path}?held_out=0", "train")
    assert rows(train) == [("0001", 0), ("0001", 19), ("0003", 1)] and "1 image is in no list" in train.note


def test_veri_can_leave_out_images_of_unknown_view(tmp_path):
    base = reid_trees.veri(tmp_path)
    (base / "keypoint_train.txt").write_text("x/0001_c001_00016450_0.jpg 1 2\nx/0001_c020_00016460_0.jpg 1 7\n")
    with open(base / "keypoint_test.txt", "a") as file:
        file.write("x/0002_c003_00030620_1.jpg -1 0\n")
    train = opened(f"veri:{tmp_path}?held_out=0&views=known", "train")
    assert rows(train) == [("0001", 0), ("0001", 19)] and "is unknown (left out)" in train.note
    test = opened(f"veri:{tmp_path}?views=known")
    assert rows(test) == [("0002", 1, 1, 1), ("0002", 2, 0, 1)] and test.table["view"].tolist() == [3, 0]
    with pytest.raises(ConfigError, match='views of VeRi-776 is "all" or "known"; got "some"'):
        opened(f"veri:{tmp_path}?views=some")


def test_published_counts_are_said_to_be_so(tmp_path, monkeypatch):
    from drep_jax.data.reid import market

    reid_trees.duke(tmp_path)
    monkeypatch.setitem(market.DUKE_COUNTS, "train", (3, 6))
    assert opened(f"duke:{tmp_path}", "train").note == (
        "DukeMTMC-reID: train 3 identities, 6 images, as published. 2 identities to learn from."
    )


def test_items_are_the_table_and_images_are_squashed(tmp_path):
    base = reid_trees.market(tmp_path)
    for split in SPLITS:
        source = opened(f"market1501:{base}", split)
        assert all(values.dtype == np.int32 and values.shape == (len(source),) for values in source.table.values())
        for index in range(len(source)):
            item, raw = source[index], source.raw(index)
            wanted = np.asarray(Image.open(raw["image"]).resize((4, 8), Image.Resampling.BICUBIC))
            assert item["image"].dtype == np.uint8 and (item["image"] == wanted).all()
            assert set(item) == {"image", *source.table} and set(raw) == {"where", *item}
            assert all(item[name] == raw[name] == values[index] for name, values in source.table.items())
    batch = next(training_batches(opened(f"market1501:{base}", "train"), 4, seed=0))
    assert batch["camera"].shape == (4,)


def test_wrappers_keep_the_table(tmp_path):
    source = opened(f"market1501:{reid_trees.market(tmp_path)}")
    for wrapped, wanted in ((Subset(source, [5, 2]), [5, 2]), (tolerating(source, 2), range(10))):
        assert wrapped.protocol == source.protocol and (wrapped.cameras, wrapped.views) == (6, 0)
        for name, values in source.table.items():
            assert wrapped.table[name].tolist() == values[list(wanted)].tolist()
            assert [wrapped[i][name] for i in range(len(wrapped))] == wrapped.table[name].tolist()
    assert not hasattr(Subset(opened("random:4", "test"), [0]), "table")


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("named", lambda who, camera, i: f"{who}_cam{camera}_{i}.png"),
        ("numbers", lambda who, camera, i: f"{who}_{camera}_{i:04d}.png"),
        ("folders", lambda who, camera, i: f"{who}/C{camera}_{i}.png"),
        ("deep", lambda who, camera, i: f"{who}/camera_{camera}/{i}.png"),
        ("cameras above", lambda who, camera, i: f"cam_{camera}/{who}/{i}.png"),
        ("cameras above, with other names inside", lambda who, camera, i: f"C{camera}/{who}/day1/{i}.png"),
    ],
)
def test_a_folder_of_ones_own(tmp_path, form, names):
    people = [f"person{i}" for i in range(40)]
    for number, who in enumerate(people):
        for camera in (3, 7):
            for i in range(1 + number % 3):
                picture(tmp_path / names(who, camera, i), number)
    parts = {split: opened(f"reid_folder:{tmp_path}", split) for split in SPLITS}
    seen = {split: {name for name, *_ in rows(source)} for split, source in parts.items()}
    assert set.union(*seen.values()) == set(people) and sum(map(len, seen.values())) == 40
    assert 10 <= len(seen["test"]) <= 30
    test = parts["test"]
    assert test.cameras == 2 and "0 = 3, 1 = 7" in test.note and "no gallery" not in test.note
    by_place = {(name, camera): [] for name, camera, *_ in rows(test)}
    for name, camera, *flags in rows(test):
        by_place[name, camera].append(tuple(flags))
    for (who, _), flags in by_place.items():
        count = 1 + people.index(who) % 3
        assert sorted(flags) == ([(1, 1)] if count == 1 else [(0, 1)] * (count - 1) + [(1, 0)])
    assert "Names read as " in test.note
    for place in (tmp_path, *tmp_path.iterdir()):
        shutil.rmtree(place / people[0], ignore_errors=True)
    more = {name for name, *_ in rows(opened(f"reid_folder:{tmp_path}"))}
    assert more - {people[0]} == seen["test"] - {people[0]}, "others have not moved"


def test_ones_own_folder_with_parts_a_pattern_or_without_cameras(tmp_path):
    for part, names in {
        "train": ["b_c1_0.png", "a_c2_0.png"],
        "query": ["x_c1_0.png"],
        "gallery": ["x_c2_0.png"],
    }.items():
        for name in names:
            picture(tmp_path / "parts" / part / name)
    assert rows(opened(f"reid_folder:{tmp_path}/parts?held_out=0", "train")) == [("a", 1), ("b", 0)]
    assert rows(opened(f"reid_folder:{tmp_path}/parts")) == [("x", 0, 1, 0), ("x", 1, 0, 1)]
    for i in range(12):
        picture(tmp_path / "left" / f"{i:02d}" / f"v{i % 5}.png")
        picture(tmp_path / "left" / f"{i:02d}" / "v1_.png")
    pattern = r"(?P<identity>\d+)/v(?P<view>\d+)_?\.png"
    source = opened(f"reid_folder:{tmp_path}/left?pattern={pattern}&test=0.5&seed=2")
    assert source.protocol == Protocol(cross_camera=False) and "No cameras are known" in source.note
    assert set(source.table["view"]) <= set(range(5)) and (source.table["camera"] == 0).all()
    per = Counter((name, *flags) for name, _, *flags in rows(source))
    assert set(per.values()) == {1}, "one query and one gallery image each"


def test_ones_own_csv(tmp_path):
    lines = ["path,identity,camera,view,split"]
    for part, who, camera in (
        ("train", "a", "door"),
        ("train", "b", "yard"),
        ("test", "c", "door"),
        ("test", "c", "yard"),
        ("test", "c", "yard"),
        ("test", "-1", "yard"),
    ):
        path = picture(tmp_path / "some where" / f"{len(lines)}.png")
        lines.append(f"{path.relative_to(tmp_path)},{who},{camera},{len(lines) % 2 or ''},{part}")
    (tmp_path / "images.csv").write_text("\n".join(lines))
    test = opened(f"reid_folder:{tmp_path}")
    assert rows(test) == [("c", 0, 1, 1), ("c", 1, 1, 0), ("c", 1, 0, 1)] and "1 junk image left out" in test.note
    assert test.table["view"].tolist() == [1, -1, 1]


def packed(path, persons=10):
    jpegs, columns = [], []
    for person in range(persons):
        for camera in (1, 2):
            for view in (1, 2, 3):
                file = picture(path.parent / "one.jpg", 100 * person + 10 * camera + view)
                jpegs.append(file.read_bytes())
                columns.append((5 * person, camera, view, int(person >= 6)))
    pid, camera, view, split = np.array(columns).T
    offsets = np.cumsum([0, *map(len, jpegs)])
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(jpegs), np.uint8),
        offsets=offsets,
        pid=pid,
        camera=camera,
        view=view,
        split=split,
    )


def test_a_packed_set(tmp_path, monkeypatch):
    packed(tmp_path / "set.npz")
    monkeypatch.setenv("DREP_DATA", str(tmp_path))
    test = opened("reid_npz:set.npz")
    assert [row[0] for row in rows(test)[::3]] == ["30", "35", "40", "45"] * 2
    assert {row[1:] for row in rows(test)[:12]} == {(0, 1, 0)} and {row[1:] for row in rows(test)[12:]} == {(1, 0, 1)}
    assert test.table["view"].tolist() == [0, 1, 2] * 8 and test.views == 3
    assert (test[0]["image"] == opened("reid_npz:set.npz", data_dir=str(tmp_path))[0]["image"]).all()
    assert not (read_images(test, [0]) == read_images(test, [1])).all()
    both = opened("reid_npz:set.npz?gallery=all")
    assert len(both) == 24 and {row[2:] for row in rows(both)} == {(1, 1)} and both.protocol.cross_camera
    with np.load(tmp_path / "set.npz") as stored:
        arrays = dict(stored)
    np.savez(tmp_path / "some.npz", **{**arrays, "view": np.where(arrays["view"] == 2, -1, arrays["view"])})
    assert opened("reid_npz:some.npz").table["view"].tolist() == [0, -1, 2] * 8, "unknown views stay unknown"
    drawn = [opened(f"reid_npz:set.npz?test=0.5&seed={seed}") for seed in (3, 3, 4)]
    assert [source.num_classes for source in drawn] == [5, 5, 5]
    assert drawn[0].class_names == drawn[1].class_names != drawn[2].class_names
    train = opened("reid_npz:set.npz?test=0.5&seed=3&held_out=0", "train")
    assert not set(train.class_names) & set(drawn[0].class_names) and train.num_classes == 5


@pytest.mark.skipif("DREP_DATA" not in os.environ, reason="DREP_DATA, the directory of real data, is not set")
def test_the_real_packed_set():
    counts = {split: opened("reid_npz:reid_pku74.npz", split) for split in SPLITS}
    assert [(len(source), source.num_classes) for source in counts.values()] == [(896, 62), (96, 62), (192, 12)]
    test = counts["test"].table
    assert (test["query"] == (test["camera"] == 0)).all() and (test["gallery"] == (test["camera"] == 1)).all()
    assert counts["train"].views == 8 and counts["train"].cameras == 2
    assert open_source("reid_npz:reid_pku74.npz", "test", image_size=(128, 48), resize="exact")[191]["image"].std() > 10
