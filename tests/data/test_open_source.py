"""The registry: unknown names, and what every source promises."""

import numpy as np
import pytest

from drep_jax.data import SOURCES, Source, open_source
from drep_jax.data.splits import SPLITS, plan
from drep_jax.errors import ConfigError, DataError


@pytest.mark.parametrize("spec", ["digits", "random:40:10"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_source_keeps_the_protocol(spec, split):
    source = open_source(spec, split, image_size=(9, 7))
    assert isinstance(source, Source)
    item = source[len(source) - 1]
    assert item["image"].shape == (9, 7, 3) and item["image"].dtype == np.uint8
    assert item["label"].dtype == np.int32 and 0 <= item["label"] < source.num_classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "digist"}, 'Did you mean "digits"'),
        ({"spec": "tdfs:cifar10"}, 'Did you mean "tfds"'),
        ({"split": "validaton"}, 'Did you mean "validation"'),
        ({"resize": "crip"}, 'Did you mean "crop"'),
        ({"image_size": (0, 8)}, r"\(0, 8\)"),
        ({"image_size": (8,)}, "height, width"),
        ({"spec": "folder"}, "folder:DIR"),
    ],
)
def test_bad_arguments_say_what_was_meant(change, message):
    arguments = {"spec": "digits", "split": "train", "image_size": (8, 8), **change}
    with pytest.raises(ConfigError, match=message):
        open_source(arguments.pop("spec"), arguments.pop("split"), **arguments)


def test_the_registry_offers_the_documented_sources():
    plain = {"digits", "folder", "idx", "list", "npz", "random", "tfds"}
    masks = {"ade20k", "camvid", "cityscapes", "coco_stuff", "seg_folder", "seg_npz", "seg_tfds", "voc"}
    reid = {"cuhk03", "duke", "market1501", "msmt17", "reid_folder", "reid_npz", "reid_tfds", "vehicleid", "veri"}
    boxes = {"coco", "det_folder", "det_npz", "det_voc"}
    assert set(SOURCES) == plain | masks | boxes | reid


@pytest.mark.parametrize(
    "stored",
    [{"train"}, {"train", "test"}, {"train", "validation"}, {"train", "validation", "test"}],
)
def test_the_three_parts_never_overlap(stored):
    taken = []
    for split in SPLITS:
        part = plan(stored, split, "set")
        assert part.stored in stored
        taken += [(part.stored, tenth) for tenth in range(part.start, part.stop)]
    assert len(taken) == len(set(taken)), "two parts share images"
    assert len(taken) == 10 * len(stored), "some images belong to no part"
    assert plan(stored, "test", "set").stored == ("test" if "test" in stored else sorted(stored)[-1])
    if len(stored) < 3:
        assert "set" in plan(stored, "train", "set").note


def test_without_train_there_is_nothing_to_learn_from():
    assert plan({"validation"}, "test", "set").stored == "validation"
    with pytest.raises(DataError, match="set has no train split"):
        plan({"validation"}, "train", "set")
