"""TFDS: a real array_record data set made from the digits, mocked ones, and the message when there is none."""

import io
import json
import re
import shutil
import socket
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from drep_jax.data import open_source
from drep_jax.data.loader import training_batches
from drep_jax.data.splits import Part
from drep_jax.data.tfds_source import instruction, prepared_folder
from drep_jax.errors import ConfigError, DataError

DIGITS = load_digits()
GREY = np.round(DIGITS.images * 255 / 16).astype(np.uint8)
TRAIN, TEST = 100, 30


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    stream.seek(0)
    return stream


class TinyDigits(tfds.core.GeneratorBasedBuilder):
    """130 digits; the number of an example is kept in it."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=[f"digit {i}" for i in range(10)]),
            "number": np.int64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(TRAIN)),
            "test": self._generate_examples(range(TRAIN, TRAIN + TEST)),
        }

    def _generate_examples(self, numbers):
        for i in numbers:
            yield i, {"image": png(GREY[i]), "label": int(DIGITS.target[i]), "number": i}


class Withheld(TinyDigits):
    """40 digits in three splits, the last one without labels."""

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(30)),
            "validation": self._generate_examples(range(30, 36)),
            "test": ((i, {**example, "label": -1}) for i, example in self._generate_examples(range(36, 40))),
        }


def test_a_test_split_whose_labels_are_withheld_is_not_scored(tmp_path):
    Withheld(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    options = {"image_size": (8, 8), "data_dir": str(tmp_path)}
    train, test = (open_source("tfds:withheld", split, **options) for split in ("train", "test"))
    assert test.stored == "validation" and len(test) == 6 and len(train) == 27
    assert "The test split of tfds:withheld/1.2.0 has no labels: its validation split serves." in test.note
    assert min(int(test[i]["label"]) for i in range(6)) >= 0 and "90 % train" in train.note


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    TinyDigits(data_dir=root).download_and_prepare(file_format="array_record")
    return root


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def numbers_of(source):
    """Which digits a source holds, by their pixels."""
    table = {GREY[i].tobytes(): i for i in range(TRAIN + TEST)}
    return [table[source[i]["image"][:, :, 0].tobytes()] for i in range(len(source))]


def test_a_prepared_set_is_read_exactly(prepared, no_network):
    parts = {}
    for split in ("train", "validation", "test"):
        source = open_source("tfds:tiny_digits", split, image_size=(8, 8), resize="exact", data_dir=str(prepared))
        parts[split] = numbers_of(source)
        for place, i in enumerate(parts[split]):
            assert source[place]["label"] == DIGITS.target[i] and source[place]["label"].dtype == np.int32
            assert source[place]["image"].shape == (8, 8, 3) and source[place]["image"].dtype == np.uint8
        assert source.num_classes == 10 and source.class_names[3] == "digit 3"
        assert source.name == "tfds:tiny_digits/1.2.0"
        assert ("90 % train" in source.note) if split != "test" else source.note is None
    assert set(parts["test"]) == set(range(TRAIN, TRAIN + TEST))
    assert len(parts["train"]) == 90 and len(parts["validation"]) == 10
    assert set(parts["train"]) | set(parts["validation"]) == set(range(TRAIN))
    assert "tensorflow" not in sys.modules


def test_the_environment_variable_and_the_loader_work_with_it(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    source = open_source("tfds:tiny_digits", "train", image_size=(12, 12))
    batches = training_batches(source, 45, seed=1, num_threads=3)
    epoch = [next(batches) for _ in range(2)]
    assert sorted(np.concatenate([batch["index"] for batch in epoch])) == list(range(90))
    for batch in epoch:
        assert [source[int(i)]["label"] for i in batch["index"]] == batch["label"].tolist()


@pytest.mark.parametrize("spec", ["tfds:imagenet2012", "tfds:cifar10_corrupted/brightness_1"])
def test_an_unprepared_set_says_how_to_provide_it(tmp_path, no_network, spec):
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        open_source(spec, "train", image_size=(8, 8), data_dir=str(tmp_path))
    assert time.monotonic() - start < 2
    message = str(caught.value)
    name = spec.removeprefix("tfds:")
    assert f"python -m drep_jax.data.prepare {name} --data_dir={tmp_path}\n" in message
    assert "pip install -r requirements-prepare.txt" in message
    assert message.count("--config.data.source=folder:DIR") == 2 and "unlabeled" in message
    tars = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", f"{tmp_path}/downloads/manual")
    assert all((tar in message) == (name == "imagenet2012") for tar in tars)
    assert not list(tmp_path.iterdir()), "something was downloaded or written"


def test_unknown_names_are_corrected(tmp_path, no_network):
    with pytest.raises(ConfigError, match='Did you mean "cifar10"'):
        open_source("tfds:cifra10", "train", image_size=(8, 8), data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="tfds:NAME"):
        open_source("tfds:", "train", image_size=(8, 8), data_dir=str(tmp_path))


def test_other_formats_are_refused(prepared, tmp_path):
    shutil.copytree(prepared / "tiny_digits", tmp_path / "tiny_digits")
    info = tmp_path / "tiny_digits" / "1.2.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=r"prepared as tfrecord, not as array_record"):
        open_source("tfds:tiny_digits", "train", image_size=(8, 8), data_dir=str(tmp_path))


def test_versions_and_configurations_are_found(tmp_path):
    def mark(*parts):
        tmp_path.joinpath(*parts).mkdir(parents=True)
        (tmp_path.joinpath(*parts) / "dataset_info.json").write_text("{}")

    assert prepared_folder(tmp_path, "a", "") is None
    mark("a", "2.0.0")
    mark("a", "10.0.0")
    mark("a", "incomplete.XY_11.0.0")
    assert prepared_folder(tmp_path, "a", "").name == "10.0.0"
    mark("b", "small", "1.0.0")
    assert prepared_folder(tmp_path, "b", "") == prepared_folder(tmp_path, "b", "small") == tmp_path / "b/small/1.0.0"
    assert prepared_folder(tmp_path, "b", "large") is None
    mark("b", "large", "1.0.0")
    with pytest.raises(ConfigError, match="tfds:b/large, tfds:b/small"):
        prepared_folder(tmp_path, "b", "")


def test_imagenet_holds_out_ten_thousand():
    size = 1_281_167
    assert instruction("imagenet2012", Part("train", 0, 9), size) == "train[0:1271167]"
    assert instruction("imagenet2012", Part("train", 9, 10), size) == "train[1271167:1281167]"
    assert instruction("imagenet2012", Part("validation"), 50_000) == "validation"
    assert instruction("other", Part("train", 0, 9), 105) == "train[0:94]"
    assert instruction("other", Part("train", 9, 10), 105) == "train[94:105]"


def write_metadata(root, name, splits, features):
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "array_record",
        "splits": [
            {"name": split, "shardLengths": [str(size)], "numBytes": "1", "filepathTemplate": template}
            for split, size in splits.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    tfds.features.FeaturesDict(features).save_config(folder)
    return folder


LABELLED = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=1000)}


@pytest.mark.parametrize("stored", ["png", "array"])
def test_mocked_imagenet_takes_the_right_slices(tmp_path, stored):
    folder = write_metadata(tmp_path, "imagenet2012", {"train": 1_281_167, "validation": 50_000}, LABELLED)
    splits = []

    def examples(self, split, decoders=None, **_):
        splits.append(split)
        pixels = np.full((20, 30, 3), 7, np.uint8)
        return [{"image": png(pixels).getvalue() if stored == "png" else pixels, "label": 999}] * 4

    with tfds.testing.mock_data(as_data_source_fn=examples, data_dir=str(folder)):
        for split in ("train", "validation", "test"):
            source = open_source("tfds:imagenet2012", split, image_size=(16, 16), data_dir=str(tmp_path))
            assert (source[3]["image"] == 7).all() and source[3]["image"].shape == (16, 16, 3)
            assert source[3]["label"] == 999 and source.num_classes == 1000
            if split != "test":
                assert "the last 10,000 of its 1,281,167 train images serve as validation" in source.note
    assert splits == ["train[0:1271167]", "train[1271167:1281167]", "validation"]
    assert "validation split serves" in source.note


def test_damaged_wrongly_sized_and_imageless_sets_are_named(tmp_path):
    folder = write_metadata(
        tmp_path, "mine", {"train": 10, "validation": 5, "test": 5}, {"image": tfds.features.Image()}
    )
    good = png(GREY[0]).getvalue()

    def examples(self, split, **_):
        return [{"image": good}, {"image": good[:50]}]

    with tfds.testing.mock_data(as_data_source_fn=examples, data_dir=str(folder)):
        source = open_source("tfds:mine", "test", image_size=(9, 9), resize="exact", data_dir=str(tmp_path))
    assert source.num_classes is None
    with pytest.raises(DataError, match=re.escape("tfds:mine/1.0.0, test image 0 is 8 x 8")):
        source[0]
    with pytest.raises(DataError, match=re.escape("Cannot read the image tfds:mine/1.0.0, test image 1")):
        source[1]
    write_metadata(tmp_path, "text", {"train": 10}, {"text": tfds.features.Text()})
    with pytest.raises(DataError, match='no feature "image"'):
        open_source("tfds:text", "train", image_size=(9, 9), data_dir=str(tmp_path))
