"""Masks of the TFDS catalog: a small data set of the form of the pets, prepared as array_record."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from drep_jax.data import open_source
from drep_jax.data.collate import read
from drep_jax.data.masks.source import LABEL
from drep_jax.errors import DataError
from tests import mask_trees as trees

COUNT = 12


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    stream.seek(0)
    return stream


class TinyMasks(tfds.core.GeneratorBasedBuilder):
    """Pictures with trimaps: 1 pet, 2 background, 3 border."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1), use_colormap=True),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(COUNT)), "test": self._generate_examples(range(3))}

    def _generate_examples(self, numbers):
        for number in numbers:
            mask = trees.stripes((1, 2, 3, 1 + number % 2))
            yield number, {"image": png(trees.picture(number)), "segmentation_mask": png(mask)}


def test_masks_of_the_catalog_are_read_and_coded(tmp_path):
    TinyMasks(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    (tmp_path / "tiny_masks").rename(tmp_path / "oxford_iiit_pet")
    options = {"image_size": trees.SIZE, "resize": "exact", "data_dir": str(tmp_path)}
    train, test = (open_source("seg_tfds:oxford_iiit_pet", split, **options) for split in ("train", "test"))
    assert len(train) == COUNT * 9 // 10 and len(test) == 3 and test.stored == "test"
    assert (
        train.class_names == ("pet", "background") and "all others" not in train.note and "3 is ignored" in train.note
    )
    batch = read(train, np.arange(len(train)), (LABEL,))
    assert set(np.unique(batch["label"])) == {0, 1, 255} and (batch["label"][:, :, 4] == 255).all()
    assert train.raw(0)["where"] == "seg_tfds:tiny_masks/1.0.0, train[0:10] 0, image"
    with pytest.raises(DataError, match="not prepared"):
        open_source("seg_tfds:cityscapes/semantic_segmentation", "train", **options)
