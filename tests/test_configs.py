"""Every file in configs/: parsed, its names known, catalogue data (made small, without TensorFlow) read through it."""

import importlib
import io
import itertools
import os
import pathlib
import types

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import choice as choices
from configs import cifar10_training, detection, reid, segmentation
from drep_jax.core.schedule import Schedule, reverse_steps
from drep_jax.data import prepare
from drep_jax.data.augment import augmentation_of
from drep_jax.data.corruptions import parse_spec
from drep_jax.data.datasets import open_images
from drep_jax.data.loader import training_batches
from drep_jax.errors import ConfigError, DataError
from drep_jax.learners import LEARNERS
from drep_jax.models import MODELS, create_model
from drep_jax.models.detectors.base import Detector
from drep_jax.run.stages import stage_of
from drep_jax.tasks import make_task
from drep_jax.training.optimizers import parameter_groups

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "choice", "default", "own_model")
)
# data set, classes, (height, width, channels) as stored, splits, features besides image and label
CATALOGUE = {
    "resnet20_cifar10_tfds": ("cifar10", 10, (32, 32, 3), ("train", "test"), {"id": tfds.features.Text()}),
    "vit_b_cub200": (
        "caltech_birds2011",
        200,
        (None, None, 3),
        ("train", "test"),
        {"bbox": tfds.features.BBoxFeature(), "segmentation_mask": tfds.features.Image(shape=(None, None, 1))},
    ),
    "vit_b_flowers102": ("oxford_flowers102", 102, (None, None, 3), ("train", "validation", "test"), {}),
    "vit_b_pets": (
        "oxford_iiit_pet",
        37,
        (None, None, 3),
        ("train", "test"),
        {"segmentation_mask": tfds.features.Image(shape=(None, None, 1)), "file_name": tfds.features.Text()},
    ),
    "vit_fashion_mnist_tfds": ("fashion_mnist", 10, (28, 28, 1), ("train", "test"), {}),
    **dict.fromkeys(
        ("ldae_vit_b_imagenet", "ldae_vit_l_imagenet"),
        (
            "imagenet2012",
            1000,
            (None, None, 3),
            ("train", "validation"),
            {"file_name": tfds.features.Text()},
        ),
    ),
    "vit_s_imagenet": (
        "imagenet2012",
        1000,
        (None, None, 3),
        ("train", "validation"),
        {"file_name": tfds.features.Text()},
    ),
}
OTHERS = {
    "digits": 10,
    "espnet_camvid": 12,
    "ldae_cifar10": 10,
    "ldae_digits": 10,
    "mcunet_imagenet": 1000,
    "resnet20_cifar10": 10,
    "vit_cifar10": 10,
    "vit_fashion_mnist": 10,
    "yolo_fastest_coco": 80,
}
SEVERAL = ("cifar10_training", "detection", "reid", "reid_pku", "segmentation")
WITH_FILES = ("mcunet_imagenet", "yolo_fastest_coco")
"""Their network and noise are read from the files of DREP_DATA."""
COUNT = 20


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config().to_dict()


@pytest.mark.parametrize("backbone", ["resnet20", "vit"])
@pytest.mark.parametrize("mode", cifar10_training.MODES)
def test_every_way_of_training_has_a_control_of_the_same_budget(mode, backbone):
    config = cifar10_training.get_config(f"{mode}:{backbone}").to_dict()
    assert config["name"] == f"cifar10_{mode}_{backbone}"
    budgets = {(config["control"]["steps"], config["control"]["batch_size"])}
    for learner in {config["learner"], *config["compare"]} - {"closed_form", "final_only", "continued"}:
        budgets.add((stage_of(learner).steps(config), stage_of(learner).batch_size(config)))
    assert len(budgets) == 1 and min(budgets)[0] > 0


@pytest.mark.parametrize("choice", [f"{d}:{b}" for d in ("msmt17", "veri", "vehicleid") for b in reid.BACKBONES])
def test_every_cell_of_the_tables_on_re_identification_can_be_asked_for(choice):
    if choice in ("msmt17:resnet50_views", "vehicleid:resnet50_views"):
        with pytest.raises(ConfigError, match="needs the view of every image"):
            reid.get_config(choice)
        return
    for mode in reid.MODES:
        config = reid.get_config(f"{choice}:{mode}").to_dict()
        task = make_task(config)
        budgets = (
            {(config["control"]["steps"], config["control"]["batch_size"])} if config["control"]["steps"] else set()
        )
        for learner in {config["learner"], *config["compare"]} & {"algorithm1", "label_augmented", "alternating"}:
            budgets.add((stage_of(learner).steps(config), stage_of(learner).batch_size(config)))
        assert len(budgets) <= 1 and all(size == task.identities * task.instances for _, size in budgets)
        assert mode not in choices.LABELED or config["control"]["steps"]
        model = {**config["model"], "num_classes": 5}
        network = create_model(model.pop("name"), image_size=config["data"]["image_size"], **model)
        assert (getattr(network, "branches", 1) == 2) == task.views and hasattr(network, "outputs")
    with pytest.raises(ConfigError, match=r"DATASET:BACKBONE\[:MODE\]"):
        reid.get_config("market1501")


@pytest.mark.parametrize(
    ("dataset", "side", "shift"), [("market1501", "camera", 5), ("veri", "camera+view", 8), ("vehicleid", "", 8)]
)
def test_transreid_is_configured_as_its_published_networks_were_trained(dataset, side, shift):
    config = reid.get_config(f"{dataset}:transreid_b")
    assert (config.retrieval.side, config.model.jigsaw_shift) == (side, shift)
    assert reid.get_config(f"{dataset}:transreid_ssl_b_ics").data.image_size[0] == (384 if shift == 5 else 256)


@pytest.mark.parametrize("backbone", segmentation.BACKBONES)
def test_every_cell_of_the_tables_on_segmentation_can_be_asked_for(backbone):
    for dataset, mode in itertools.product(segmentation.DATASETS, segmentation.MODES):
        config = segmentation.get_config(f"{dataset}:{backbone}:{mode}").to_dict()
        assert make_task(config).fit == config["data"]["test_resize"]
        augmentation_of(config["data"])
        trained = {config["learner"], *config["compare"]} & {"algorithm1", "label_augmented", "alternating"}
        budgets = {(stage_of(name).steps(config), stage_of(name).batch_size(config)) for name in trained}
        if mode in choices.LABELED:
            budgets.add((config["control"]["steps"], config["control"]["batch_size"]))
        assert len(budgets) <= 1
    # mmsegmentation's groups: no decay of norms but those after the stages, ten times the rate in the head
    classes = 21
    model = {**segmentation.get_config(f"voc:{backbone}").model.to_dict(), "num_classes": classes}
    network = create_model(model.pop("name"), image_size=(64, 64), **model)
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    logits, shapes = jax.eval_shape(network.init_with_output, keys, np.zeros((1, 64, 64, 3), np.float32))
    assert jax.tree_util.tree_leaves(logits)[0].shape[-1] == classes
    recipe = segmentation.BACKBONES[backbone]["recipe"]
    if recipe is segmentation.SEGFORMER:
        kept = parameter_groups("no_decay", [(pattern, False) for pattern in recipe["no_decay"]], True)
        assert sum(not decays for decays in jax.tree_util.tree_leaves(kept({"backbone": shapes["params"]}))) == 52
        parameter_groups("rates", recipe["rates"], 1.0)({"backbone": shapes["params"]})
    with pytest.raises(ConfigError, match=r"DATASET:BACKBONE\[:MODE\]"):
        segmentation.get_config("ade20k")


@pytest.mark.parametrize("network", detection.NETWORKS)
def test_every_cell_of_the_table_on_detection_can_be_asked_for(network):
    for dataset, mode in itertools.product(detection.DATASETS, detection.MODES):
        config = detection.get_config(f"{dataset}:{network}:{mode}").to_dict()
        task = make_task(config)
        assert task.fit.startswith("short:") and task.padding == (1 if network == "detr_r50" else 32)
        augmentation_of(config["data"]).check_columns(task.columns)
        trained = {config["learner"], *config["compare"]} & {"algorithm1", "label_augmented", "alternating"}
        budgets = {(stage_of(name).steps(config), stage_of(name).batch_size(config)) for name in trained}
        if mode in choices.LABELED:
            budgets.add((config["control"]["steps"], config["control"]["batch_size"]))
        assert len(budgets) <= 1
        assert (config["backbone"]["steps"] > 0) == (mode == "baseline")
    with pytest.raises(ConfigError, match=r"DATASET:BACKBONE\[:MODE\]"):
        detection.get_config("coco")
    assert network in MODELS
    model = {**detection.get_config(f"coco:{network}").model.to_dict(), "num_classes": 80}
    made = create_model(model.pop("name"), image_size=(64, 64), **model)
    assert isinstance(made, Detector) and made.num_classes == 80
    shapes = jax.eval_shape(made.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    parameter_groups("rates", detection.NETWORKS[network].get("rates", ()), 1.0)({"backbone": shapes["params"]})


def test_the_table_names_every_configuration():
    catalogue = [name for name in FILES if config_of(name)["data"]["source"].startswith("tfds:")]
    assert sorted(CATALOGUE) == catalogue
    assert FILES and set(OTHERS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_names_and_settings_are_known(name):
    if name in WITH_FILES and not os.environ.get("DREP_DATA"):
        pytest.skip(f"configs/{name}.py needs the files of DREP_DATA")
    config = config_of(name)
    assert config["name"] == name or name in SEVERAL
    source = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
    assert f"--config=configs/{name}.py" in source, "its docstring has the command"
    augmentation_of(config["data"])
    for condition in config["evaluate"]["conditions"]:
        parse_spec(condition)
    assert {config["learner"], *config["compare"]} <= set(LEARNERS)
    reverse_steps(Schedule(**config["schedule"]), 1000, 1, config["denoise"]["rule"])
    model = dict(config["model"])
    classes = CATALOGUE[name][1] if name in CATALOGUE else OTHERS.get(name, 10)
    wanted = model.pop("num_classes") or classes
    network = create_model(model.pop("name"), num_classes=wanted, image_size=config["data"]["image_size"], **model)
    assert network.num_classes == classes
    assert len(config["data"]["mean"]) == len(config["data"]["std"]) in (1, 3)


def png(shape):
    height, width = (side or size for side, size in zip(shape[:2], (61, 47), strict=True))
    array = np.random.default_rng(0).integers(0, 256, (height, width, shape[2]), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array if shape[2] == 3 else array[..., 0]).save(stream, "PNG")
    return stream.getvalue()


def catalogue_set(name, root):
    """Writes a small data set of the name, features and splits of a catalogue one."""
    data_set, classes, shape, splits, further = CATALOGUE[name]
    features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=classes),
        **further,
    }
    given = {
        "bbox": tfds.features.BBox(0.1, 0.1, 0.9, 0.8),
        "id": "an id",
        "file_name": "a name",
        "segmentation_mask": io.BytesIO(b"no picture: reading must not look at it"),
    }

    def generate(self, split):
        for i in range(COUNT):
            example = {"image": io.BytesIO(png(shape)), "label": (i * 7) % classes}
            yield i, {**example, **{key: given[key] for key in further}}

    body = {
        "VERSION": tfds.core.Version("3.0.0"),
        "name": data_set,
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features)),
        "_split_generators": lambda self, manager: {split: generate(self, split) for split in splits},
        "_generate_examples": generate,
    }
    builder = types.new_class(
        f"Small{name}",
        (tfds.core.GeneratorBasedBuilder,),
        {"skip_registration": True},
        lambda namespace: namespace.update({**body, "__module__": __name__}),
    )
    builder(data_dir=root).download_and_prepare(file_format="array_record")
    return splits


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_catalogue_sets_are_read_through_their_configuration(name, tmp_path, capfd):
    splits = catalogue_set(name, tmp_path)
    config = config_of(name)
    data = {**config["data"], "data_dir": str(tmp_path)}
    found = open_images(data, head=True, gallery=1, seed=0)
    assert found.num_classes == CATALOGUE[name][1]
    lengths = [len(source) for source in (found.train, found.held_out, found.test)]
    assert lengths == ([COUNT] * 3 if len(splits) == 3 else [COUNT * 9 // 10, COUNT // 10, COUNT])
    assert (found.train.note is None) == (len(splits) == 3)
    batch = next(training_batches(found.train, 4, seed=0, augmentation=augmentation_of(data), num_threads=0))
    assert batch["image"].shape == (4, *data["image_size"], 3) and batch["image"].dtype == np.uint8
    assert found.test[1]["image"].shape == batch["image"].shape[1:] and found.test[1]["label"] < found.num_classes
    assert prepare.main([CATALOGUE[name][0], f"--data_dir={tmp_path}"]) == 0, "nothing is left to do"
    assert f"train {COUNT}" in capfd.readouterr().out


def test_preparing_asks_tfds_for_array_record(tmp_path, monkeypatch, capsys):
    asked = []

    class Builder:
        def download_and_prepare(self, **options):
            asked.append(options)
            catalogue_set("vit_fashion_mnist_tfds", tmp_path)

    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: asked.append((name, data_dir)) or Builder())
    assert prepare.main(["fashion_mnist", f"--data_dir={tmp_path}"]) == 0
    assert asked == [("fashion_mnist", str(tmp_path)), {"file_format": "array_record"}]
    assert f"train {COUNT}, test {COUNT} examples" in capsys.readouterr().out.replace(
        "test 20, train 20", "train 20, test 20"
    )


def test_what_preparing_refuses(tmp_path, monkeypatch, capsys):
    for name, error, said in [
        ("cifra10", ConfigError, 'Did you mean "cifar10"'),
        ("ci far", ConfigError, "NAME/CONFIG"),
        ("imagenet2012", DataError, "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into"),
        ("cifar10", DataError, r"pip install -r requirements-prepare\.txt"),
    ]:
        with pytest.raises(error, match=said):
            prepare.prepare(name, str(tmp_path))
    assert prepare.main(["cifar10", f"--data_dir={tmp_path}"]) == 1
    assert "Error: Preparing a data set needs TensorFlow" in capsys.readouterr().err

    def offline(*arguments, **options):
        raise ConnectionError("no net")

    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds, "builder", offline)
    with pytest.raises(DataError, match=r'Preparing "cifar10" in .* failed: ConnectionError: no net'):
        prepare.prepare("cifar10", str(tmp_path))
