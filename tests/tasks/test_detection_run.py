"""The whole job by task detection: learn, fuse, certify, evaluate, report; and a public network on real pictures."""

import json
import os
import pathlib

import numpy as np
import pytest

from configs import yolo_fastest_coco
from drep_jax import report
from drep_jax.evaluation.arms import items_of, score_arms
from drep_jax.jobs import evaluate, train
from drep_jax.jobs.scores import reading
from drep_jax.report.plots.boxes import plot_boxes
from drep_jax.run.backbone import read_weights
from drep_jax.run.run import Run
from drep_jax.run.setup import build
from drep_jax.training.logging import MetricWriter
from tests.boxes import CLASSES
from tests.tasks.cases import QUICK, detection

CONDITION = "gaussian:60"


@pytest.mark.slow
def test_the_whole_job(tmp_path):
    changes = {
        **QUICK,
        "learner": "measured",
        "compare": ("closed_form", "label_augmented", "distilled"),
        "noise": CONDITION,
        "backbone.steps": 250,
        "data.flip": True,
        "denoise.batch_size": 8,
        "measured.images": 8,
        "detection.examples": 3,
        "log_every": 10,
    }
    config = detection(tmp_path, **changes)
    directory = str(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PLOTS", {"boxes": plot_boxes})
        content = train.run(config, directory)
    report.validate(report.plain(content))
    assert content["certificate"]["passed"]
    assert content["learning"]["measured"]["chosen"]["criterion"] == "AP"
    for entry in content["metrics"].values():
        assert entry["n"] == 10 and set(entry["baseline"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
        for pair, difference in entry["difference"].items():
            for metric, value in difference.items():
                low, high = entry["interval"][pair][metric]
                assert low <= high and low - 3 <= value <= high + 3
    assert content["metrics"]["clean"]["baseline"]["APl"] > 8, "it has learned nothing"
    lines = [json.loads(line) for line in pathlib.Path(directory, "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["stage"] == "backbone"]
    assert {"class_loss", "objectness_loss", "xy_loss", "wh_loss"} <= trained[0].keys()
    assert trained[-1]["loss"] < trained[0]["loss"] / 2
    boxes = content["boxes"]
    assert boxes["arms"] == ["baseline", "measured"] and boxes["classes"] == list(CLASSES) and len(boxes["images"]) == 3
    text = pathlib.Path(directory, "report.md").read_text(encoding="utf-8")
    page = pathlib.Path(directory, "report.html").read_text(encoding="utf-8")
    assert "10 images with 30 objects: 10 small, 10 medium, 10 large" in text and "plots/boxes.png" in text
    assert page.count("data:image/png;base64") == 1
    again, _ = evaluate.evaluate(config, directory)
    for condition, entry in content["metrics"].items():
        assert again["metrics"][condition]["denoised"]["measured"] == pytest.approx(entry["denoised"]["measured"])


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DREP_DATA"), reason="needs the pictures and weights of DREP_DATA")
def test_a_public_network_has_its_average_precision_on_real_pictures(tmp_path):
    config = yolo_fastest_coco.get_config().to_dict()
    setup = build(config)
    assert [len(part) for part in (setup.train, setup.held_out, setup.test)] == [101, 27, 128]
    writer = MetricWriter(str(tmp_path))
    variables = read_weights(Run(config, setup, str(tmp_path), writer), config["backbone"]["init_from"])
    writer.close()
    ((_, rows),) = score_arms(setup, {"baseline": variables}, setup.test, ("clean",), **reading(config))
    items = items_of(setup, setup.test, rows, "clean")["baseline"]
    values = {
        name: 100 * float(metric(items.statistics, np.ones(128))) for name, metric in setup.task.defined(items).items()
    }
    assert values["AP"] == pytest.approx(22.0, abs=0.3) and values["AP50"] == pytest.approx(43.1, abs=0.6)
    assert not items.left_out
