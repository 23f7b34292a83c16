"""Data sets for re-identification as TFDS data sets: prepared without TensorFlow, and the same as their folders."""

import sys
from pathlib import Path

import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.data.prepare import main, prepare
from drep_jax.errors import ConfigError, DataError
from tests import reid_trees

CASES = {
    "market1501": ("market1501", reid_trees.market, ""),
    "duke": ("duke", reid_trees.duke, ""),
    "msmt17": ("msmt17", lambda root: reid_trees.msmt17(root, 2), ""),
    "cuhk03": ("cuhk03/detected", lambda root: reid_trees.cuhk03(root, "mat", "detected"), "?boxes=detected"),
    "vehicleid": ("vehicleid", reid_trees.vehicleid, "?size=800"),
    "veri": ("veri", reid_trees.veri, ""),
}


def both(name, tmp_path, split, prepared, option):
    options = {"image_size": (8, 4), "resize": "squash"}
    folder = open_source(f"{name}:{tmp_path}/original{option}", split, **options)
    return folder, open_source(f"reid_tfds:{prepared}", split, data_dir=str(tmp_path / "tfds"), **options)


@pytest.mark.parametrize("name", CASES)
def test_a_prepared_set_is_its_folder(tmp_path, name, capsys):
    prepared, tree, option = CASES[name]
    tree(tmp_path / "original")
    arguments = [prepared, f"--manual_dir={tmp_path}/original", f"--data_dir={tmp_path}/tfds"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"--config.data.source=reid_tfds:{prepared}" in printed and "tensorflow" not in sys.modules
    assert main(arguments[::2]) == 0, "what is prepared needs no original"
    for split in ("train", "validation", "test"):
        folder, stored = both(name, tmp_path, split, prepared, option)
        assert stored.class_names == folder.class_names and stored.note == folder.note
        for what in ("protocol", "cameras", "views"):
            assert getattr(stored, what) == getattr(folder, what)
        assert set(stored.table) == set(folder.table)
        for column, values in folder.table.items():
            assert stored.table[column].dtype == np.int32 and stored.table[column].tolist() == values.tolist()
        for index in range(len(folder)):
            assert (stored[index]["image"] == folder[index]["image"]).all()
            assert stored.raw(index)["image"] == Path(folder.raw(index)["image"]).read_bytes()


def test_what_cannot_be_prepared_or_read(tmp_path, monkeypatch):
    base = reid_trees.market(tmp_path / "original")
    data_dir = str(tmp_path / "tfds")
    with pytest.raises(DataError, match=r"--manual_dir=DIR; none was given"):
        prepare("market1501", data_dir)
    with pytest.raises(DataError, match="nowhere is no directory or empty"):
        prepare("market1501", data_dir, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="This is Market-1501, expected DukeMTMC-reID"):
        prepare("duke", data_dir, str(base))
    with pytest.raises(ConfigError, match=r'no configuration "labelled"\. Did you mean "labeled"'):
        prepare("cuhk03/labelled", data_dir, str(base))
    with pytest.raises(ConfigError, match='which "cifar10" is not'):
        prepare("cifar10", data_dir, str(base))
    with pytest.raises(ConfigError, match='Did you mean "market1501"'):
        prepare("market150", data_dir)
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    with pytest.raises(DataError, match=r"drep_jax\.data\.prepare market1501 --manual_dir"):
        open_source("reid_tfds:market1501", "test", image_size=(8, 4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is no directory or empty"):
        prepare("market1501", data_dir, str(tmp_path / "empty"))
    assert prepare("market1501", data_dir, str(base)).startswith(f"{data_dir}/market1501/1.0.0: ")
    assert len(open_source("reid_tfds:market1501", "test", image_size=(8, 4))) == 10
