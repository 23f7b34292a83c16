"""Sources of images with masks: layouts, what stored values become, and what the user is told."""

import numpy as np
import pytest
from PIL import Image

from drep_jax.data import Source, open_source
from drep_jax.data.augment import Augmentation
from drep_jax.data.collate import item_of, read, read_augmented
from drep_jax.data.labels import check_range, check_scorable, described, labeled_maps
from drep_jax.data.masks.names import ADE20K_CLASSES, CITYSCAPES_CLASSES, COCO_CATEGORIES, voc_colors
from drep_jax.data.masks.source import LABEL
from drep_jax.data.merged import MergedSource
from drep_jax.data.source import Subset, original_sizes_of, sizes_of
from drep_jax.data.unreadable import tolerating
from drep_jax.errors import DataError
from tests import mask_trees as trees

OPEN = {"image_size": trees.SIZE, "resize": "exact"}

# kind ↦ (tree, what is behind the name, classes, labels of the stripes, a class and its label, words of the note)
SETS = {
    "ade20k": (trees.ade20k, "", 150, (255, 0, 149), ("flag", 149), "(reduce_zero_label)"),
    "cityscapes": (trees.cityscapes, "", 19, (255, 0, 18), ("bicycle", 18), "all others are ignored"),
    "voc": (trees.voc, "", 21, (0, 20, 255), ("background", 0), "The background, 0, is a class"),
    "coco_stuff": (trees.coco_stuff, "", 171, (0, 170, 255), ("wood", 170), "255 is ignored"),
    "camvid": (trees.camvid, "", 11, (0, 10, 255), ("Bicyclist", 10), "11 is ignored"),
    "seg_folder": (trees.own, "", 2, (0, 1, 255), ("car", 1), "255 is ignored"),
}
VARIANTS = {
    "ade20k, reduced already": ("ade20k", {"values": (0, 149, 255)}, "?reduce_zero=no", (0, 149, 255)),
    "cityscapes, train ids": ("cityscapes", {"kind": "labelTrainIds", "values": (0, 18, 255)}, "", (0, 18, 255)),
    "coco_stuff, train ids": (
        "coco_stuff",
        {"values": (0, 170, 255), "ending": "_labelTrainIds", "folder": "annotations"},
        "",
        (0, 170, 255),
    ),
    "reduce_zero": ("seg_folder", {"values": (0, 1, 2)}, "?reduce_zero=yes", (255, 0, 1)),
    "no value ignored": ("seg_folder", {"values": (0, 255), "classes": "0 a\n255 b\n"}, "?ignore=none", (0, 1)),
    "table of values": ("seg_folder", {"values": (7, 3, 9), "classes": "7 a\n3 b\n"}, "?ignore=9", (0, 1, 255)),
    "by number": ("seg_folder", {"classes": None}, "?classes=2", (0, 1, 255)),
}


def opened(kind, root, split="train", options="", **changes):
    return open_source(f"{kind}:{root}{options}", split, **(OPEN | changes))


def first_row(source, labels):
    """The label of each stripe of the first item."""
    row = source[0]["label"][0]
    return tuple(row[(2 * place + 1) * len(row) // (2 * len(labels))] for place in range(len(labels)))


@pytest.mark.parametrize("kind", SETS)
def test_public_layouts_and_folders_are_read(kind, tmp_path):
    make, options, classes, labels, (name, number), words = SETS[kind]
    make(tmp_path)
    source = opened(kind, tmp_path, "train", options)
    assert isinstance(source, Source) and source.num_classes == len(source.class_names) == classes
    assert source.class_names[number] == name and len(source.palette) in (0, classes)
    item = source[0]
    assert item["label"].dtype == np.uint8 and item["label"].shape == item["image"].shape[:2] == trees.SIZE
    assert first_row(source, labels) == labels
    assert words in source.note and "in % of the pixels" in source.note and "% ignored" in source.note
    np.testing.assert_array_equal(sizes_of(source), original_sizes_of(source))
    if kind != "seg_folder":
        test = opened(kind, tmp_path, "test")
        expected = {"camvid": "test"}.get(kind, "validation")
        assert test.stored == expected and test.num_classes == classes


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_values_become_labels_as_the_options_say(variant, tmp_path):
    kind, changes, options, labels = VARIANTS[variant]
    SETS[kind][0](tmp_path, **changes)
    assert first_row(opened(kind, tmp_path, options=options), labels) == labels


def test_names_and_colors_are_whole():
    assert len(set(ADE20K_CLASSES)) == 150 and len(set(COCO_CATEGORIES)) == 182 and len(CITYSCAPES_CLASSES) == 19
    assert voc_colors(21)[15] == (192, 128, 128) and len(set(voc_colors(21))) == 21


def test_colors_become_classes_by_a_table(tmp_path):
    colors = np.array([[128, 64, 128], [0, 0, 142], [0, 0, 0]], np.uint8)
    masks = {f"im{number}": colors[trees.stripes((0, 1, 2))] for number in range(2)}
    trees.own(tmp_path, classes="128,64,128 road\n0,0,142 car\n0,0,0 ignored\n", masks=masks)
    source = opened("seg_folder", tmp_path)
    assert first_row(source, (0, 1, 255)) == (0, 1, 255)
    for number in range(2):  # with a palette, colors count in the same way
        file = tmp_path / "masks" / f"im{number}.png"
        Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=3).save(file)
    assert first_row(opened("seg_folder", tmp_path), (0, 1, 255)) == (0, 1, 255)
    assert source.class_names == ("road", "car") and source.palette == ((128, 64, 128), (0, 0, 142))


def test_gray_and_16_bit_and_rgb_files_with_small_equal_values_are_read(tmp_path):
    values = trees.stripes((0, 1, 255))
    masks = {"im0": values.astype(np.uint16), "im1": np.repeat(values[..., None], 3, axis=2)}
    trees.own(tmp_path, masks=masks, count=2)
    source = opened("seg_folder", tmp_path)
    for index in range(len(source)):
        assert set(np.unique(source[index]["label"])) == {0, 1, 255}


def test_splits_may_lack_masks_and_lie_inside_or_outside(tmp_path):
    files = {"classes.txt": "a\nb\n"}
    for split in ("train", "val"):
        files[f"images/{split}/x/one.jpg"] = trees.picture(1)
    files["masks/val/x/one_mask.png"] = trees.stripes((0, 1))
    trees.write(tmp_path / "outside", files)
    train = opened("seg_folder", tmp_path / "outside", options="?suffix=_mask")
    assert train.num_classes is None and train.columns == () and "label" not in train[0] and "No labels" in train.note
    assert opened("seg_folder", tmp_path / "outside", "test", "?suffix=_mask").num_classes == 2
    trees.own(tmp_path / "inside" / "train", classes=None)
    assert opened("seg_folder", tmp_path / "inside", options="?classes=2").num_classes == 2


def test_one_file_holds_images_masks_and_clusters(tmp_path):
    trees.packed(tmp_path / "a.npz", has_mask=np.array([True, False, True, True]))
    source = opened("camvid", tmp_path / "a.npz")
    assert len(source) == 1 and "1 images without a mask are left out" in source.note and source.num_classes == 11
    assert first_row(source, (0, 10, 255)) == (0, 10, 255) and "Clusters for intervals: block:30" in source.note
    other = opened("seg_npz", tmp_path / "a.npz", "test")
    assert other.class_names[-1] == "c10" and other.clusters is None and len(other) == 1


@pytest.mark.parametrize(("how", "clusters"), [("video", [0, 1]), ("block:1", [0, 1]), ("frame", None)])
def test_frames_of_a_video_are_a_cluster(how, clusters, tmp_path):
    trees.camvid(tmp_path)
    source = opened("camvid", tmp_path, "test", f"?cluster={how}")
    assert len(source) == 2, "the list names two of three"
    assert (None if source.clusters is None else source.clusters.tolist()) == clusters
    chosen = tolerating(Subset(source, [1]), 1)
    assert (None if chosen.clusters is None else chosen.clusters.tolist()) == (clusters and clusters[1:])
    assert chosen.columns == (LABEL,) and len(chosen.palette) == 11


def test_stages_without_such_labels_decode_no_mask(tmp_path):
    trees.own(tmp_path, count=3)
    source = opened("seg_folder", tmp_path)
    (tmp_path / "masks" / "im0.png").write_bytes(b"no image any more")
    (tmp_path / "masks" / "im1.png").write_bytes(b"no image any more")
    (tmp_path / "masks" / "im2.png").write_bytes(b"no image any more")
    everything = np.arange(len(source))
    crops = Augmentation(scale=(0.5, 2.0), flip=True)
    assert set(read(source, everything)) == {"image", "index"}
    assert "label" not in read_augmented(source, everything, crops, seed=0, first_position=0)
    assert "label" not in MergedSource([source], [1.0])[0]
    for read_masks in (lambda: read(source, everything, (LABEL,)), lambda: opened("seg_folder", tmp_path)):
        with pytest.raises(DataError, match=r"Cannot read the mask .*im\d\.png"):
            read_masks()
    tolerant = tolerating(source, len(source))
    assert tolerant.columns == (LABEL,)
    with pytest.raises(DataError, match="None of the"):
        read(tolerant, everything, (LABEL,))
    assert len(tolerant.reasons) == len(source), "an unreadable mask is an unreadable image"


def test_labels_are_known_to_be_masks_before_anything_is_decoded(tmp_path):
    trees.own(tmp_path)
    source = opened("seg_folder", tmp_path)
    check_scorable(source, columns=(LABEL,))
    with pytest.raises(DataError, match="maps of the pixels"):
        check_scorable(source)
    assert described({"train": source})["train"] | {"notes": []} == {
        "source": source.name,
        "images": len(source),
        "classes": 2,
        "unlabeled": None,
        "notes": [],
    }
    masks = np.array([[[0, 1]], [[255, 255]]], np.uint8)
    assert labeled_maps(masks).tolist() == [True, False]
    check_range(masks, 2, "a set")
    with pytest.raises(DataError, match=r"1 of 2 images hold values outside 0 … 0, such as 1 of image 7"):
        check_range(masks, 1, "a set", np.array([7, 8]))


def test_masks_follow_their_image_to_any_size(tmp_path):
    trees.own(tmp_path, values=(0, 1, 1, 255))
    for resize, expected in (("crop", [0, 1, 1, 255]), ("pad", [0, 1, 1, 255])):
        source = opened("seg_folder", tmp_path, image_size=(3, 4) if resize == "crop" else (4, 4), resize=resize)
        label = source[0]["label"]
        np.testing.assert_array_equal(label[:3], [expected] * 3)
        assert (label[3:] == 255).all(), "padding is ignored"
        item = item_of(source, 0, (LABEL,))
        np.testing.assert_array_equal(item["transform"].mask(trees.stripes((0, 1, 1, 255))), label)
