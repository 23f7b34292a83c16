"""Sets of images with boxes: what each reader gives, how boxes follow the image, and every malformed input."""

import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from drep_jax.data import Source, open_source
from drep_jax.data.collate import collate, item_of, read
from drep_jax.data.columns import follow
from drep_jax.data.folder import tenth
from drep_jax.data.geometry import Transform
from drep_jax.data.objects import READERS, object_columns
from drep_jax.errors import ConfigError, DataError

SIZE = (20, 30)
OPTIONS = {"image_size": (10, 10), "resize": "squash"}


def picture(number=0, size=SIZE):
    return np.full((*size, 3), 40 + 10 * number, np.uint8)


def save(path, number=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number, size)).save(path)


def annotation(number, image, box, category=7, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 11.0, "iscrowd": 0, **more}


def instances(prefix="a"):
    """Three images: two objects with a crowd, none, and a crowd alone."""
    return {
        "images": [
            {"id": 5 + n, "file_name": f"{prefix}{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in range(3)
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [
            annotation(1, 5, [3, 2, 6, 10]),
            annotation(2, 5, [0, 0, 31.5, 8], category=9),
            annotation(3, 5, [1, 1, 0, 5]),
            annotation(4, 5, [10, 10, 5, 5], iscrowd=1, area=9.0),
            annotation(8, 7, [0, 0, 30, 20], iscrowd=1),
        ],
    }


def coco(root, content=None, folder="train2017", split="train"):
    for n in range(3):
        save(root / folder / f"a{n}.png", n)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content or instances()))
    return root


def val_of(root):
    """A validation split beside it, so that train is whole."""
    content = {**instances("v"), "annotations": []}
    for n in range(3):
        save(root / "val2017" / f"v{n}.png", n)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def test_coco(tmp_path):
    val_of(coco(tmp_path))
    source = open_source(f"coco:{tmp_path}", "test", **OPTIONS)
    assert isinstance(source, Source) and len(source) == 3 and source.stored == "validation"
    assert source.class_names == ("cat", "dog") and source.category_ids == (7, 9) and source.num_classes == 2
    assert "3 of 3 images have no object" in source.note
    everything = READERS["coco"].read(tmp_path, {}).splits["train"]
    image = everything[0]
    assert image.image_id == 5 and image.name == "a0.png" and image.size == SIZE
    assert image.boxes.tolist() == [[3, 2, 9, 12], [0, 0, 30, 8], [10, 10, 15, 15]]
    assert image.classes.tolist() == [0, 1, 0] and image.crowd.tolist() == [False, False, True]
    assert image.area.tolist() == [11, 11, 9]
    assert not len(everything[1].boxes) and everything[2].crowd.all()
    remarks = READERS["coco"].read(tmp_path, {}).remarks
    assert remarks[0].startswith("1 boxes of no area") and remarks[1].startswith("1 boxes that reach beyond")


def test_labels_follow_the_image_into_a_batch(tmp_path):
    """Squashed from 20 x 30 to 10 x 10 pixels: boxes go along, the area stays, and the transform leads back."""
    for n in range(3):
        save(tmp_path / "test" / f"a{n}.png", n)
    (tmp_path / "test.json").write_text(json.dumps(instances()))
    for n in range(3):
        save(tmp_path / "train" / f"a{n}.png", n)
    (tmp_path / "train.json").write_text(json.dumps(instances()))
    source = open_source(f"det_folder:{tmp_path}", "test", **OPTIONS)
    assert source.stored == "test" and source.objects.tolist() == [2, 0, 0]
    assert "1 of 3 images have no object, and 1 only crowds" in source.note
    columns = object_columns(capacity=4)
    batch = collate([item_of(source, index, columns) for index in range(3)], columns)
    assert batch["image"].shape == (3, 10, 10, 3) and batch["boxes"].dtype == np.float32
    assert batch["objects_valid"].sum(axis=1).tolist() == [3, 0, 1]
    np.testing.assert_allclose(batch["boxes"][0, 0], [1, 1, 3, 6])
    assert batch["classes"].tolist() == [[0, 1, 0, -1], [-1] * 4, [0, -1, -1, -1]]
    assert batch["crowd"].dtype == bool and batch["crowd"][0].tolist() == [False, False, True, False]
    assert batch["area"][0, 0] == 11 and batch["image_id"].tolist() == [5, 6, 7]
    assert batch["original_size"].tolist() == [list(SIZE)] * 3
    back = Transform.from_row(batch["transform"][0]).inverse().boxes(batch["boxes"][0, :3])[0]
    np.testing.assert_allclose(back, [[3, 2, 9, 12], [0, 0, 30, 8], [10, 10, 15, 15]], atol=1e-5)
    flipped = follow({**source.raw(0)}, Transform(SIZE).flip(), columns, "here")
    np.testing.assert_allclose(flipped["boxes"][0], [21, 2, 27, 12])
    assert source[1]["boxes"].shape == (0, 4) and source.size_of(0) == (10, 10)
    assert source.original_size_of(0) == SIZE
    assert read(source, np.array([0, 2]), columns)["index"].tolist() == [0, 2]


def change(**changes):
    content = instances()
    content.update(changes)
    return content


def with_annotation(*more, **changes):
    return change(annotations=[annotation(1, 5, [3, 2, 6, 10]), *more], **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            with_annotation(annotation(2, 5, [3, 2, -6, 10])),
            r"annotation 2 is \(3, 2, -3, 12\).*width or height is negative",
        ),
        (with_annotation(annotation(2, 5, [25, 2, 10, 10])), r"annotation 2 .* lies outside the image of 20 x 30"),
        (with_annotation(annotation(2, 5, [-9, 2, 10, 10])), "lies outside the image"),
        (with_annotation(annotation(2, 5, [float("nan"), 2, 1, 1])), "not finite numbers"),
        (with_annotation(annotation(2, 5, [1, 2, 1])), r'"bbox": \[1, 2, 1\]; expected x, y, width, height'),
        (with_annotation(annotation(0, 5, [1, 2, 1, 1])), "annotation id 0; they start at 1"),
        (with_annotation(annotation(1, 6, [1, 2, 1, 1])), "the annotation id 1 is there twice"),
        (with_annotation(annotation("2", 6, [1, 2, 1, 1])), "\"id\": '2'; expected a whole number"),
        (with_annotation(annotation(2, 99, [1, 2, 1, 1])), "is of image 99, which is none of its 3 images"),
        (with_annotation(annotation(2, 5, [1, 2, 1, 1], category=1)), "the category 1, which it does not list"),
        (change(images=[*instances()["images"], instances()["images"][0]]), "the image id 5 is there twice"),
        (change(categories=[*instances()["categories"], {"id": 7, "name": "x"}]), "category id 7 is there twice"),
        (change(categories=[]), '"categories" is empty'),
        (
            instances("b"),
            r"3 of its 3 images are not in .*\(b0.png, b1.png, b2.png\).*Is it the file of another split\?",
        ),
        ({"images": []}, 'has no list of "annotations"|"images" is empty'),
        ([], "is a JSON list"),
    ],
)
def test_malformed_json_is_refused(content, message, tmp_path):
    root = coco(tmp_path)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        open_source(f"coco:{root}", "train", **OPTIONS)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not COCO"):
        open_source(f"coco:{tmp_path}", "train", **OPTIONS)
    root = coco(tmp_path)
    (root / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        open_source(f"coco:{root}", "train", **OPTIONS)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(instances()))
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(instances()))
    with pytest.raises(DataError, match=r"There is no folder .*val2017"):
        open_source(f"coco:{root}", "train", **OPTIONS)
    coco(root, change(categories=[{"id": 7, "name": "cow"}, {"id": 9, "name": "dog"}]), "val2017", "val")
    with pytest.raises(DataError, match=r"list different categories, such as \[\(7, 'cat'\), \(7, 'cow'\)\]"):
        open_source(f"coco:{root}", "train", **OPTIONS)
    (root / "annotations" / "instances_val2014.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"annotations of 2014, 2017: choose by \?year=2017"):
        open_source(f"coco:{root}", "train", **OPTIONS)
    with pytest.raises(ConfigError, match='no option "yaer"'):
        open_source(f"coco:{root}?yaer=2017", "train", **OPTIONS)


def test_images_of_another_size_than_annotated(tmp_path):
    coco(tmp_path, folder="test2017")
    (tmp_path / "annotations" / "instances_train2017.json").rename(tmp_path / "test.json")
    (tmp_path / "test2017").rename(tmp_path / "test")
    source = open_source(f"det_folder:{tmp_path}", "test", **OPTIONS)
    save(tmp_path / "test" / "a0.png", 0, (30, 20))
    with pytest.raises(
        DataError, match=r"30 x 20 pixels .* annotations are for 20 x 30\. They are of the image before"
    ):
        source[0]
    assert source[1]["image"].shape == (10, 10, 3)


@pytest.mark.parametrize(
    "layout", ["images/{split}/{name}", "{split}/images/{name}", "{split}/{name}", "images/{name}"]
)
def test_text_files_beside_the_images(layout, tmp_path):
    split = "val"
    for n in range(2):
        save(tmp_path / layout.format(split=split, name=f"p{n}.png"), n)
    text = tmp_path / layout.format(split=split, name="p0.txt").replace("images", "labels")
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.2 0.2 0.9\n0 0.2 0.2 0.4 0.2 0.4 0.6 0.2 0.6\n0 0.5 0.5 0 0.1\n")
    (tmp_path / "data.yaml").write_text("path: .\nnames:\n  0: cat\n  1: 'dog'\nnc: 2\n")
    listed = READERS["det_folder"].read(tmp_path, {})
    images = listed.splits["validation" if "{split}" in layout else "train"]
    expected = [[12, 6, 18, 14], [0, 0, 6, 4], [6, 4, 12, 12]]
    np.testing.assert_allclose(images[0].boxes, expected, atol=1e-9)
    np.testing.assert_allclose(images[0].area, [48, 24, 48], rtol=1e-6)
    assert images[0].classes.tolist() == [1, 0, 0] and not len(images[1].boxes)
    assert listed.class_names == ("cat", "dog")
    assert any("1 images without a text file" in remark for remark in listed.remarks)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", "line 1 has 4 numbers"),
        ("cat 0.5 0.5 0.2 0.2", "expected the number of a class"),
        ("0 15 10 6 8", "fractions, from 0 to 1. These look like pixels"),
        ("0 0.5 0.5 -0.2 0.2", "width or height is negative"),
        ("0 nan 0.5 0.2 0.2", "not finite"),
        ("2 0.5 0.5 0.2 0.2", r"the class 2 is none of the 2 \(0 to 1\)"),
        ("-1 0.5 0.5 0.2 0.2", "the class -1 is none"),
    ],
)
def test_malformed_text_is_refused(line, message, tmp_path):
    save(tmp_path / "images" / "p.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "p.txt").write_text(line)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=message):
        READERS["det_folder"].read(tmp_path, {})


@pytest.mark.parametrize(
    "text",
    [
        "nc: 2\nnames: [cat, 'hot dog']\ntrain: x\n",
        "names:\n- cat\n- hot dog\ntrain: x\n",
        'names:   # of the classes\n    0: cat\n    1: "hot dog"\nnc: 2',
        "names: [\n  cat,\n  hot dog\n]\n",
    ],
)
def test_names_of_classes_in_yaml(text, tmp_path):
    save(tmp_path / "images" / "p.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "p.txt").write_text("1 0.5 0.5 0.2 0.2")
    (tmp_path / "data.yaml").write_text(text)
    assert READERS["det_folder"].read(tmp_path, {}).class_names == ("cat", "hot dog")


def test_folders_without_annotations(tmp_path):
    with pytest.raises(DataError, match="There is no directory"):
        READERS["det_folder"].read(tmp_path / "absent", {})
    save(tmp_path / "p.png")
    with pytest.raises(DataError, match="holds 1 images and no annotations of them"):
        READERS["det_folder"].read(tmp_path, {})
    image = {"id": 5, "file_name": "p.png", "height": 20, "width": 30}
    content = change(images=[image], annotations=[annotation(1, 5, [3, 2, 6, 10])])
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    assert READERS["det_folder"].read(tmp_path, {}).splits["train"][0].boxes.tolist() == [[3, 2, 9, 12]]


def pascal(root, *, objects="", names=("a", "b"), size="<size><width>30</width><height>20</height></size>"):
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        save(root / "JPEGImages" / f"{name}.jpg", number)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (root / "ImageSets/Main/val.txt").write_text("\n".join(names))
    return root


def entry(name="cat", box=(1, 2, 30, 20), more=""):
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def test_pascal_voc(tmp_path):
    objects = entry() + entry("dog", (5, 5, 5, 6), "<difficult>1</difficult>")
    pascal(tmp_path / "VOCdevkit/VOC2012", objects=objects)
    source = open_source(f"det_voc:{tmp_path}", "test", **OPTIONS)
    raw = source.raw(0)
    assert raw["boxes"].tolist() == [[0, 1, 30, 20], [4, 4, 5, 6]]  # from 1, both ends included
    assert raw["ignore"].tolist() == [False, True] and raw["area"].tolist() == [570, 2]
    assert [source.class_names[place] for place in raw["classes"]] == ["cat", "dog"] and source.num_classes == 20
    assert source.objects.tolist() == [1, 1] and source.image_ids.tolist() == [1, 2]
    pascal(tmp_path / "VOCdevkit/VOC2007")
    with pytest.raises(DataError, match=r"VOC2007, VOC2012: name one of them, or choose by \?year=2012"):
        open_source(f"det_voc:{tmp_path}", "test", **OPTIONS)
    assert len(open_source(f"det_voc:{tmp_path}?year=2007", "test", **OPTIONS)) == 2
    with pytest.raises(DataError, match="is not Pascal VOC"):
        open_source(f"det_voc:{tmp_path / 'VOCdevkit/VOC2007/JPEGImages'}", "test", **OPTIONS)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (entry("kat"), '"kat" is none of the 20 classes .* Did you mean "cat"'),
        (entry(box=(9, 2, 3, 20)), "width or height is negative"),
        (entry(box=(1, 2, 50, 20)), "outside the image of 20 x 30"),
        (entry(box=(1, "", 3, 20)), "ymin is ''; expected a number"),
        (entry(box=("nan", 1, 3, 20)), "not finite"),
        ("<object>", "cannot be read as XML"),
    ],
)
def test_malformed_xml_is_refused(objects, message, tmp_path):
    with pytest.raises(DataError, match=message):
        READERS["det_voc"].read(pascal(tmp_path, objects=objects), {})


def test_pascal_voc_with_files_missing_or_without_sizes(tmp_path):
    pascal(tmp_path, objects=entry(box=(1, 2, 50, 20)), size="")
    source = open_source(f"det_voc:{tmp_path}", "test", **OPTIONS)
    with pytest.raises(DataError, match=r"the box \(0, 1, 50, 20\): it lies outside"):
        source[0]
    (tmp_path / "JPEGImages/b.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of its 2 images are not in .*JPEGImages \(b.jpg\)"):
        READERS["det_voc"].read(tmp_path, {})


def packed(tmp_path, **changes):
    pictures = []
    for number in range(3):
        with io.BytesIO() as file:
            Image.fromarray(picture(number)).save(file, "PNG")
            pictures.append(np.frombuffer(file.getvalue(), np.uint8))
    arrays = {
        "png": np.concatenate(pictures),
        "png_offsets": np.cumsum([0, *map(len, pictures)]),
        "box_image": np.array([2, 0, 2]),
        "box_class": np.array([1, 0, 0]),
        "box_cxcywh": np.array([[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 1, 1]], np.float32),
        "box_class_names": np.array(["cat", "dog"]),
        "split": np.array([1, 0, 1]),
        "image_id": np.array([30, 20, 10]),
        "mask_png": np.zeros(3, np.uint8),
        **changes,
    }
    path = tmp_path / "set.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_part_of_its_training_images_is_held_out(tmp_path):
    path = packed(tmp_path, split=np.array([0, 0, 1]), image_id=np.array([3, 20, 10]))
    whole = READERS["det_npz"].read(path, {}).splits
    parts = READERS["det_npz"].read(path, {"held_out": "0.5"}).splits
    assert {name: len(images) for name, images in whole.items()} == {"train": 2, "validation": 1}
    assert [image.image_id for image in parts["test"]] == [10], "the validation split is the test then"
    held = [image.image_id for image in parts.get("validation", ())]
    assert sorted(held + [image.image_id for image in parts.get("train", ())]) == [3, 20]
    assert held == [number for number in (3, 20) if tenth(pathlib.Path(str(number))) >= 5]
    for text in ("x", "1", "0.25"):
        with pytest.raises(ConfigError, match=f"held_out={text}: expected tenths"):
            READERS["det_npz"].read(path, {"held_out": text})


def test_one_file_of_images_with_boxes(tmp_path):
    path = packed(tmp_path)
    source = open_source("det_npz:set.npz", "test", data_dir=str(tmp_path), **OPTIONS)
    assert source.image_ids.tolist() == [30, 10] and source.class_names == ("cat", "dog")
    np.testing.assert_allclose(source.raw(1)["boxes"], [[12, 6, 18, 14], [0, 0, 30, 20]], atol=1e-5)
    assert source.raw(1)["classes"].tolist() == [1, 0] and source[1]["image"][0, 0, 0] == 60
    pixels = packed(tmp_path, box_cxcywh=None, box_xyxy=np.array([[1.0, 2, 3, 4]] * 3))
    assert READERS["det_npz"].read(pixels, {}).splits["train"][0].boxes.tolist() == []
    assert path == pixels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"png": None}, "lacks .*jpeg"),
        ({"box_class_names": None}, "lacks box_class_names"),
        ({"box_class": np.array([2, 0, 0])}, "the class 2 is none of the 2"),
        ({"box_image": np.array([3, 0, 0])}, "names image 3; there are 3"),
        ({"box_image": np.array([0, 0])}, "differ in number"),
        ({"image_id": np.array([1, 1, 2])}, "image id 1 is there twice"),
        ({"split": np.array([0, 1, 3])}, "one split"),
        ({"png_offsets": np.array([0, 0, 9, 10])}, "does not divide"),
        ({"box_cxcywh": np.full((3, 4), np.nan)}, "not finite"),
        ({"box_cxcywh": np.full((3, 4), 2.0)}, "lies outside the image"),
    ],
)
def test_malformed_files_are_refused(changes, message, tmp_path):
    with pytest.raises(DataError, match=message):
        READERS["det_npz"].read(packed(tmp_path, **changes), {})


def test_absent_and_damaged_files(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        READERS["det_npz"].read(tmp_path / "absent.npz", {})
    (tmp_path / "set.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="cannot be read"):
        READERS["det_npz"].read(tmp_path / "set.npz", {})
    one = packed(tmp_path, split=np.array([1, 1, 1]))
    with pytest.raises(DataError, match=re.escape("has no train split")):
        open_source(f"det_npz:{one}", "train", **OPTIONS)
