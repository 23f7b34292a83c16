"""Masks that cannot be used: each is refused with the place, what is wrong and the way out, before anything is learned."""

import numpy as np
import pytest

from drep_jax.data import open_source
from drep_jax.errors import ConfigError, DataError
from tests import mask_trees as trees

WIDE = trees.stripes((0, 1, 255), (6, 9))


def opened(spec, split="train", **changes):
    return open_source(spec, split, **({"image_size": trees.SIZE, "resize": "exact"} | changes))


def every(mask, count=2):
    return {f"im{number}": mask for number in range(count)}


def colored(count=5):
    return np.random.default_rng(0).integers(0, count, (*trees.SIZE, 3), np.uint8) * 50


# name ↦ (arguments of trees.own, options, words of the message)
OWN = {
    "mask and image of different sizes": (
        {"masks": every(WIDE)},
        "",
        r"im0\.png is 6 x 9 pixels .*image .*im0\.png is 6 x 8",
    ),
    "a turned mask": ({"masks": every(WIDE[:, :8].T.copy())}, "", "is 8 x 6 pixels .* EXIF orientation"),
    "RGB": ({"masks": every(colored())}, "", r'in RGB, \d+ colors such as .*"R,G,B NAME"'),
    "RGB with a color that the table lacks": (
        {"masks": every(colored()), "classes": "0,0,0 a\n50,0,0 b\n"},
        "",
        r"colors that classes\.txt lacks, such as",
    ),
    "16 bits": (
        {"masks": every(WIDE[:, :8].astype(np.uint16) * 1000)},
        "",
        "16 bits and values up to",
    ),
    "a class beyond the names": ({"values": (0, 1, 2)}, "", r"holds 2 \(.* reduce_zero=yes; if 2 does, ignore=2"),
    "several values beyond": ({"values": (0, 1, 40, 50)}, "", r"holds 40, 50 .*ignore=40,50, or list all classes"),
    "all void": ({"values": (255,)}, "", r"none of the \d masks looked at has a pixel with a class.*255: 100"),
    "reduced too much": ({"values": (0, 255)}, "?reduce_zero=yes", "none of the .*correct reduce_zero or ignore"),
    "an object stored as 255": ({"values": (0, 255)}, "", "'0 background' and '255 object'.*ignore=none"),
    "classes that are not told": (
        {"classes": None},
        "",
        r"the values 0, 1, 255\. Write .*\?classes=2, or \?classes=1&reduce",
    ),
    "too many classes": ({"classes": None}, "?classes=256", "classes=256 is a number of classes, from 1 to 255"),
    "two numbers of classes": ({}, "?classes=3", "has 2 lines, but the option classes=3"),
    "no line": ({"classes": "# nothing\n"}, "", "names no classes"),
    "a line without a color": ({"classes": "0,0,0 a\nb\n"}, "", '"b" has no color'),
    "a color twice": ({"classes": "0,0,0 a\n0,0,0 b\n"}, "", "color 0,0,0 is beyond 255 or there twice"),
    "values and reduce_zero": ({"classes": "1 a\n2 b\n"}, "?reduce_zero=yes", "reduce_zero has no meaning"),
    "colors and reduce_zero": ({"classes": "0,0,0 a\n"}, "?reduce_zero=yes", "leave out reduce_zero"),
    "a class that is ignored": ({"classes": "1 a\n1 b\n"}, "", "different numbers from 0 to 255"),
    "what is ignored": ({}, "?ignore=x", 'ignore=x is stored values .*"none"'),
    "yes or no": ({}, "?reduce_zero=1", "reduce_zero=1 is yes or no"),
    "an option": ({}, "?ignored=0", 'no option "ignored".*Did you mean "ignore"'),
    "a folder of masks": ({}, "?images=pictures", r"has no folder pictures: .*It has images, masks"),
}


@pytest.mark.parametrize("name", OWN)
def test_own_masks_that_cannot_be_used_are_refused(name, tmp_path):
    arguments, options, words = OWN[name]
    trees.own(tmp_path, **arguments)
    with pytest.raises((DataError, ConfigError), match=f"(?s){words}"):
        opened(f"seg_folder:{tmp_path}{options}")


def test_pairs_that_are_not_there_are_counted_and_listed(tmp_path):
    trees.own(tmp_path, count=9)
    for number in range(7):
        (tmp_path / "masks" / f"im{number}.png").unlink()
    trees.save(tmp_path / "masks" / "stray.png", WIDE)
    with pytest.raises(
        DataError, match=r"7 of 9 images have no mask \(im0, im1, im2, im3, im4 and 2 more\), and 1 of 3 .*stray"
    ):
        opened(f"seg_folder:{tmp_path}")
    trees.save(tmp_path / "images" / "im8.jpg", trees.picture())
    with pytest.raises(DataError, match=r"both im8\.jpg and im8\.png"):
        opened(f"seg_folder:{tmp_path}")
    with pytest.raises(DataError, match="There is no directory"):
        opened(f"seg_folder:{tmp_path / 'other'}")


def test_a_mask_saved_as_jpeg_is_refused(tmp_path):
    trees.own(tmp_path, count=2)
    for number in range(2):
        (tmp_path / "masks" / f"im{number}.png").unlink()
        trees.save(tmp_path / "masks" / f"im{number}.jpg", WIDE[:, :8])
    with pytest.raises(DataError, match="is a JPEG, which changes values"):
        opened(f"seg_folder:{tmp_path}")


# name ↦ (source, how its tree is made, options, words)
PUBLIC = {
    "ADE20K in full": (
        "ade20k",
        lambda root: trees.write(root, {"images/training/a/abbey/ADE_train_00000001_seg.png": trees.picture()}),
        "",
        r"the full ADE20K.*ADE_train_00000001_seg\.png.*ADEChallengeData2016\.zip",
    ),
    "another folder for ADE20K": (
        "ade20k",
        lambda root: trees.write(root, {"photos/a.txt": "x"}),
        "",
        r"not laid out as ADEChallengeData2016 .*it has photos",
    ),
    "ADE20K that was reduced": (
        "ade20k",
        lambda root: trees.ade20k(root, (0, 149, 255)),
        "",
        "holds 255 .*reduce_zero=no",
    ),
    "ADE20K that was not reduced": (
        "ade20k",
        lambda root: trees.ade20k(root, (0, 1, 150)),
        "?reduce_zero=no",
        "holds 150 .*leave the option out",
    ),
    "ADE20K with other names": (
        "ade20k",
        lambda root: trees.write(
            trees.ade20k(root), {"ADEChallengeData2016/objectInfo150.txt": "Idx\tName\n1\twall\n"}
        ),
        "",
        "has 1 classes; expected 150",
    ),
    "Cityscapes instances": (
        "cityscapes",
        lambda root: trees.cityscapes(root, "instanceIds"),
        "",
        "has no masks CITY/…_gtFine_labelIds.png; it has color, instanceIds",
    ),
    "Cityscapes labels": ("cityscapes", trees.cityscapes, "?labels=ids", "labels=ids is labelIds or labelTrainIds"),
    "COCO-Stuff of stuff alone": (
        "coco_stuff",
        lambda root: trees.coco_stuff(root, (92, 183)),
        "",
        "holds 183 .*stuff alone",
    ),
    "COCO-Stuff without masks": (
        "coco_stuff",
        lambda root: trees.coco_stuff(root, folder="pixelmaps"),
        "",
        "expected images/train2017, and masks in stuffthingmaps/train2017",
    ),
    "CamVid with its 32 classes": ("camvid", lambda root: trees.camvid(root, (0, 31)), "", "holds 31 .*of 32 classes"),
    "CamVid clusters": ("camvid", trees.camvid, "?cluster=block:0", 'is "video", "frame" or "block:N"'),
    "a list that names other images": (
        "camvid",
        lambda root: trees.write(trees.camvid(root), {"CamVid/train.txt": "a.png b.png\n"}),
        "",
        r"lists 1 of 1 images that are not in .*such as a",
    ),
    "VOC's list": (
        "voc",
        lambda root: trees.write(trees.voc(root), {"VOC2012/ImageSets/Segmentation/train.txt": "2007_123456\n"}),
        "",
        r"lists 1 of 1 images that are not in .*such as 2007_123456",
    ),
    "VOC without a list": (
        "voc",
        lambda root: (trees.voc(root) / "VOC2012/ImageSets/Segmentation/train.txt").unlink(),
        "",
        "has no list .*train.txt",
    ),
    "VOC without SBD": ("voc", trees.voc, "?aug=yes", "expected JPEGImages, SegmentationClassAug in it"),
    "no folder": ("voc", lambda root: root, "/nothing", "There is no directory"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_sets_that_are_another_one_are_refused(name, tmp_path):
    kind, make, options, words = PUBLIC[name]
    make(tmp_path)
    with pytest.raises((DataError, ConfigError), match=f"(?s){words}"):
        opened(f"{kind}:{tmp_path}{options}")


# name ↦ (arrays of the file, words)
FILES = {
    "no masks": ({"masks": None}, 'holds no masks: expected "masks", or encoded ones in "mask_jpeg"'),
    "no names": ({"class_names": None}, 'names no classes: expected "class_names"'),
    "fewer masks": ({"masks": np.zeros((3, *trees.SIZE), np.uint8)}, "holds 4 images and 3 masks"),
    "floats": ({"masks": np.zeros((4, *trees.SIZE))}, '"masks" is float64'),
    "channels": ({"images": np.zeros((4, *trees.SIZE, 5), np.uint8)}, "which are no images"),
    "a split without a name": ({"split": np.array([0, 1, 2, 3])}, "the split 3 has no name"),
    "an unknown split": (
        {"split_names": np.array(["train", "vall", "test"])},
        'unknown split "vall".*Did you mean "val"',
    ),
    "a short column": ({"frame": np.array(["a"])}, r'"frame" has the shape \(1,\)'),
    "offsets": (
        {"masks": None, "mask_png": np.zeros(9, np.uint8), "mask_offsets": np.array([0, 99])},
        "are absent or do not divide its 9 bytes",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_used_are_refused(name, tmp_path):
    arrays, words = FILES[name]
    path = trees.packed(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=words):
        opened(f"seg_npz:{path}")


def test_a_file_that_is_absent_or_damaged_is_refused(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        opened(f"seg_npz:{tmp_path / 'a.npz'}")
    (tmp_path / "a.npz").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="cannot be read"):
        opened(f"seg_npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scene_parse150", "masks are of instances .*ade20k:DIR"),
        ("voc", "boxes only"),
        ("coco", "coco_stuff:DIR"),
        ("oxford_pet", 'Did you mean "oxford_iiit_pet"'),
    ],
)
def test_catalog_sets_without_such_masks_are_refused(name, words):
    with pytest.raises(ConfigError, match=words):
        opened(f"seg_tfds:{name}")


def test_images_that_are_gray_or_smaller_than_the_crop_are_told(tmp_path):
    trees.own(tmp_path)
    note = opened(f"seg_folder:{tmp_path}", image_size=(12, 8), resize="pad").note
    assert "of these images are smaller than 12 x 8 pixels: random crops pad them" in note
    trees.save(tmp_path / "images" / "im1.png", trees.picture()[..., 0])
    source = opened(f"seg_folder:{tmp_path}")
    assert "1 of these images are gray: they are read as RGB" in source.note and source[0]["image"].shape[2] == 3
    assert "are smaller" not in opened(f"seg_folder:{tmp_path}").note
