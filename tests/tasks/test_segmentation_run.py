"""The whole job by task segmentation on colored shapes of two sizes: learn, fuse, certify, evaluate, report."""

import base64
import io
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from drep_jax import report, weights
from drep_jax.data.corruptions import corrupt
from drep_jax.data.resampling import bilinear
from drep_jax.jobs import evaluate, train
from drep_jax.jobs.fuse import load_run
from drep_jax.report.plots.overlays import plot_overlays
from tests.command import same_bits
from tests.label_maps import CLASSES, VOID
from tests.tasks.cases import segmentation

CONDITION = "gaussian:60"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    changes = {
        "learner": "closed_form",
        "compare": ("measured",),
        "denoise.batch_size": 8,
        "denoise.time_scale": 30.0,
        "noise": CONDITION,
        "backbone.steps": 60,
        "backbone.batch_size": 8,
        "backbone.learning_rate": 2e-2,
        "control.steps": 2,
        "control.batch_size": 8,
        "measured.images": 8,
        "measured.vectors": 20,
        "select.strengths": (0.0, 1.0),
        "evaluate.batch_size": 8,
        "evaluate.certificate_images": 2,
        "segmentation.examples": 3,
        "segmentation.auxiliary_weight": 0.4,
        "log_every": 20,
    }
    config = segmentation(folder, **changes)
    directory = str(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PLOTS", {"overlays": plot_overlays})
        yield config, directory, train.run(config, directory)


def test_the_job_is_done_by_its_metrics(run):
    _, directory, content = run
    report.validate(report.plain(content))
    assert content["certificate"]["passed"]
    chosen = content["learning"]["measured"]["chosen"]
    assert chosen["criterion"] == "mIoU"
    for entry in content["metrics"].values():
        assert entry["n"] == 12 and entry["mcnemar"] == {}
        assert set(entry["baseline"]) == {"mIoU", "mAcc", "aAcc", "B-IoU"}
        for pair, difference in entry["difference"].items():
            for metric, value in difference.items():
                low, high = entry["interval"][pair][metric]
                assert low <= high and low - 3 <= value <= high + 3
    assert content["metrics"]["clean"]["baseline"]["mIoU"] > 60, "it has learned nothing"
    lines = [json.loads(line) for line in pathlib.Path(directory, "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["stage"] == "backbone"]
    assert {"accuracy", "auxiliary_loss"} <= trained[0].keys() and trained[-1]["loss"] < trained[0]["loss"] / 2


def test_scores_are_those_of_a_loop_over_stored_images(run):
    """At their own sizes, with logits enlarged and counted image by image in NumPy."""
    config, directory, content = run
    job, variables, _ = load_run(directory)
    setup = job.setup
    fused = weights.load(f"{directory}/fused/fused.safetensors", setup.abstract, allow_fused=True)
    assert not same_bits(fused, variables)
    folder = pathlib.Path(config["data"]["source"].partition(":")[2])
    networks = {"baseline": variables, "closed_form": fused}
    counts = {name: np.zeros((len(CLASSES), 3)) for name in networks}
    apply, sizes = jax.jit(setup.backbone.apply), set()
    for number, path in enumerate(sorted((folder / "images" / "test").iterdir())):
        image = np.asarray(Image.open(path))[None]
        label = np.asarray(Image.open(folder / "masks" / "test" / path.name))
        sizes.add(label.shape)
        seen = setup.inputs({"image": corrupt(image, np.array([number]), CONDITION, config["seed"])})
        for name, network in networks.items():
            answers = bilinear(np.asarray(apply(network, seen))[0], label.shape).argmax(axis=-1)
            for k in range(len(CLASSES)):
                valid = label != VOID
                counts[name][k] += [
                    np.sum((label == k) & (answers == k)),
                    np.sum(label == k),
                    np.sum((answers == k) & valid),
                ]
    assert len(sizes) == 2
    entry = content["metrics"][CONDITION]
    for name, scores in (("baseline", entry["baseline"]), ("closed_form", entry["denoised"]["closed_form"])):
        both, labeled, answered = counts[name].T
        assert scores["mIoU"] == pytest.approx(100 * np.mean(both / (labeled + answered - both)), abs=0.05)
        assert scores["mAcc"] == pytest.approx(100 * np.mean(both / labeled), abs=0.05)
        assert scores["aAcc"] == pytest.approx(100 * both.sum() / labeled.sum(), abs=0.05)


def test_the_report_states_the_protocol_and_shows_the_maps(run):
    _, directory, content = run
    text = pathlib.Path(directory, "report.md").read_text(encoding="utf-8")
    page = pathlib.Path(directory, "report.html").read_text(encoding="utf-8")
    for part in ("within 0.02 of the image's diagonal", "Images keep their size", "% of the pixels are ignored"):
        assert part in text and part.replace("'", "&#39;") in page
    overlays = content["overlays"]
    assert overlays["arms"] == ["baseline", "closed_form"] and overlays["classes"] == list(CLASSES)
    assert len(overlays["images"]) == 3 and overlays["of"] == 12
    for one in overlays["images"]:
        label, answer = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(each))))
            for each in (one["label"], one["answers"]["closed_form"])
        )
        assert label.shape == answer.shape and set(np.unique(answer)) <= set(range(len(CLASSES)))
        right = np.mean((label == answer)[label != VOID])
        assert one["accuracy"]["closed_form"] == pytest.approx(right, abs=1e-6)
    with Image.open(f"{directory}/plots/overlays.png") as picture:
        assert min(picture.size) > 200
    assert "plots/overlays.png" in text and page.count("data:image/png;base64") == 1


@pytest.mark.slow
def test_a_later_evaluation_may_take_another_protocol(run):
    config, directory, content = run
    again, _ = evaluate.evaluate(config, directory)
    before = content["metrics"][CONDITION]["denoised"]["closed_form"]
    assert again["metrics"][CONDITION]["denoised"]["closed_form"] == pytest.approx(before)
    assert again["protocol"] == content["protocol"]
    changed = evaluate.configuration(
        {},
        directory,
        overrides={"data.test_resize": "short:22:64:8", "segmentation.bootstrap_unit": "image"},
        explicit=False,
    )
    other, folder = evaluate.evaluate(changed, directory)
    assert other["metrics"]["clean"]["n"] == 12
    assert 40 < other["metrics"]["clean"]["baseline"]["mIoU"] != content["metrics"]["clean"]["baseline"]["mIoU"]
    text = pathlib.Path(folder, "evaluation.md").read_text(encoding="utf-8")
    assert "resized to 22 pixels, the long one to 64 at most, and both sides are rounded up to multiples of 8" in text
