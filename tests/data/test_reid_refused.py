"""Data sets for re-identification that cannot be used: what is wrong, where, and what to do."""

import re
import shutil

import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.data.reid.listing import Entry, Listed, checked
from drep_jax.errors import ConfigError, DataError
from tests import reid_trees
from tests.reid_trees import picture

TREES = {
    "market1501": reid_trees.market,
    "duke": reid_trees.duke,
    "msmt17": reid_trees.msmt17,
    "cuhk03": lambda root: reid_trees.cuhk03(root, "np"),
    "vehicleid": reid_trees.vehicleid,
    "veri": reid_trees.veri,
}
TITLES = {
    "market1501": "Market-1501",
    "duke": "DukeMTMC-reID",
    "msmt17": "MSMT17-V1",
    "cuhk03": "CUHK03 of the new protocol",
    "vehicleid": "VehicleID",
    "veri": "VeRi-776",
}


def refused(spec, *fragments, kind=DataError, split="test", **options):
    with pytest.raises(kind) as caught:
        open_source(spec, split, image_size=(8, 4), resize="squash", **options)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"


@pytest.mark.parametrize("given", TREES)
def test_every_wrong_folder_is_recognised(tmp_path, given):
    base = TREES[given](tmp_path)
    for spec in set(TREES) - {given}:
        refused(f"{spec}:{base}", f"This is {TITLES[given]}", f'the source "{given}:{base}"')


def test_a_version_that_is_not_there_is_named(tmp_path):
    base = reid_trees.msmt17(tmp_path, 2)
    refused(f"msmt17:{base}?version=1", "This is MSMT17-V2, expected MSMT17-V1: train, test")
    refused(f"msmt17:{base}?version=3", "has the versions 1 and 2", kind=ConfigError)
    reid_trees.msmt17(tmp_path, 1)
    refused(f"msmt17:{tmp_path}", "both versions of MSMT17", "?version=1", kind=ConfigError)


def test_the_folder_above_says_where_the_data_set_is(tmp_path):
    base = reid_trees.market(tmp_path)
    shutil.rmtree(base / "query")
    refused(f"market1501:{tmp_path}", "it lacks bounding_box_train, query", f"{base} is Market-1501.")
    refused(f"market1501:{tmp_path}/nowhere", f"no directory {tmp_path}/nowhere")
    refused(f"veri:{tmp_path}", "expected VeRi-776: image_train, image_query, image_test")


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        ("market1501", "query"),
        ("duke", "bounding_box_test"),
        ("msmt17", "list_val.txt"),
        ("msmt17", "test"),
        ("vehicleid", "train_test_split/test_list_800.txt"),
        ("veri", "image_query"),
    ],
)
def test_missing_parts_are_named(tmp_path, spec, missing):
    path = TREES[spec](tmp_path) / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(f"{spec}:{path.parents[missing.count('/')]}", f"it lacks {missing}", f"expected {TITLES[spec]}")


@pytest.mark.parametrize(
    ("spec", "file", "camera", "last"),
    [
        ("market1501", "query/0001_c7s1_001051_00.jpg", 7, 6),
        ("market1501", "query/0001_c0s1_001051_00.jpg", 0, 6),
        ("duke", "query/0001_c9_f0046985.jpg", 9, 8),
        ("veri", "image_query/0002_c021_00030600_0.jpg", 21, 20),
    ],
)
def test_cameras_that_do_not_exist(tmp_path, spec, file, camera, last):
    path = picture(TREES[spec](tmp_path) / file)
    refused(f"{spec}:{tmp_path}", str(path), f"camera {camera}, but", f"the cameras 1 to {last}")


def test_cameras_of_lists_that_do_not_exist(tmp_path):
    base = reid_trees.msmt17(tmp_path)
    (base / "list_val.txt").write_text("0003/0003_099_16_0303noon_0008_0.jpg 3\n")
    refused(f"msmt17:{base}", "list_val.txt, line 1: camera 16", "1 to 15")


@pytest.mark.parametrize("spec", ["market1501", "duke", "veri"])
def test_names_that_do_not_fit(tmp_path, spec):
    folder = {"veri": "image_train"}.get(spec, "bounding_box_train")
    base = TREES[spec](tmp_path)
    picture(base / folder / "zz_holiday.jpg")
    refused(f"{spec}:{base}", "1 image of ", str(base / folder), "zz_holiday.jpg", TITLES[spec])


def test_an_identity_in_train_and_test(tmp_path):
    base = reid_trees.market(tmp_path)
    picture(base / "bounding_box_train" / "0001_c1s1_000001_00.jpg")
    for split in ("train", "test"):
        refused(
            f"market1501:{base}",
            "1 identity both in train and in test: 0001",
            "must not have been learned",
            split=split,
        )


def test_parts_without_images_and_queries_without_answers(tmp_path):
    base = reid_trees.duke(tmp_path)
    query = next((base / "query").iterdir())
    query.rename(base / "query" / "0002_c9.txt")
    refused(f"duke:{base}", "the query part has no images")
    picture(base / "query" / "0004_c1_f0046985.jpg")
    refused(f"duke:{base}", "none of the 1 queries has a gallery image of its identity by another camera")


def test_a_gallery_of_the_same_camera_does_not_count():
    train = [Entry(b"", "t", "9", 0)]
    test = [Entry(b"", "q", "1", 0, query=True), Entry(b"", "g", "1", 0, gallery=True)]
    with pytest.raises(DataError, match="none of the 1 queries"):
        checked(Listed("x", "y", train, test, 2))
    checked(Listed("x", "y", train, [*test, Entry(b"", "h", "1", 1, gallery=True)], 2))


@pytest.mark.parametrize(
    ("file", "text", "fragments"),
    [
        ("list_query.txt", "0000/0000_000_01_0303morning_0008_0.jpg\n", ["list_query.txt, line 1", "path identity"]),
        ("list_query.txt", "\n0000/holiday.jpg 0\n", ["list_query.txt, line 2", "holiday.jpg"]),
        ("list_train.txt", "0000/0000_077_01_0303morning_0008_0.jpg 0\n", ["1 of the 1", "(line 1)"]),
        ("list_val.txt", "0000/0000_000_01_0303morning_0008_0.jpg 0\n", ["both in list_train.txt and in list_val.txt"]),
        ("list_gallery.txt", "0000/0000_000_01_0303morning_0008_0.jpg 0\n" * 2, ["line 2", "already in line 1"]),
    ],
)
def test_lists_of_msmt17(tmp_path, file, text, fragments):
    base = reid_trees.msmt17(tmp_path)
    (base / file).write_text(text)
    refused(f"msmt17:{base}", str(base), *fragments)


def test_lists_of_vehicleid(tmp_path):
    base = reid_trees.vehicleid(tmp_path)
    (base / "image" / "0000006.jpg").unlink()
    refused(f"vehicleid:{base}", "1 of the 3 images", "0000006.jpg (line 1)")
    refused(f"vehicleid:{base}?size=900", "800, 1600, 2400", kind=ConfigError)
    refused(f"vehicleid:{base}?size=1600", "it lacks train_test_split/test_list_1600.txt")
    (base / "train_test_split" / "train_list.txt").write_text("0000001 car\n")
    refused(f"vehicleid:{base}", "train_list.txt, line 1", '"car"')


def test_cuhk03_says_what_to_do_with_the_raw_file(tmp_path):
    (tmp_path / "cuhk03_release").mkdir()
    (tmp_path / "cuhk03_release" / "cuhk-03.mat").write_bytes(b"")
    refused(f"cuhk03:{tmp_path}", "HDF5", "images_labeled/PAIR_PERSON_VIEW_IMAGE.png", "CUHK03-NP")
    base = reid_trees.cuhk03(tmp_path, "mat")
    config = base / "cuhk03_new_protocol_config_labeled.mat"
    config.unlink()
    refused(f"cuhk03:{base}", "there are images, but neither", str(config))
    config.write_bytes(b"no such thing")
    refused(f"cuhk03:{base}", f"{config} cannot be read as a MATLAB file")
    config.unlink()
    (base / "splits_new_labeled.json").write_text('{"train": []}')
    refused(f"cuhk03:{base}", "is not a split as torchreid writes it")
    refused(f"cuhk03:{base}?boxes=drawn", "labeled and detected", kind=ConfigError)


def test_cuhk03_checks_its_configuration(tmp_path):
    from scipy.io import savemat

    base = reid_trees.cuhk03(tmp_path, "mat")
    config = base / "cuhk03_new_protocol_config_labeled.mat"
    names = np.array([["1_001_1_01.png"]], object)
    savemat(str(config), {"filelist": names, "train_idx": [[1]], "query_idx": [[1]]})
    refused(f"cuhk03:{base}", "lacks 'gallery_idx'")
    savemat(str(config), {"filelist": names, "train_idx": [[2]], "query_idx": [[1]], "gallery_idx": [[1]]})
    refused(f"cuhk03:{base}", "train_idx goes from 2 to 2 of 1 files")
    names[0, 0] = "holiday.png"
    savemat(str(config), {"filelist": names, "train_idx": [[1]], "query_idx": [[1]], "gallery_idx": [[1]]})
    refused(f"cuhk03:{base}", "names 'holiday.png'", "1_001_1_01.png")


def test_lists_and_labels_of_veri(tmp_path):
    base = reid_trees.veri(tmp_path)
    (base / "name_query.txt").write_text("0002_c002_00030600_0.jpg\n0002_c002_00099999_0.jpg\n")
    refused(f"veri:{base}", "1 of the 2 images", "0002_c002_00099999_0.jpg (line 2)")
    (base / "name_query.txt").unlink()
    (base / "keypoint_train.txt").write_text("a.jpg 1 2 8\n")
    refused(f"veri:{base}", "keypoint_train.txt", "line 1", "0 to 7")
    (base / "keypoint_train.txt").unlink()
    (base / "train_label.xml").write_text("<Items><Item/></Items>")
    refused(f"veri:{base}", "train_label.xml", "imageName, colorID and typeID")


def test_options(tmp_path):
    base = reid_trees.market(tmp_path)
    refused("market1501:", '"market1501:DIR"', kind=ConfigError)
    refused(f"market1501:{base}?held_ou=0.2", 'Did you mean "held_out"', kind=ConfigError)
    refused(f"market1501:{base}?held_out", "expected options as in", kind=ConfigError)
    refused(f"market1501:{base}?held_out=1", "from 0 to below 1", kind=ConfigError)
    refused(f"market1501:{base}?held_out=0&held_out=0", "twice", kind=ConfigError)
    refused(f"market1501:{base}?distractors=more", "there is no folder", kind=ConfigError)
    assert not len(open_source(f"market1501:{base}?held_out=0", "validation", image_size=(8, 4), resize="squash"))
    picture(base / "extra" / "holiday.jpg")
    refused(f"market1501:{base}?distractors=extra", "0000_c1s1_000001_00.jpg", "holiday.jpg")


def test_ones_own_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(f"reid_folder:{tmp_path}/empty", "No images in")
    base = tmp_path / "own"
    for i in range(4):
        picture(base / f"{i}_c1_0.png")
    picture(base / "holiday.png")
    refused(f"reid_folder:{base}", "1 image of 5 do not fit", "holiday.png", "images.csv")
    refused(f"reid_folder:{base}?pattern=(", "is not a regular expression", kind=ConfigError)
    refused(f"reid_folder:{base}?pattern=(?P<who>.)", "(?P<identity>…)", kind=ConfigError)
    refused(f"reid_folder:{base}?pattern=(?P<identity>..)(?P<view>.).*", "a view is a whole number", "0_c1_0.png")
    (base / "holiday.png").unlink()
    refused(f"reid_folder:{base}?test=0.0001", "all 4 identities fall into the training part")
    refused(f"reid_folder:{base}?test=0.5&seed=x", "a whole number", kind=ConfigError)
    picture(tmp_path / "half" / "train" / "a_c1_0.png")
    refused(f"reid_folder:{tmp_path}/half", "lacks query, gallery")
    picture(tmp_path / "half" / "test" / "b_c1_0.png")
    refused(f"reid_folder:{tmp_path}/half?seed=3", 'the option "seed" has no meaning', kind=ConfigError)
    refused(f"reid_folder:{tmp_path}/half", "the gallery part has no images")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["expected a header", "nothing"]),
        ("path,identiti\na.png,1", ["line 1", 'Did you mean "identity"']),
        ("path,identity\na.png", ["line 2", "1 cells, expected 2"]),
        ("path,identity\na.png,", ["line 2", "no identity"]),
        ("path,identity,camera\na.png,1,", ["line 2", "no camera"]),
        ("path,identity,split\na.png,1,trian", ["line 2", 'Did you mean "train"']),
        ("path,identity,view\na.png,1,left", ["line 2", "a view is a whole number", '"left"']),
        ("path,identity\nb.png,1", ["1 of the 1 images", "b.png (line 2)"]),
        ("path,identity\na.png,1\na.png,1", ["line 3", "is already in line 2"]),
        ("path,identity,split\na.png,1,test\nc.png,1,query", ["both a test part and queries"]),
    ],
)
def test_ones_own_csv(tmp_path, text, fragments):
    picture(tmp_path / "a.png")
    picture(tmp_path / "c.png")
    (tmp_path / "images.csv").write_text(text)
    refused(f"reid_folder:{tmp_path}", str(tmp_path), *fragments)
    refused(f"reid_folder:{tmp_path}?pattern=x", "leave out the option pattern", kind=ConfigError)


GOOD = {
    "jpeg": np.zeros(4, np.uint8),
    "offsets": np.array([0, 2, 4]),
    "pid": np.array([1, 2]),
    "camera": np.array([1, 2]),
    "split": np.array([0, 1]),
}


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"pid": None}, "lacks pid"),
        ({"camera": np.array([1.0, 2.0])}, "camera is float64"),
        ({"pid": np.array([1])}, "pid is int64 (1,)"),
        ({"offsets": np.array([0, 3, 5])}, "offsets do not cut"),
        ({"split": np.array([0, 2])}, "split holds [0, 2]"),
        ({"split": np.array([0, 0])}, "the query part has no images"),
        ({}, "the query part has no images"),
    ],
)
def test_packed_sets(tmp_path, change, fragment):
    arrays = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    np.savez(tmp_path / "set.npz", **arrays)
    refused(f"reid_npz:{tmp_path}/set.npz", fragment)


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        ([f"cam{c}/{i}.png" for c in (1, 2) for i in range(9)], ("named as cameras", "nothing below them")),
        (
            [f"{place}/person{i}/{n}.png" for place in ("north", "south") for i in range(9) for n in (0, 1)],
            ("hold folders of the same names (person0,", "pattern=(?P<camera>[^/]+)/(?P<identity>[^/]+)/.*"),
        ),
    ],
)
def test_folders_of_cameras_are_no_identities(tmp_path, names, fragments):
    for number, name in enumerate(names):
        picture(tmp_path / name, number)
    refused(f"reid_folder:{tmp_path}", *fragments)
    for camera in ("north", "south"):
        if (tmp_path / camera).is_dir():
            source = open_source(
                f"reid_folder:{tmp_path}?pattern=(?P<camera>[^/]%2B)/(?P<identity>[^/]%2B)/.*".replace("%2B", "+"),
                "test",
                image_size=(8, 4),
            )
            assert source.cameras == 2 and all(name.startswith("person") for name in source.class_names)


def test_days_below_identities_are_no_identities(tmp_path):
    """Few folders that repeat below many are no sign of cameras."""
    for number, name in enumerate(f"person{i}/day{d}/{n}.png" for i in range(9) for d in (1, 2) for n in (0, 1)):
        picture(tmp_path / name, number)
    (tmp_path / "person1" / "readme.txt").write_text("x")
    source = open_source(f"reid_folder:{tmp_path}", "test", image_size=(8, 4))
    assert all(name.startswith("person") for name in source.class_names)
    assert "Names read as IDENTITY/….jpg." in source.note and "Ignored 1 entry below" in source.note


def test_packed_sets_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("DREP_DATA", raising=False)
    refused("reid_npz:no.npz", "There is no file no.npz", "DREP_DATA")
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    refused(f"reid_npz:{tmp_path}/bad.npz", "cannot be read")
    np.savez(tmp_path / "set.npz", **GOOD)
    refused(f"reid_npz:{tmp_path}/set.npz?seed=1", 'needs the option "test"', kind=ConfigError)
    refused(f"reid_npz:{tmp_path}/set.npz?gallery=some", '"others" or "all"', kind=ConfigError)


def test_no_message_has_loose_ends(tmp_path):
    with pytest.raises(DataError) as caught:
        open_source(f"duke:{reid_trees.market(tmp_path)}", "test", image_size=(8, 4))
    assert not re.search(r"\s\s|\{|\}| $", str(caught.value))
