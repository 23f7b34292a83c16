"""Accuracy by nearest neighbours, and a whole run on merged sources with damaged images."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from drep_jax import weights
from drep_jax.data.unreadable import keep_records, summary
from drep_jax.errors import ConfigError
from drep_jax.evaluation import knn
from drep_jax.jobs import checks, train
from drep_jax.report import console_table
from drep_jax.run.setup import build
from tests import trees
from tests.tiny_config import get_config


def test_hits_against_a_plain_search():
    rng = np.random.default_rng(0)
    gallery = {"features": rng.normal(size=(70, 5)), "labels": rng.integers(0, 6, 70)}
    queries = {
        "features": rng.normal(size=(1100, 5)) * rng.uniform(0.01, 100, (1100, 1)),
        "labels": rng.integers(0, 6, 1100),
    }
    expected = []
    for feature, label in zip(queries["features"], queries["labels"], strict=True):
        cosines = gallery["features"] @ feature / np.linalg.norm(gallery["features"], axis=1)
        expected.append(gallery["labels"][np.argmax(cosines)] == label)
    found = knn.hits(gallery["features"], gallery["labels"], queries["features"], queries["labels"])
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float64 and 0.1 < found.mean() < 0.3


def test_features_that_are_no_numbers_are_never_right():
    gallery = {"features": np.array([[np.nan, 1], [0, 0], [1, 1]]), "labels": np.array([3, 3, 4])}
    queries = {"features": np.array([[1, 1], [np.inf, 0], [0, 0], [-1, -1]]), "labels": np.array([4, 4, 4, 4])}
    assert knn.hits(gallery["features"], gallery["labels"], queries["features"], queries["labels"]).tolist() == [
        1,
        0,
        0,
        1,
    ]
    nothing = {"features": np.full((2, 2), np.nan), "labels": np.array([4, 4])}
    assert knn.hits(nothing["features"], nothing["labels"], queries["features"], queries["labels"]).tolist() == [
        0,
        0,
        0,
        0,
    ]


def small_config():
    """One block of random weights: nothing here asks for good features."""
    config = get_config()
    config.model.update({"depth": 1})
    config.backbone.steps = config.control.steps = 0
    config.learner = "closed_form"  # compiles less
    config.denoise.update({"batch_size": 16, "steps": 1, "moment_images": 64})
    config.evaluate.update({"conditions": ("clean",), "latency_batch": 2, "certificate_images": 2})
    config.latency_rounds = 1
    return config


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Setup and random variables of the small network, and the same as a file."""
    setup = build(small_config().to_dict())
    variables = dict(jax.jit(setup.backbone.init)(jax.random.key(0), np.zeros(setup.images.shape, np.float32)))
    path = str(tmp_path_factory.mktemp("backbone") / "backbone.safetensors")
    weights.save_safetensors(path, variables)
    return setup, variables, path


def test_features_are_what_the_head_reads(backbone):
    setup, variables, _ = backbone
    assert setup.others == ()
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    features = trees.outputs(setup.headless, variables, images)
    head = variables["params"]["head"]
    logits = trees.outputs(setup.backbone, variables, images)
    np.testing.assert_allclose(
        np.asarray(features) @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), logits, atol=1e-5
    )


@pytest.fixture(scope="module")
def merged(backbone, tmp_path_factory):
    """A run on digits, a labelled folder with damaged images, and an unlabelled list."""
    root = tmp_path_factory.mktemp("merged")
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 30), ("test", 40)):
        for i in range(count):
            path = root / "shades" / split / ("dark", "light")[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 100, (9, 9), np.uint8) + np.uint8(140 * (i % 2))).save(path)
            if i in (3, 8):
                path.write_bytes(b"no image")
    test = sorted((root / "shades" / "test").glob("*/[123]*.png"))
    (root / "list.txt").write_text("\n".join(str(path.relative_to(root)) for path in test))
    config = small_config()
    config.data.merge = ((f"folder:{root}/shades", 0.5), (f"list:{root}/list.txt", 0.1))
    config.data.max_unreadable = 8.0
    config.backbone.init_from = backbone[2]
    config = config.to_dict()
    directory = str(root / "run")
    return config, directory, train.run(config, directory)


@pytest.mark.slow
def test_a_merged_run_learns_from_all_and_evaluates_each(merged):
    config, directory, report = merged
    setup = build(config)
    assert setup.train.num_classes is None and len(setup.train) == 1600
    name = config["data"]["merge"][0][0]
    source = report["sources"][name]
    assert list(report["sources"]) == [name] and source["gallery"] == 60
    head = report["metrics"]
    assert source["metrics"].keys() == head.keys() and head["clean"]["n"] == 600
    for condition, entry in source["metrics"].items():
        assert entry["n"] == 38, "without the damaged ones"
        for part in ("control", "denoised", "difference", "interval", "mcnemar"):
            assert entry[part].keys() == head[condition][part].keys()
        assert entry["baseline"]["acc@1"] > 70, "bright and dark are told apart by anything"
    told = report["unreadable"]
    assert told["train"]["count"] == 2 and told[f"test of {name}"]["count"] == 2 and told["test"]["count"] == 0
    assert json.loads(pathlib.Path(directory, "report.json").read_text())["sources"].keys() == report["sources"].keys()
    written = [pathlib.Path(directory, f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html")]
    for text in (console_table(report), *written):
        assert "nearest neighbor among 60 of its training images" in text
        assert "(train): 2 of 1600 (at most 8 are allowed)" in text and "03.png" in text
    keep_records(directory, setup.parts)
    assert summary(setup.parts) == told, "a resumed run has not read the images again"


def test_stages_with_labels_are_refused_on_a_mixture():
    config = get_config()
    config.data.merge = (("random:50:4", 1.0),)
    config = config.to_dict()
    with pytest.raises(ConfigError, match=r"Stage backbone trains with labels, but digits \+ random:50:4 has none"):
        checks.check(config, build(config))
