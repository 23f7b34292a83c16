"""Detection: scores in the stored image, pseudo-labels, what is refused, what is said, pictures."""

import dataclasses
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.default import get_default
from drep_jax.data import open_source
from drep_jax.data.collate import read
from drep_jax.data.geometry import Transform
from drep_jax.errors import ConfigError, DataError
from drep_jax.metrics.detection import METRICS, Detected, Truths, statistics_of_lists
from drep_jax.models.detectors.darknet import Darknet
from drep_jax.models.detectors.pasting import paste_masks
from drep_jax.models.detectors.proposals import Objects
from drep_jax.report.plots.boxes import plot_boxes
from drep_jax.tasks.base import Exhibit, Items
from drep_jax.tasks.detection import Detection, Found, make_detection
from drep_jax.tasks.detection_checks import check_detector, check_objects, check_run
from tests.boxes import CFG, CLASSES, write

NET = Darknet(cfg=CFG)
TASK = Detection(shown=3)
STATISTICS = jax.jit(TASK.statistics)
STORED = (120, 200)
TRUTH = np.array([[10.0, 20, 60, 90], [100, 30, 180, 110], [0, 0, 15, 20], [120, 5, 150, 25]])
KINDS = np.array([0, 1, 1, 0])


def found_of(boxes, classes, scores, *, masks=None, left_out=0, nan=False):
    """What a network would give for one image, boxes in pixels of its input."""
    count = len(scores)
    objects = Objects(
        boxes=jnp.asarray(boxes, jnp.float32)[None],
        scores=jnp.asarray(scores, jnp.float32)[None],
        classes=jnp.asarray(classes, jnp.int32)[None],
        valid=jnp.ones((1, count), bool),
        left_out=jnp.asarray([left_out], jnp.int32),
        masks=masks,
    )
    return Found((jnp.full((1, 2, 2, 21), np.nan if nan else 0.5),), objects, NET)


def batch_of(transform, *, area=None, crowd=None):
    """The columns of that image, which follow it."""
    boxes, there = transform.boxes(TRUTH)
    assert there.all()
    sides = TRUTH[:, 2:] - TRUTH[:, :2]
    return {
        "boxes": boxes[None].astype(np.float32),
        "classes": KINDS[None].astype(np.int32),
        "crowd": np.zeros((1, 4), bool) if crowd is None else crowd[None],
        "ignore": np.zeros((1, 4), bool),
        "area": (sides.prod(axis=1) if area is None else area)[None].astype(np.float32),
        "objects_valid": np.ones((1, 4), bool),
        "transform": transform.row()[None],
        "original_size": np.array([transform.size_in], np.int32),
        "index": np.zeros(1, np.int32),
    }


def test_what_is_found_is_scored_in_the_stored_image():
    """Shrunk unequally and padded, with boxes that reach into the padding; areas are those that the set states."""
    transform = Transform(STORED).resize((60, 150)).window(0, 0, 64, 160)
    moved = TRUTH + np.array([[1, 2, 3, 4], [0, 0, 40, 0], [0, 0, 0, 0], [9, 9, 9, 9]])
    boxes, _ = transform.boxes(moved, clip=False)
    scores, classes = [0.9, 0.8, 0.7, 0.6], KINDS
    area = np.array([100.0, 2000, 10000, 50])
    rows = STATISTICS(found_of(boxes, classes, scores), batch_of(transform, area=area))
    back = np.clip(moved, 0, [200, 120] * 2)
    expected = statistics_of_lists(
        Detected(np.zeros(4, int), back, classes, np.array(scores)),
        Truths(np.zeros(4, int), TRUTH, KINDS, None, area),
        images=1,
        num_classes=2,
    )
    assert expected["matched"][0, :, 0].tolist() != [1023] * 4 and expected["truths"][0, :, 1:].sum(
        axis=0
    ).tolist() == [2, 1, 1]
    for name in ("classes", "matched", "ignored", "truths"):
        np.testing.assert_array_equal(rows[name], expected[name], err_msg=name)
    assert int(rows["left_out"][0]) == 0 and int(rows["broken"][0]) == 0


def test_pseudo_labels_are_confident_boxes_and_a_network_agrees_with_itself():
    transform = Transform(STORED).resize((32, 32))
    boxes, _ = transform.boxes(TRUTH)
    found = found_of(boxes, KINDS, [0.9, 0.31, 0.29, 0.1])
    labels = TASK.pseudo_labels(found)
    assert labels["objects_valid"].tolist() == [[True, True, False, False]] and labels["classes"].tolist() == [
        [0, 1, -1, -1]
    ]
    rows = STATISTICS(found, {**batch_of(transform), **labels})
    sides = TRUTH[:2, 2:] - TRUTH[:2, :2]
    assert (sides.prod(axis=1) > 32**2).all() and rows["truths"][0, :, 1].sum() == 0, (
        "their areas are those of their boxes"
    )
    assert METRICS["AP"](rows, np.ones(1)) == pytest.approx(1.0)
    assert TASK.agreement(rows, rows).statistics is rows
    nothing = {**rows, "truths": np.zeros_like(rows["truths"])}
    with pytest.raises(ConfigError, match=r"detection\.confidence=0\.3 or more"):
        TASK.agreement(rows, nothing)


def test_what_went_wrong_is_said():
    transform = Transform(STORED)
    found = found_of(TRUTH, KINDS, [0.9, np.nan, 0.5, 0.4], left_out=17, nan=True)
    rows = jax.tree_util.tree_map(np.asarray, STATISTICS(found, batch_of(transform)))
    assert rows["classes"][0].tolist() == [0, 1, 0, -1], "a score of NaN is none"
    left_out = TASK.items(rows, None, np.zeros(1, int), "").left_out
    assert left_out == {
        "boxes beyond the candidates of the network, which were never looked at (raise model.candidates)": 17,
        "images in which nothing is found, since the outputs hold NaN": 1,
    }


def test_metrics_without_an_object_of_their_size_are_left_out_and_the_protocol_says_so():
    transform = Transform(STORED)
    rows = jax.tree_util.tree_map(
        np.asarray,
        STATISTICS(found_of(TRUTH, KINDS, [0.9, 0.8, 0.7, 0.6]), batch_of(transform, area=np.full(4, 2000.0))),
    )
    items = TASK.items(rows, None, np.zeros(1, int), "")
    assert list(TASK.defined(items)) == ["AP", "AP50", "AP75", "APm"]
    source = types.SimpleNamespace(resize="short:800:1333", has_areas=False)
    text = " ".join(dataclasses.replace(TASK, padding=32).protocol(source, items))
    for part in (
        "1 images with 4 objects: 0 small, 4 medium, 0 large",
        "No object of this set is small or large",
        "areas are of the boxes",
        "resized to 800 pixels, the long one to 1333 at most",
        "padded with 0 after normalizing, to multiples of 32",
        "Intervals resample images",
    ):
        assert part in text, text


def test_masks_are_scored_where_network_and_set_have_any():
    """Right boxes whose masks are half as wide have box AP 1 and mask AP50 at IoU 0.5 only where it is reached."""
    transform = Transform(STORED).resize((60, 100))
    boxes, _ = transform.boxes(TRUTH)
    cells = np.zeros((1, 4, 28, 28), np.float32)
    cells[0, 0], cells[0, 1, :, :18], cells[0, 2, :, :8], cells[0, 3] = 1, 1, 1, 1
    found = found_of(boxes, KINDS, [0.9, 0.8, 0.7, 0.6], masks=jnp.asarray(cells))
    rows = jax.tree_util.tree_map(np.asarray, STATISTICS(found, batch_of(transform)))
    item = {name: batch_of(transform)[name][0] for name in ("classes", "crowd", "ignore", "area")} | {"boxes": TRUTH}
    full = paste_masks(np.ones((4, 28, 28)), TRUTH, STORED)
    source = types.SimpleNamespace(masks=lambda index: full, raw=lambda index: item)
    items = TASK.items(rows, source, np.zeros(1, int), "")
    metrics = TASK.defined(items)
    values = {name: float(metric(items.statistics, np.ones(1))) for name, metric in metrics.items()}
    assert (
        values["AP"] == pytest.approx(1.0)
        and 0.5 < values["mask AP50"] < 1.0
        and values["mask AP"] < values["mask AP50"]
    )
    assert "mask" not in items.statistics, "masks leave the host's memory once they are matched"
    assert "mask AP" not in TASK.defined(
        TASK.items(rows, types.SimpleNamespace(masks=lambda index: None, raw=0), np.zeros(1, int), "")
    )


def test_images_without_objects_are_not_learned_from():
    source = types.SimpleNamespace(objects=np.array([2, 0, 1]))
    assert sorted(TASK.order(source, 0).images) == [0, 2]
    assert TASK.order(types.SimpleNamespace(objects=np.array([2, 1])), 0) is None
    assert TASK.has_label({"classes": np.full((3, 4), -1)}).all()


class Seen:
    """A network that keeps the targets that it is given."""

    def apply(self, variables, images, *, size=None, targets=None):
        self.targets = targets
        return jnp.zeros((len(images), 1))

    def losses(self, outputs, targets, shape, size):
        return {"all": jnp.sum(outputs)}


def with_outlines(folder):
    """Writes a picture of two squares, one within the other, and one without outlines, as COCO has them."""
    square = [[2, 2, 14, 2, 14, 10, 2, 10]]
    objects = [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [2, 2, 12, 8],
            "area": 96,
            "iscrowd": 0,
            "segmentation": square,
        },
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [4, 4, 2, 3], "area": 6, "iscrowd": 0}
        | {"segmentation": [[4, 4, 6, 4, 6, 7, 4, 7]]},
        {"id": 3, "image_id": 2, "category_id": 2, "bbox": [4, 4, 2, 3], "area": 6, "iscrowd": 0},
    ]
    images = [{"id": number, "file_name": f"{number}.png", "width": 16, "height": 12} for number in (1, 2)]
    names = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    for split in ("train", "val", "test"):
        (folder / split).mkdir()
        for image in images:
            Image.fromarray(np.full((12, 16, 3), 90, np.uint8)).save(folder / split / image["file_name"])
        listed = {"images": images, "annotations": objects, "categories": names}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(listed))
    return open_source(f"det_folder:{folder}", "train", image_size=(24, 32), resize="squash")


def test_masks_reach_the_network_as_the_geometry_moves_them(tmp_path):
    source, task, network = with_outlines(tmp_path), dataclasses.replace(TASK, masks=True, capacity=3), Seen()
    place = int(np.flatnonzero(source.image_ids == 1)[0])
    batch = read(source, np.array([place]), task.columns)
    loss, parts = task.loss(task.apply(network, {}, jnp.zeros((1, 24, 32, 3)), batch), batch, 0.0, {})
    assert loss.shape == () and parts.keys() == {"all_loss"}
    masks = np.asarray(network.targets.masks)[0]
    assert masks.shape == (3, 24, 32) and masks[1].sum() == 6 * 4 and not masks[2].any()
    assert masks[0].sum() == (96 - 6) * 4 and not (masks[0] & masks[1]).any(), "the smaller object has its pixels"
    assert masks[1, 8:14, 8:12].all()
    assert read(source, np.array([place]), TASK.columns).keys() == batch.keys() - {"instances", "place"}
    with pytest.raises(DataError, match="an object has no outline, so there is no mask to learn"):
        read(source, np.array([1 - place]), task.columns)
    bare = open_source(write(tmp_path / "bare", counts=(1, 1, 1)), "test", image_size=(32, 32), resize="squash")
    setup = types.SimpleNamespace(others=(), train=bare, held_out=None, backbone=types.SimpleNamespace(masks=True))
    plan = types.SimpleNamespace(section="backbone")
    config = {"learner": "measured", "compare": (), "select": {"labels": False}, "backbone": {}}
    for chosen, said in ((task, "have no outlines"), (TASK, r"learns masks, too: set --config\.detection\.masks=True")):
        with pytest.raises(ConfigError, match=said):
            check_run(chosen, config, setup, (plan,), chooses=False)


# ---------------------------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------------------------


def source_of(classes, crowd=False, num_classes=2, boxes=True):
    item = {"classes": np.array(classes), "crowd": np.full(len(classes), crowd), "ignore": np.zeros(len(classes), bool)}
    item |= {"boxes": np.zeros((len(classes), 4))} if boxes else {}

    class Source:
        name, resize = "a set", "squash"
        image_size = (8, 8)

        def __len__(self):
            return 2

        def raw(self, index):
            return {**item, "where": f"image {index}"}

    Source.num_classes = num_classes
    return Source()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (source_of([0], boxes=False), r"have no boxes\. Give images with boxes: coco"),
        (source_of([0], num_classes=None), r"have no boxes"),
        (source_of([0, 2]), r"image 0: an object has the class 2; expected 0 to 1\. Are numbers of COCO's"),
        (source_of([0, 1], crowd=True), r"only crowds and ignored ones.*annotations of this split\?"),
        (source_of([]), r"no image has an object that counts"),
    ],
)
def test_images_that_cannot_be_scored(source, said):
    with pytest.raises(DataError, match=said):
        check_objects(source, "test images")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"detection.confidence": 1.0}, r"detection\.confidence=1\.0 is a score"),
        ({"detection.padding": 0}, r"detection\.padding=0 must be a whole number of at least 1"),
        ({"detection.objects": -1}, r"detection\.objects=-1"),
        ({"model.num_classes": -1}, r"model\.num_classes=-1 is a backbone without a head"),
    ],
)
def test_settings_out_of_range(changes, said):
    config = get_default().unlock()
    config.task = "detection"
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=said):
        make_detection(config.to_dict())


def test_networks_of_other_classes_or_without_boxes():
    setup = types.SimpleNamespace(backbone=NET, num_classes=3, train=types.SimpleNamespace(name="a set"))
    with pytest.raises(ConfigError, match=r"head of Darknet has 2 classes, and the labels of a set have 3"):
        check_detector(TASK, setup)
    setup.backbone = types.SimpleNamespace(num_classes=3)
    with pytest.raises(ConfigError, match=r"finds no objects: it lacks objects, losses"):
        check_detector(TASK, setup)


def test_settings_that_a_run_would_ignore():
    setup = types.SimpleNamespace(others=(), train=None, held_out=None)
    config = {"learner": "final_only", "compare": (), "select": {"labels": False}}
    with pytest.raises(ConfigError, match="final_only denoises the one final feature"):
        check_run(TASK, config, setup, (), chooses=False)
    plan = types.SimpleNamespace(section="backbone")
    config = {"learner": "measured", "compare": (), "backbone": {"label_smoothing": 0.1}}
    with pytest.raises(ConfigError, match=r"backbone\.label_smoothing"):
        check_run(TASK, config, setup, (plan,), chooses=False)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_pictures_show_what_was_gained_and_lost():
    transform = Transform(STORED).resize((60, 100))
    boxes, _ = transform.boxes(TRUTH)
    columns = {**batch_of(transform), "crowd": np.array([[False, False, False, True]])}
    before, after = (found_of(boxes[keep], KINDS[keep], [0.9] * len(keep)) for keep in ([0, 3], [1, 2, 3]))
    rows = {
        arm: jax.tree_util.tree_map(np.asarray, STATISTICS(each, columns))
        for arm, each in (("a", before), ("b", after))
    }
    exhibit = Exhibit(
        source=types.SimpleNamespace(class_names=CLASSES),
        condition="gaussian:20",
        arms={"a": {}, "b": {}},
        index=np.array([7]),
        statistics=rows,
        look=lambda networks: {},
        picture=lambda index: np.full((60, 100, 3), 90, np.uint8),
        outputs=lambda index: (columns, {"a": before, "b": after}),
        sites=(),
        alone=lambda name: {},
        seed=0,
    )
    shown = TASK.examples(exhibit)
    entry = shown["boxes"]["images"][0]
    assert entry["gained"] == [1, 2] and entry["lost"] == [0], "a crowd is neither"
    assert [one["object"] for one in entry["found"]["b"]] == [1, 2, 3] and shown["boxes"]["improved"] == 1
    assert np.allclose(entry["truth"][1]["box"], TRUTH[1] / [200, 120, 200, 120])
    png = plot_boxes(shown)
    with Image.open(io.BytesIO(png)) as picture:
        colors = {tuple(color) for color in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
        assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colors, "blue, vermilion, green"
    assert plot_boxes({}) is None and dataclasses.replace(TASK, shown=0).examples(exhibit) == {}


def test_boxes_follow_the_images_that_a_run_reads(tmp_path):
    """Read through the source, the truth itself is a perfect answer: geometry there and back."""
    source = open_source(write(tmp_path, counts=(1, 1, 3)), "test", image_size=(32, 32), resize="pad")
    batch = read(source, np.arange(3), TASK.columns)
    objects = Objects(
        boxes=jnp.asarray(batch["boxes"]),
        scores=jnp.where(batch["objects_valid"], 0.9, 0.0),
        classes=jnp.asarray(batch["classes"]),
        valid=jnp.asarray(batch["objects_valid"]),
        left_out=jnp.zeros(3, jnp.int32),
    )
    rows = jax.jit(TASK.statistics)(Found((jnp.zeros((3, 1)),), objects, NET), batch)
    items = Items(jax.tree_util.tree_map(np.asarray, rows))
    values = {name: float(metric(items.statistics, np.ones(3))) for name, metric in TASK.defined(items).items()}
    assert values == pytest.approx(dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 1.0))
